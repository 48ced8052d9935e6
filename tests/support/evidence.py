"""What a failed test of the lab leaves in the results: the store and the domains at that moment, consoles.

`note` is called where the failure passes by, before guests are destroyed, and again by tests/xen/conftest.py;
of one test the first word of a kind stays. No test here.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

RESULTS = Path("/results")
COMMANDS = {
    "store.txt": ("xenstore-ls", "-f", "-p"),
    "domains.txt": ("xl", "list", "-v"),
    "dmesg.txt": ("dmesg",),
}
SECONDS = 20


def note(**texts: str) -> None:
    """The present test's failure. `texts`: more files, NAME.txt each."""
    if not RESULTS.is_dir():
        return
    named = os.environ.get("PYTEST_CURRENT_TEST", "unknown").rpartition(" ")[0]
    home = RESULTS / "failures" / re.sub(r"[^\w.-]+", "_", named.removeprefix("tests/xen/"))
    home.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        if not (home / name).exists():
            (home / name).write_text(_said(command))
    for name, text in texts.items():
        if not (home / f"{name}.txt").exists():
            (home / f"{name}.txt").write_text(text)


def _said(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}\n"
    return done.stdout.decode(errors="replace")
