"""What people open: tunnels and forwards, their state, their child process.

Imports ``_forwarding``, ``_server`` and below. Begin with :mod:`direct`, :mod:`base`, :mod:`openable`.
"""
