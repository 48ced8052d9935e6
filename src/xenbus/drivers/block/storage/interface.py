"""What the bytes behind a disk look like: two small protocols and the one error of this room.

Knows byte ranges and buffers. Knows nothing of rings, segments, drivers or the store.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

from xenbus.errors import UsageError, XenbusError

Buffers = Sequence[memoryview]
_NBYTES = attrgetter("nbytes")


class StorageError(XenbusError):
    """An operation on a disk's bytes failed: `name` is the errno's name (ENOSPC, EIO, EOPNOTSUPP, ...).

    path is the file, address or target that was meant; offset is in bytes, None where none applies.
    """

    def __init__(self, name: str, path: str, what: str, offset: int | None = None, detail: str = "") -> None:
        self.name = name
        self.errno = int(getattr(_errno, name, _errno.EIO))
        self.path = path
        self.what = what
        self.offset = offset
        self.detail = detail
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{path}: {what}{where}: {name}" + (f" ({detail})" if detail else ""))


def from_oserror(
    error: OSError, path: str, what: str, offset: int | None = None, detail: str = ""
) -> StorageError:
    """The StorageError for what the kernel answered."""
    number = error.errno or _errno.EIO
    name = _errno.errorcode.get(number, f"errno {number}")
    if name == "ENOTSUP":  # the same number as EOPNOTSUPP on Linux; blkif and fallocate(2) say the latter
        name = "EOPNOTSUPP"
    return StorageError(name, path, what, offset, detail or (error.strerror or ""))


class Blocks(Protocol):
    """Bytes that can be read and written: a Storage, or the disk that a front driver made (xbd's Disk).

    Offsets and lengths are bytes. Once a call has returned or raised (cancelled, too), nobody touches the
    caller's buffer any more.
    """

    @property
    def size(self) -> int: ...
    @property
    def sector_size(self) -> int: ...
    @property
    def readonly(self) -> bool: ...

    async def read_into(self, offset: int, buffer: memoryview, /) -> object: ...
    async def write(self, offset: int, data: memoryview, /) -> object: ...
    async def flush(self) -> object: ...
    async def discard(self, offset: int, length: int, /) -> object: ...


class Storage(Blocks, Protocol):
    """What the back driver reads and writes, opened by `open_storage`. Raises StorageError.

    `target` names it in messages. `discards` is False where discard() can only answer EOPNOTSUPP. A size
    that is no multiple of the sector is rounded down: the bytes after it are not part of the disk.
    `outlives`: once this process has ended, whoever opens the target anew finds all that was written, and no
    write of ours arrives any more.
    """

    @property
    def target(self) -> str: ...
    @property
    def discards(self) -> bool: ...
    @property
    def outlives(self) -> bool: ...

    async def readv(self, offset: int, buffers: Buffers) -> None:
        """Fill scattered buffers from one run of bytes."""

    async def writev(self, offset: int, buffers: Buffers) -> None:
        """Write scattered buffers as one run of bytes."""

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        """readv without waiting, or False (buffers then hold anything): never blocks, never hops."""

    def try_read_into(self, offset: int, buffer: memoryview, /) -> bool:
        """try_readv into one buffer."""

    def try_writev(self, offset: int, buffers: Buffers) -> bool:
        """writev without waiting, or False (any part of the range may have been written then)."""

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes."""

    async def close(self) -> None:
        """Give the file or connection back, after what is in flight. May be called twice."""


def total(buffers: Buffers) -> int:
    """Bytes in all of them."""
    return sum(map(_NBYTES, buffers))


def check_range(blocks: Blocks, target: str, what: str, offset: int, length: int) -> None:
    """Refuse what is not wholly inside the disk (EINVAL), before anything is touched."""
    if offset < 0 or length < 0 or offset + length > blocks.size:
        raise StorageError(
            "EINVAL", target, f"{what} of {length} bytes", offset, f"the disk has {blocks.size} bytes"
        )


def check_sector_size(sector_size: int) -> int:
    """512 to 65536, a power of two: what `sector-size` of blkif.h can say and a page can hold pieces of."""
    if sector_size & (sector_size - 1) or not 512 <= sector_size <= 65536:
        raise UsageError(f"sector size {sector_size}: not a power of two from 512 to 65536")
    return sector_size
