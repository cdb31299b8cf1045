"""``python -m bokeh_ssh``: the command line."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path and os.path.exists(sys.path[0]) and os.path.samefile(sys.path[0], "."):
    del sys.path[0]  # put there by -m; a random.py in the current directory is not for us

from bokeh_ssh._cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
