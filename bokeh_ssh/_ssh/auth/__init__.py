"""Who we are and who they are: keys, agent, passwords, host keys.

Imports ``_core`` and what of ``_ssh`` reads messages. Begin with :mod:`login`.
"""
