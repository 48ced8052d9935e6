"""Received bytes for a protocol written as a generator: it yields a view, and goes on once that is full.

Sans-IO. Small pieces go through one staging buffer (one receive serves many); of a long payload all but
the head is received straight into the view that the protocol yielded.
"""

from __future__ import annotations

from collections.abc import Generator

Script = Generator[memoryview, None, None]
Taking = Generator[memoryview, None, bytearray]
STAGING = 64 << 10
DIRECT = 16 << 10  # bytes still missing from which a payload is received in place


class Intake:
    """Give `buffer()` to recv_into, then call `received(count)`. The script's exceptions come out of it.

    `paused` stops the script before its next view (what is staged waits); `resume()` goes on.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._staging = memoryview(bytearray(STAGING))
        self._start = self._end = 0
        self._direct = False
        self.paused = False
        self.finished = False
        self._want = memoryview(b"")

    def start(self) -> None:
        """Run the script up to the first bytes it wants."""
        self._advance()

    def _advance(self) -> None:
        """Until the script wants bytes that are not here, or is over."""
        while not self._want.nbytes:
            try:
                self._want = next(self._script)
            except StopIteration:
                self.finished = True
                return
            if self.paused:
                return

    def buffer(self) -> memoryview:
        self._direct = self._start == self._end and self._want.nbytes >= DIRECT
        if self._direct:
            return self._want
        if self._start == self._end:
            self._start = self._end = 0
        return self._staging[self._end :]

    def received(self, count: int) -> None:
        if self._direct:
            self._want = self._want[count:]
            self._advance()
        else:
            self._end += count
        self._feed()

    def resume(self) -> None:
        self.paused = False
        self._advance()
        self._feed()

    def _feed(self) -> None:
        """Staged bytes into the wanted views."""
        while self._start < self._end and not self.paused and not self.finished:
            count = min(self._end - self._start, self._want.nbytes)
            self._want[:count] = self._staging[self._start : self._start + count]
            self._start += count
            self._want = self._want[count:]
            self._advance()

    def divert(self) -> None:
        """What is missing of the current view goes nowhere: its owner has gone."""
        self._want = memoryview(bytearray(self._want.nbytes))

    def close(self) -> None:
        """Let go of every view, the script's too."""
        self.finished = True
        self._want = memoryview(b"")
        self._script.close()


def take(count: int) -> Taking:
    """`data = yield from take(16)` in a script."""
    data = bytearray(count)
    yield memoryview(data)
    return data
