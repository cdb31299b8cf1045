"""The command line: the only place that prints, prompts or exits.

Imports all below. Begin with :mod:`app`.
"""
