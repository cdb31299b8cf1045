"""Ports and sockets at both ends of a forward, and who may use them.

Imports ``_ssh`` and ``_core``. Begin with :mod:`listener`.
"""
