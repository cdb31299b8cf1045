"""What paramiko does not have of OpenSSH's cryptography, put together of what cryptography has.

Begin reading in :mod:`chacha20_poly1305` (a cipher) or :mod:`mldsa` (a kind of key).
"""
