"""Requests at any byte, over blocks that only take whole sectors: read, modify and write where needed.

Knows the Blocks protocol. Knows nothing of NBD.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from xenbus.drivers.block.storage.interface import Blocks

ZERO_PIECE = 1 << 20  # bytes of zeroes written at a time


class WriteLock:
    """Writes of whole sectors share it; a read-modify-write has it alone, or it would undo a neighbour's."""

    def __init__(self) -> None:
        self._shared = 0
        self._alone = False
        self._wanted_alone = 0
        self._waiters: list[asyncio.Future[None]] = []

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _tell(self) -> None:
        """Everybody looks again: a waiter that was cancelled meanwhile then takes nothing with it."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        await self._until(lambda: not self._alone and not self._wanted_alone)
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._wanted_alone += 1
        try:
            await self._until(lambda: not self._alone and not self._shared)
            self._alone = True
        finally:
            self._wanted_alone -= 1
            self._tell()
        try:
            yield
        finally:
            self._alone = False
            self._tell()


class AlignedBlocks:
    """`blocks` by the byte. Ranges are already checked to be inside it. One for all who write to it."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._sector = blocks.sector_size
        self._lock = WriteLock()

    def _outer(self, offset: int, length: int) -> tuple[int, int]:
        """The whole sectors that a range touches: (start, end)."""
        end = offset + length
        return offset - offset % self._sector, -(-end // self._sector) * self._sector

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        start, end = self._outer(offset, buffer.nbytes)
        if end - start == buffer.nbytes:
            await self.blocks.read_into(offset, buffer)
            return
        whole = memoryview(bytearray(end - start))
        await self.blocks.read_into(start, whole)
        buffer[:] = whole[offset - start :][: buffer.nbytes]

    async def write(self, offset: int, data: memoryview) -> None:
        start, end = self._outer(offset, data.nbytes)
        if end - start == data.nbytes:
            async with self._lock.shared():
                await self.blocks.write(offset, data)
            return
        async with self._lock.alone():
            whole = memoryview(bytearray(end - start))
            await self.blocks.read_into(start, whole)
            whole[offset - start :][: data.nbytes] = data
            await self.blocks.write(start, whole)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """By the target's own means where it has them, otherwise written."""
        end = offset + length
        first = min(-(-offset // self._sector) * self._sector, end)
        last = max(end - end % self._sector, first)
        for at, upto in ((offset, first), (last, end)):
            if upto > at:
                await self.write(at, memoryview(bytes(upto - at)))
        own = getattr(self.blocks, "write_zeroes", None)
        if own is not None and last > first:
            async with self._lock.shared():
                await own(first, last - first)
            return
        zeroes = memoryview(bytes(min(ZERO_PIECE, last - first)))
        for at in range(first, last, ZERO_PIECE):
            await self.write(at, zeroes[: last - at])

    async def discard(self, offset: int, length: int) -> None:
        """The whole sectors inside the range."""
        end = offset + length
        first = -(-offset // self._sector) * self._sector
        last = end - end % self._sector
        if last > first:
            async with self._lock.shared():
                await self.blocks.discard(first, last - first)

    async def flush(self) -> None:
        await self.blocks.flush()
