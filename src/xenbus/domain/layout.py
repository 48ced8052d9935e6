"""Where an embedded host keeps its files: one directory, named by --dir or XENBUS_DIR; who has it locked.

Paths and modes only: knows no process and no socket.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from xenbus.domain.rpc import check_socket_path
from xenbus.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}")

CONTROL_DOMAIN = "Domain-0"  # libxl's name of domain 0


def check_name(name: str) -> str:
    """A domain's name is a file name and a store value too: 1 to 63 letters, digits and `_.+-`, no number."""
    if not _NAME.fullmatch(name) or name.isdigit():
        raise UsageError(
            f"{name!r}: a domain's name has 1 to 63 letters, digits and _.+-, a letter or digit first, "
            "and is no number: those are domids"
        )
    return name


@dataclass(slots=True, frozen=True)
class HostLayout:
    """The directory of one host. Made with mode 0700: what is in it is its owner's alone."""

    root: Path

    @property
    def store_socket(self) -> Path:
        """`XENSTORED_RUNDIR=<root>/xenstored xenstore-ls` finds it: libxenstore looks for `socket` there."""
        return self.root / "xenstored" / "socket"

    @property
    def host_socket(self) -> Path:
        return self.root / "host.socket"

    def control_socket(self, name: str) -> Path:
        return self.root / "control" / check_name(name)

    def log(self, name: str) -> Path:
        return self.root / "log" / f"{check_name(name)}.log"

    def make(self) -> None:
        """UsageError if the directory can't be made or written, or a socket's path in it would be too long.

        A directory that was there keeps its mode; what is made in it is its owner's alone.
        """
        check_socket_path(self.control_socket("x" * 32))
        try:
            for folder in (self.root, self.root / "xenstored", self.root / "control", self.root / "log"):
                folder.mkdir(mode=0o700, parents=folder == self.root, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.root}: {error.strerror}") from None

    def lock(self) -> int:
        """The directory's lock: a descriptor, for the children too, so that a host's last process frees it.

        Does not wait: BlockingIOError if another host has it. UsageError if the directory can't be written.
        """
        path = self.root / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd
