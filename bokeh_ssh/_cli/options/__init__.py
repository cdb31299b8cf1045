"""The options of the command line: each is a keyword of the classes, and read off it.

The classes themselves bring paramiko, and are not imported. Begin with :mod:`table`.
"""
