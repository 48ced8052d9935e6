"""A console as a guest's programs have it: bytes to read and to write, across reconnects and restores.

Knows the loop. Both directions are bounded: what nobody reads stays on the ring, and so do not more than that
behind it; who writes waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xenbus.errors import DeadlineError, LinkDown

BUFFER = 64 << 10  # bytes, of either direction
PATIENCE = 30.0  # seconds


class ConsoleStream:
    """See the module. `moved` is called after a program made room, or has something to send."""

    def __init__(self, name: Callable[[], str], moved: Callable[[], None]) -> None:
        self._name = name
        self._moved = moved
        self._in = bytearray()
        self._out = bytearray()
        self._waiters: set[asyncio.Future[None]] = set()
        self._gone: str = ""
        self.rx_bytes = self.tx_bytes = 0

    # -- for programs

    async def read(self, limit: int = BUFFER, seconds: float = PATIENCE) -> bytes:
        """What has come, from one byte to `limit`. DeadlineError, LinkDown once the device is gone."""
        await self._wait(lambda: bool(self._in), seconds, "a byte")
        return self._take(limit)

    async def read_until(self, end: bytes = b"\n", seconds: float = PATIENCE) -> bytes:
        """Up to and with `end`; without it, what was read when BUFFER bytes held none. As `read`."""
        await self._wait(lambda: end in self._in or len(self._in) >= BUFFER, seconds, f"{end!r}")
        at = self._in.find(end)
        return self._take(at + len(end) if at >= 0 else BUFFER)

    def _take(self, limit: int) -> bytes:
        data = bytes(self._in[:limit])
        del self._in[:limit]
        self._moved()
        return data

    def try_write(self, data: bytes | memoryview) -> int:
        """How many of the bytes were taken. LinkDown."""
        if self._gone:
            raise LinkDown(self._gone)
        count = min(len(data), max(BUFFER - len(self._out), 0))
        self._out += data[:count]
        self._moved()
        return count

    async def write(self, data: bytes, seconds: float = PATIENCE) -> None:
        """Once all is taken, which is not yet read by anybody. DeadlineError if only a part was, LinkDown."""
        rest = memoryview(data)
        while rest := rest[self.try_write(rest) :]:
            await self._wait(lambda: len(self._out) < BUFFER, seconds, "room for what is written")

    async def drain(self, seconds: float = PATIENCE) -> None:
        """Until all that was written is on the ring. DeadlineError, LinkDown."""
        await self._wait(lambda: not self._out, seconds, "the back end to take what was written")

    async def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not condition():
            if self._gone:
                raise LinkDown(self._gone)
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise DeadlineError(what, f"whoever is behind {self._name()}", seconds) from None
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- Behind

    def room(self) -> int:
        return BUFFER - len(self._in)

    def put(self, data: bytes) -> None:
        self._in += data
        self.rx_bytes += len(data)
        self._wake()

    def peek(self) -> bytearray:
        return self._out

    def sent(self, count: int) -> None:
        del self._out[:count]
        self.tx_bytes += count
        self._wake()

    def unsent(self, data: bytes) -> None:
        """These were sent and are to be sent again, before all else."""
        self._out[:0] = data
        self.tx_bytes -= len(data)

    def end(self, why: str) -> None:
        """The device is gone: everybody who waits hears of it, and whoever comes after."""
        self._gone = why
        self._wake()
