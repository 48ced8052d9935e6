"""The back end's terminal: a PTY that an operator attaches to, and the bytes that wait for one.

Knows the loop and a PTY. A terminal that nobody reads loses what is oldest, and holds nobody up.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import struct
import termios
import tty
from collections.abc import Callable

from xenbus.drivers.console.consif import LIMIT
from xenbus.errors import XenbusError

_CHUNK = 4096
LAST_WORDS = 0.5  # seconds
TYPED_MAX = 4096  # bytes that wait for the guest: then the PTY is not read, and its writers wait


# struct flock of fcntl(2): type, whence, start, length (0: all of it), process.
_FLOCK = struct.Struct("hhqqi0q")


class TerminalError(XenbusError):
    """No PTY could be had; `name` is the errno's."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(f"a PTY for the console: {name}: {text}")


def is_served(fd: int) -> bool:
    """Whether this PTY, opened by anybody, is one of ours whose process lives. The kernel gives a path away
    again at once: the one that a killed process left in the store may be another program's terminal by now.
    """
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
    return bool(found[0] != fcntl.F_UNLCK)


class Terminal:
    """`path` is what to open. typed: called when there is more in `keys`."""

    def __init__(self, typed: Callable[[], None], limit: int = LIMIT) -> None:
        """TerminalError."""
        try:
            self._master, self._slave = os.openpty()
        except OSError as error:
            raise TerminalError(os.strerror(error.errno or 0), "all in use, or no /dev/pts") from None
        # No echo, no lines, no signals: those are the operator's terminal's, or the guest's. The slave stays
        # open, so that the one who leaves does not end it.
        tty.setraw(self._slave)
        # What `is_served` looks for. Whoever attaches has a lock of the other kind, flock(2).
        fcntl.fcntl(self._slave, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)
        self.keys = bytearray()
        self.discarded = 0
        self._typed = typed
        self._limit = limit
        self._waiting = bytearray()
        self._loop = asyncio.get_running_loop()
        self._reading = self._writing = False
        self._set_reading(True)

    @property
    def waiting(self) -> int:
        """Bytes that the PTY has no room for."""
        return len(self._waiting)

    def show(self, data: bytes) -> None:
        """What the guest says."""
        self._waiting += data
        if not self._writing:
            self._write()
        excess = len(self._waiting) - self._limit
        if excess > 0:
            del self._waiting[:excess]
            self.discarded += excess

    def _write(self) -> None:
        while self._waiting:
            try:
                count = os.write(self._master, self._waiting[:_CHUNK])
            except BlockingIOError:
                break
            del self._waiting[:count]
        self._set_writing(bool(self._waiting))

    def _read(self) -> None:
        try:
            self.keys += os.read(self._master, TYPED_MAX - len(self.keys))
        except BlockingIOError:
            return
        self._typed()
        self._set_reading(len(self.keys) < TYPED_MAX)

    def taken(self, count: int) -> None:
        """So many of `keys` went to the guest."""
        del self.keys[:count]
        self._set_reading(len(self.keys) < TYPED_MAX)

    def _set_reading(self, wanted: bool) -> None:
        if wanted != self._reading and self._master >= 0:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._master, self._read)
            else:
                self._loop.remove_reader(self._master)

    def _set_writing(self, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._master, self._write)
            else:
                self._loop.remove_writer(self._master)

    async def last_words(self) -> None:
        """Until whoever is attached has read all, or has had LAST_WORDS for it: `close` takes it away."""
        end = self._loop.time() + LAST_WORDS
        while self._unread() and self._loop.time() < end:  # noqa: ASYNC110 - a PTY that is empty says nothing
            await asyncio.sleep(0.005)

    def _unread(self) -> bool:
        if self._master < 0 or not self._attached():
            return False
        count = array.array("i", [0])
        fcntl.ioctl(self._slave, termios.FIONREAD, count)
        return bool(self._waiting or count[0])

    def _attached(self) -> bool:
        """Whether a `xenbus console` has it."""
        try:
            fcntl.flock(self._slave, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._slave, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Whoever is attached sees it hang up. Idempotent."""
        if self._master < 0:
            return
        self._set_reading(False)
        self._set_writing(False)
        os.close(self._slave)
        os.close(self._master)
        self._master = self._slave = -1
