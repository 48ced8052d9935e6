"""`memory:16M`: a disk of zeroes that lives as long as it is open; pages exist once they are written.

Knows one anonymous mapping. Never waits, so every read is a fast one.
"""

from __future__ import annotations

import mmap
import re

from xenbus.drivers.block.storage.interface import Buffers, StorageError, check_range, total
from xenbus.drivers.block.storage.registry import Target, storage_scheme
from xenbus.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """`4096`, `64K`, `16M`, `1G`: bytes. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size (write 4096, 64K, 16M or 1G)")
    return int(match.group(1)) * _UNITS[match.group(2).upper()]


class MemoryStorage:
    """A Storage over anonymous private memory. `size` in bytes, rounded down to whole sectors."""

    discards = True
    outlives = False

    def __init__(self, size: int, *, sector_size: int = 512, readonly: bool = False) -> None:
        self.target = f"memory:{size}"
        self.size = size - size % sector_size
        if not self.size:
            raise UsageError(f"memory disk of {size} bytes: less than one sector of {sector_size}")
        self.sector_size = sector_size
        self.readonly = readonly
        try:
            self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise StorageError("ENOMEM", self.target, "open", detail=str(error)) from None
        self._view = memoryview(self._map)

    def _check(self, what: str, offset: int, length: int, *, changes: bool = True) -> None:
        if self._map.closed:
            raise StorageError("EBADF", self.target, what, offset, "closed")
        if changes and self.readonly:
            raise StorageError("EROFS", self.target, what, offset, "opened read-only")
        check_range(self, self.target, what, offset, length)

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        self._check("read", offset, total(buffers), changes=False)
        for buffer in buffers:
            end = offset + buffer.nbytes
            buffer[:] = self._view[offset:end]
            offset = end
        return True

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.try_readv(offset, buffers)

    def try_writev(self, offset: int, buffers: Buffers) -> bool:
        self._check("write", offset, total(buffers))
        for buffer in buffers:
            end = offset + buffer.nbytes
            self._view[offset:end] = buffer
            offset = end
        return True

    async def writev(self, offset: int, buffers: Buffers) -> None:
        self.try_writev(offset, buffers)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self.try_readv(offset, (buffer,))

    async def read_into(self, offset: int, buffer: memoryview, /) -> None:
        self.try_readv(offset, (buffer,))

    async def write(self, offset: int, data: memoryview, /) -> None:
        await self.writev(offset, (data,))

    async def flush(self) -> None:
        self._check("flush", 0, 0, changes=False)

    async def discard(self, offset: int, length: int, /) -> None:
        self._check("discard", offset, length)
        self._zero(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        self._check("write zeroes", offset, length)
        self._zero(offset, length)

    def _zero(self, offset: int, length: int) -> None:
        """Whole pages go back to the kernel (a private mapping reads zeroes after MADV_DONTNEED)."""
        end = offset + length
        first = min(-(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, end)
        last = max(end // mmap.PAGESIZE * mmap.PAGESIZE, first)
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        self._view[offset:first] = bytes(first - offset)
        self._view[last:end] = bytes(end - last)

    async def close(self) -> None:
        self._view.release()
        self._map.close()


@storage_scheme("memory")
async def open_memory(target: Target) -> MemoryStorage:
    target.finish_options()
    size = parse_size(target.rest)
    return MemoryStorage(size, sector_size=target.sector_size or 512, readonly=target.readonly)
