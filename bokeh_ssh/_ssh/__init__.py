"""One SSH connection: reached, verified, logged in to, and what it carries.

Imports ``_core`` alone. Begin with :mod:`connect`, then :mod:`connection`.
"""
