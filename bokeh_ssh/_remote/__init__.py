"""What is sent to the other machine as text and runs there: never imported here.

Imports the standard library alone, on Python 3.8 or newer. Begin with :mod:`supervisor`.
"""
