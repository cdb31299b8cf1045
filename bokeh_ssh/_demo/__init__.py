"""A machine to log in to, on loopback, for the demo and for tests.

Imports ``_core``. Begin with :mod:`machine`.
"""
