"""The disk that xbd makes: async read, write, flush and discard for programs, and a file-like view.

Knows I/O and its geometry; knows no store and no ring. It outlives connections: while there is none
(before Connected, in a suspend) callers wait, each with a deadline.
"""

from __future__ import annotations

import asyncio
import io as _io
from collections.abc import Callable
from typing import Final

from xenbus.drivers.block.blkif import SECTOR_SIZE
from xenbus.drivers.block.diskio import DISCARD, FLUSH, READ, WRITE, WRITE_BARRIER, DiskError, Io
from xenbus.drivers.block.xbd_io import Queue
from xenbus.errors import DeadlineError, LinkDown, UsageError

__all__ = ["Disk", "DiskError", "DiskFile", "Geometry"]

# What one call of `read` makes room for at most; `read_into` has no such limit.
READ_MAX: Final = 1 << 30

Buffer = bytes | bytearray | memoryview


class Geometry:
    """What the back end said of the disk when it connected. Sizes in bytes."""

    __slots__ = (
        "barrier",
        "discard",
        "discard_alignment",
        "discard_granularity",
        "flush",
        "mask",
        "physical_sector_size",
        "readonly",
        "sector_size",
        "size",
    )

    def __init__(self, size: int, sector_size: int = SECTOR_SIZE, *, readonly: bool = False) -> None:
        self.size = size
        self.sector_size = sector_size
        self.mask = sector_size - 1
        self.physical_sector_size = sector_size
        self.readonly = readonly
        self.flush = False
        self.barrier = False
        self.discard = False
        self.discard_granularity = sector_size
        self.discard_alignment = 0


class Disk:
    """A block device in this process. Offsets and lengths are bytes, multiples of `sector_size`.

    Raises UsageError for what makes no sense, DiskError for what the back end could not do, LinkDown when the
    disk is gone, DeadlineError after `timeout` seconds of one call (waiting for a connection included).
    A cancelled call leaves no trace: its buffer is not touched any more.
    """

    def __init__(self, name: str, queue: Queue, owed_by: Callable[[], str]) -> None:
        self.name = name
        self._queue = queue
        self._owed_by = owed_by
        self._geometry: Geometry | None = None
        self._ready: asyncio.Future[None] | None = None
        self.read_modify_write = asyncio.Lock()

    def __repr__(self) -> str:
        size = f"{self._geometry.size} bytes" if self._geometry is not None else "not connected"
        return f"<Disk {self.name}: {'gone' if self._queue.gone else size}>"

    @property
    def timeout(self) -> float:
        """Seconds for one call; a change holds from the next tick on."""
        return self._queue.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if not seconds > 0:
            raise UsageError(f"{self.name}: a timeout of {seconds} s")
        self._queue.timeout = seconds

    # -- what it is

    @property
    def geometry(self) -> Geometry:
        """UsageError before the first connection: await `connected()`."""
        if self._geometry is None:
            raise self._queue.gone or UsageError(f"{self.name} was never connected: nobody told its size")
        return self._geometry

    @property
    def size(self) -> int:
        return self.geometry.size

    @property
    def sector_size(self) -> int:
        return self.geometry.sector_size

    @property
    def readonly(self) -> bool:
        return self.geometry.readonly

    @property
    def discards(self) -> bool:
        """Whether the back end takes discards."""
        return self.geometry.discard

    async def connected(self, timeout: float | None = None) -> Geometry:
        """Wait for the first connection. DeadlineError, LinkDown."""
        if self._geometry is None and self._queue.gone is None:
            if self._ready is None:
                self._ready = asyncio.get_running_loop().create_future()
            seconds = self.timeout if timeout is None else timeout
            await asyncio.wait([self._ready], timeout=seconds)
            if not self._ready.done():
                raise DeadlineError(f"{self.name} to be Connected", self._owed_by(), seconds)
        if self._queue.gone is not None:
            raise self._queue.gone
        return self.geometry

    # -- what is done with it

    async def read(self, offset: int, length: int) -> bytes:
        """At most READ_MAX bytes."""
        await self._check(offset, length)
        if length > READ_MAX:
            raise UsageError(f"{self.name}: {length} bytes in one read; use read_into")
        if not length:
            return b""
        io = Io(READ, offset, length, None, self._queue.loop)
        self._queue.submit(io)
        result = await io
        return result if result is not None else bytes(io.view or b"")

    async def read_into(self, offset: int, buffer: bytearray | memoryview, /) -> None:
        """Fill a writable, contiguous buffer."""
        geometry = self._geometry
        if (
            type(buffer) is memoryview
            and geometry is not None
            and buffer.format == "B"
            and buffer.ndim == 1
            and not buffer.readonly
        ):
            # The way of most I/O, written out: a cached page is read in less time than a coroutine costs.
            length = len(buffer)
            if length and not (offset | length) & geometry.mask and 0 <= offset <= geometry.size - length:
                queue = self._queue
                io = Io(READ, offset, length, buffer, queue.loop)
                queue.submit(io)
                await io
                return
        with memoryview(buffer) as given, given.cast("B") as view:
            if view.readonly:
                raise UsageError(f"{self.name}: read into a buffer that is read-only")
            await self._check(offset, len(view))
            if len(view):
                await self._run(READ, offset, len(view), view)

    async def write(self, offset: int, data: Buffer, /) -> None:
        """The data must not change until this is over. On stable storage only after `flush`."""
        await self._write(WRITE, offset, data)

    async def write_barrier(self, offset: int, data: Buffer, /) -> None:
        """A write after every earlier one and before every later one, and on stable storage.

        BLKIF_OP_WRITE_BARRIER. DiskError EOPNOTSUPP if the back end has no barriers.
        """
        await self.connected()
        if not self.geometry.barrier:
            raise DiskError("EOPNOTSUPP", f"{self.name}: the back end has no feature-barrier")
        await self._write(WRITE_BARRIER, offset, data)

    async def flush(self) -> None:
        """What was written is on stable storage. Nothing to do for a back end that keeps no cache."""
        geometry = await self.connected()
        if geometry.flush or geometry.barrier:
            await self._run(FLUSH, 0, 0, None)

    async def discard(self, offset: int, length: int, /) -> None:
        """Say that a range is of no use any more. Only whole granules of it are discarded, perhaps none.

        DiskError EOPNOTSUPP if the back end has no feature-discard.
        """
        await self._check(offset, length)
        geometry = self._writable()
        if not geometry.discard:
            raise DiskError("EOPNOTSUPP", f"{self.name}: the back end has no feature-discard")
        grain, shift = geometry.discard_granularity, geometry.discard_alignment
        start = -(-(offset - shift) // grain) * grain + shift
        end = (offset + length - shift) // grain * grain + shift
        if start < end:
            await self._run(DISCARD, start, end - start, None)

    def open(self) -> DiskFile:
        """A file-like view with a position, for any offset and length."""
        return DiskFile(self)

    async def _write(self, op: int, offset: int, data: Buffer) -> None:
        with memoryview(data) as given, given.cast("B") as view:
            await self._check(offset, len(view))
            self._writable()
            if len(view):
                await self._run(op, offset, len(view), view)

    def _writable(self) -> Geometry:
        if self.geometry.readonly:
            raise UsageError(f"{self.name} is read-only")
        return self.geometry

    async def _check(self, offset: int, length: int) -> None:
        geometry = self._geometry
        if geometry is None:
            geometry = await self.connected()
        sector = geometry.sector_size
        if offset % sector or length % sector:
            raise UsageError(
                f"{self.name}: {length} bytes at {offset}: not whole sectors of {sector} bytes (see open())"
            )
        if offset < 0 or length < 0 or offset + length > geometry.size:
            raise UsageError(f"{self.name}: {length} bytes at {offset}: the disk has {geometry.size}")

    async def _run(self, op: int, offset: int, length: int, view: memoryview | None) -> bytes | None:
        io = Io(op, offset, length, view, self._queue.loop)
        self._queue.submit(io)
        return await io

    # -- for the driver alone

    def now_connected(self, geometry: Geometry) -> None:
        self._geometry = geometry
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def overdue(self, io: Io, seconds: float) -> DeadlineError:
        return DeadlineError(f"{self.name}: {io.what()}", self._owed_by(), seconds)

    def now_gone(self, error: Exception) -> None:
        """Every call that waits and every later one ends with this. The first error stays."""
        self._queue.end(error)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)


