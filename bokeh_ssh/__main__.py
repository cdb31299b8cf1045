"""``python -m bokeh_ssh``: the command line."""

from __future__ import annotations

from bokeh_ssh._cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
