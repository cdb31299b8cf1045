"""What a server sends, made smaller for a slow line: a part of the supervisor.

Begin with :mod:`packer`.
"""
