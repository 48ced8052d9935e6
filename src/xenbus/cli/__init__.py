"""The `xenbus` command. Its entry is here, so that a core without the `cli` extra can say what is missing."""

from __future__ import annotations

import sys

# What the extra brings; a missing module of any other name is a fault of ours and keeps its traceback.
_EXTRA = ("click", "rich")


def main() -> None:
    """The entry point `xenbus`."""
    try:
        from xenbus.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(f"xenbus: the command needs {error.name}: install xenbus[cli]\n")
        sys.exit(1)
    run()
