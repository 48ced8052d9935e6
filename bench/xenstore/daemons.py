"""Two daemons as processes of their own: ours, and Debian's C xenstored without a hypervisor.

Knows how to start and end them. They run on the CPU of whoever starts them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import xenstored

# Bytes: what it writes to --ready-fd, "ready\n".
READY = 6


@dataclass(slots=True, frozen=True)
class Store:
    """A daemon that serves. `rundir` is what $XENSTORED_RUNDIR has to be for Debian's programs."""

    rundir: Path

    @property
    def socket(self) -> str:
        return str(self.rundir / "socket")


def missing() -> str:
    """Why the C daemon cannot be had here; "" if it can."""
    return xenstored.missing("c")


@contextmanager
def ours(folder: Path) -> Iterator[Store]:
    """`xenbus.xenstore.daemon` as a process."""
    folder.mkdir()
    store = Store(folder)
    heard, told = os.pipe()
    command = [sys.executable, "-m", "xenbus.xenstore.daemon", "--socket", store.socket]
    process = subprocess.Popen([*command, "--ready-fd", str(told)], pass_fds=[told])
    os.close(told)
    try:
        if len(os.read(heard, READY)) < READY:
            raise RuntimeError(f"the daemon ended with {process.wait()}")
        yield store
    finally:
        os.close(heard)
        process.terminate()
        process.wait()


@contextmanager
def theirs(folder: Path) -> Iterator[Store]:
    """Debian's C xenstored."""
    with xenstored.start("c", folder) as daemon:
        yield Store(daemon.socket.parent)
