"""``python -m bokeh_ssh``: the command line."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path and os.path.exists(sys.path[0]) and os.path.samefile(sys.path[0], "."):
    here = sys.path.pop(0)  # put there by -m; a random.py in the current directory is not for us
    if os.path.realpath(here) == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        sys.path.append(here)  # but what we need may be, where we are there ourselves

from bokeh_ssh._cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
