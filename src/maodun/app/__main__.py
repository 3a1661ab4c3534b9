"""`python -m maodun.app` is the command line."""

from __future__ import annotations

from maodun.app.cli import main

if __name__ == "__main__":
    main()
