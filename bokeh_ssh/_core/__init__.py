"""What all floors use: errors, events, hosts, endpoints, waits, text.

Imports nothing of ours from elsewhere. Begin with :mod:`errors` and :mod:`host`.
"""