class DiskFile:
    """A disk as a file with a position: any offset and length, in bytes.

    It never blocks: every method that moves data is a coroutine, so it is no io.RawIOBase. A write of part of
    a sector reads it first, one such at a time a disk. One user at a time: there is one position.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._position = 0
        self._closed = False

    async def __aenter__(self) -> DiskFile:
        await self._disk.connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = _io.SEEK_SET) -> int:
        """Returns the new position. UsageError for one before the start."""
        base = {_io.SEEK_SET: 0, _io.SEEK_CUR: self._position, _io.SEEK_END: None}.get(whence, -1)
        if base is None:
            base = self._disk.size
        if base < 0 or base + offset < 0:
            raise UsageError(f"seek to {offset} from {whence}")
        self._position = base + offset
        return self._position

    async def read(self, length: int = -1) -> bytes:
        """Up to `length` bytes (-1: all); fewer at the end of the disk only."""
        disk = self._open()
        await disk.connected()
        start = min(self._position, disk.size)
        end = disk.size if length < 0 else min(start + length, disk.size)
        first, last = self._sectors(start, end)
        data = await disk.read(first, last - first)
        self._position = end if end > start else self._position
        return data[start - first : end - first]

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        with memoryview(buffer) as given, given.cast("B") as view:
            data = await self.read(len(view))
            view[: len(data)] = data
            return len(data)

    async def write(self, data: Buffer) -> int:
        """All of it, or UsageError where it would pass the end of the disk."""
        disk = self._open()
        await disk.connected()
        start, end = self._position, self._position + len(data)
        if end > disk.size:
            raise UsageError(f"{disk.name}: {len(data)} bytes at {start}: the disk has {disk.size}")
        first, last = self._sectors(start, end)
        if (first, last) == (start, end):
            await disk.write(start, data)
        else:
            async with disk.read_modify_write:
                # Only the sectors at the two ends are kept in part.
                whole = bytearray(last - first)
                sector = disk.sector_size
                whole[:sector] = await disk.read(first, sector)
                if last - first > sector:
                    whole[-sector:] = await disk.read(last - sector, sector)
                whole[start - first : end - first] = data
                await disk.write(first, whole)
        self._position = end
        return len(data)

    async def flush(self) -> None:
        await self._open().flush()

    async def close(self) -> None:
        """Flushes, unless the disk is read-only or gone. Idempotent; the disk itself stays."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._disk.readonly:
                await self._disk.flush()
        except LinkDown:
            pass

    def _open(self) -> Disk:
        if self._closed:
            raise UsageError(f"{self._disk.name}: this file is closed")
        return self._disk

    def _sectors(self, start: int, end: int) -> tuple[int, int]:
        sector = self._disk.sector_size
        return start // sector * sector, -(-end // sector) * sector
