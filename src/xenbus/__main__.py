"""`python -m xenbus`, and what xenbus.pyz runs: the command."""

from __future__ import annotations

from xenbus.cli import main

if __name__ == "__main__":
    main()
