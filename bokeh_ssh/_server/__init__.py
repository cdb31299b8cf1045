"""A server on another machine: started, found, watched, given files, ended.

Imports ``_ssh`` and ``_core``. Begin with :mod:`server`.
"""
