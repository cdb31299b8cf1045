"""What is sent to the other machine as text and runs there, on any POSIX system: never imported here.

Standard library and Python 3.8 alone, and no typing, which is slow to import. Begin with :mod:`supervisor`.
"""
