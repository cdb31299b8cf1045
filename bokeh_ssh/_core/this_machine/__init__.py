"""What is asked of the machine that this runs on: its network, its ports, its user's shell.

Imports from what is beside it in ``_core``. Begin with :mod:`network_changes`.
"""
