"""A console's log: what the guest said, as it said it, in a file that does not grow without bound.

Knows files. Escape sequences are kept: look at the log of a guest that you do not trust with `cat -v`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from xenbus.drivers.outfile import open_for_writing

log = logging.getLogger(__name__)


class LogFile:
    """At most `limit` bytes in `path`, and as many of what came before in `path`.1."""

    def __init__(self, path: Path, limit: int) -> None:
        """Opens to append, mode 0600. OSError."""
        self.path = path
        self._limit = limit
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        self._fd = open_for_writing(self.path)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """A disk that fails ends the log, and says so once; the console goes on."""
        try:
            while self._fd >= 0 and data:
                if self._size >= self._limit:
                    self._rotate()
                count = os.write(self._fd, data[: self._limit - self._size])
                data = data[count:]
                self._size += count
        except OSError as error:
            log.error("%s: the console's log ends: %s", self.path, error.strerror)
            self.close()

    def _rotate(self) -> None:
        self.close()
        self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._open()

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
