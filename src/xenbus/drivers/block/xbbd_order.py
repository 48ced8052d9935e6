"""Which writes of a queue are under way, for what must come after them: flushes and barriers.

Knows transfers as what has a serial; knows no ring and no storage.
"""

from __future__ import annotations

import asyncio

from xenbus.drivers.block.xbbd_transfer import Transfer


class WriteOrder:
    """writes: the serials of those that were taken and are not answered"""

    __slots__ = ("_drains", "_serial", "writes")

    def __init__(self) -> None:
        self._serial = 0
        self.writes: set[int] = set()
        self._drains: list[tuple[set[int], asyncio.Future[None]]] = []

    def enter(self, transfer: Transfer) -> None:
        """From here on it is waited for. Once, however often it is said."""
        if not transfer.serial:
            self._serial += 1
            transfer.serial = self._serial
            self.writes.add(self._serial)

    async def drained(self, writes: set[int]) -> None:
        """Until these writes, a set of the caller's own, are answered."""
        writes &= self.writes
        if writes:
            drained = asyncio.get_running_loop().create_future()
            self._drains.append((writes, drained))
            await drained

    def leave(self, serial: int) -> None:
        """It is answered."""
        self.writes.discard(serial)
        for entry in list(self._drains):
            writes, drained = entry
            writes.discard(serial)
            if not writes:
                self._drains.remove(entry)
                if not drained.done():
                    drained.set_result(None)
