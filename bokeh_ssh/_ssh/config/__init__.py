"""The ssh config (ssh_config(5)), as ``ssh -G`` would read it.

Imports ``_core`` alone. Begin with :mod:`lookup`.
"""
