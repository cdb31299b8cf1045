"""A batch job of a cluster as the machine that a server runs on: submitted, waited for, reached, ended.

Imports ``_server``, ``_ssh`` and ``_core``. Begin with :mod:`cluster_job`.
"""
