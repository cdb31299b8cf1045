"""The tunnels that commands hold on this machine: listed, shown, ended, and held in the background.

Each command that holds one answers at a socket of its own. Begin with :mod:`control`.
"""
