"""The version and the documentation's address, each in its one place here."""

__version__ = "0.1.0.dev0"
DOCUMENTATION = "https://bokeh-ssh.readthedocs.io"
