"""What people open: tunnels and forwards, their state, their child process.

Imports ``_jobs`` and all below it. Begin with :mod:`direct`, :mod:`base`, :mod:`openable`.
"""
