"""The store daemon as a process of its own, and what it takes of the machine."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DEADLINE = 20.0


@contextlib.contextmanager
def daemon_process(
    rundir: Path, *arguments: str, pass_fds: tuple[int, ...] = (), says: str = ""
) -> Iterator[subprocess.Popen]:
    """A daemon that has said that it is ready; ended by SIGTERM, which it must obey in good order. What it
    wrote to its standard error is all matched by `says`."""
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "xenbus.xenstore.daemon", "--socket", str(rundir / "socket")]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(theirs), *arguments],
        pass_fds=(theirs, *pass_fds),
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    try:
        assert select.select([ready], [], [], DEADLINE)[0], "it never said that it is ready"
        assert os.read(ready, 100) == b"ready\n", process.stderr.read() if process.stderr else b""
        assert os.read(ready, 100) == b"", "and then the descriptor is closed"
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert re.fullmatch(says, said), f"it said {said!r}"
    finally:
        os.close(ready)
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stderr is not None
        process.stderr.close()


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that it has right now (VmRSS)."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")
