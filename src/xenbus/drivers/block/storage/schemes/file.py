"""`/path`, `file:/path`: a raw image file or a block device.

Knows preadv2, pwritev2, fdatasync and fallocate. What the page cache can answer at once is done inline
(a hop to a thread and back costs about 100 us); whatever would wait for the disk goes to a thread.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from xenbus.drivers.block.storage import fallocate as _fallocate
from xenbus.drivers.block.storage.interface import Buffers, StorageError, check_range, from_oserror, total
from xenbus.drivers.block.storage.registry import Target, storage_scheme
from xenbus.drivers.block.storage.workers import Workers
from xenbus.errors import DeadlineError

log = logging.getLogger(__name__)

BLKGETSIZE64 = 0x80081272  # linux/fs.h: _IOR(0x12, 114, size_t) on 64-bit
IOV_MAX = 1024  # limits.h
THREADS = 4
INLINE_READ_MAX = 2 << 20  # bytes; copying more from the page cache would hold the loop up for too long
INLINE_WRITE_MAX = 1 << 20  # bytes; a copy into the page cache of that size costs about what a hop does
SLOW_WRITE = 0.002  # seconds: an inline write that took longer was made to wait for the disk
SLOW_PAUSE = 1.0  # seconds for which writes then go to threads
CLOSE_SECONDS = 30.0  # how long close() waits for the kernel

Transfer = Callable[[int, Buffers, int], int]


class FileStorage:
    """A Storage over one descriptor, which it owns. Made by `open_file`."""

    outlives = (
        True  # a write is in the kernel or it is not, and a process is not gone before its system calls
    )

    def __init__(self, fd: int, path: str, size: int, *, sector_size: int, readonly: bool) -> None:
        self._fd = fd
        self.target = path
        self.size = size - size % sector_size
        self.sector_size = sector_size
        self.readonly = readonly
        self.discards = not readonly and _fallocate.can_punch(fd)
        self._workers = Workers(THREADS, "xenbus-disk")
        self._flags = 0 if _on_tmpfs(fd) else os.RWF_NOWAIT
        self._nowait = True
        self._nowait_write = True
        self._inline_writes_from = 0.0  # on the monotonic clock
        self._flushing = 0
        self._zero_range = True
        self._closing = False

    # Reading

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        length = total(buffers)
        self._check("read", offset, length, changes=False)
        if not self._nowait or len(buffers) > IOV_MAX:
            return False
        try:
            # A part that is not cached, or an end of file that moved, comes back short: left to a thread.
            return os.preadv(self._fd, buffers, offset, self._flags) == length
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _fallocate.UNSUPPORTED:  # a filesystem without RWF_NOWAIT
                self._nowait = False
                return False
            raise from_oserror(error, self.target, f"read of {length} bytes", offset) from None

    def try_read_into(self, offset: int, buffer: memoryview, /) -> bool:
        """What `try_readv` does, written out: most reads are of a cached page, at half of its price."""
        length = buffer.nbytes
        if not self._nowait or self._closing or offset < 0 or offset + length > self.size:
            return self.try_readv(offset, (buffer,))
        try:
            return os.preadv(self._fd, (buffer,), offset, self._flags) == length
        except OSError:
            return self.try_readv(offset, (buffer,))  # it knows what each error means

    async def readv(self, offset: int, buffers: Buffers) -> None:
        if total(buffers) > INLINE_READ_MAX or not self.try_readv(offset, buffers):
            self._check("read", offset, total(buffers), changes=False)
            await self._workers.run(lambda: self._whole("read", os.preadv, offset, buffers))

    async def read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self.readv(offset, (buffer,))

    # Writing

    async def writev(self, offset: int, buffers: Buffers) -> None:
        if self.try_writev(offset, buffers):
            return
        # From the start again, should a part be written: the same bytes to the same place.
        await self._workers.run(lambda: self._whole("write", os.pwritev, offset, buffers))

    def try_writev(self, offset: int, buffers: Buffers) -> bool:
        length = total(buffers)
        self._check("write", offset, length)
        if length > INLINE_WRITE_MAX or self._flushing or len(buffers) > IOV_MAX:
            return False
        return self._try_writev(offset, buffers) == length

    def _try_writev(self, offset: int, buffers: Buffers) -> int:
        """Bytes written inline. Where the filesystem has no RWF_NOWAIT for writes (ext4), a plain write
        only copies, until the kernel throttles whoever dirties pages too fast: so it is timed.
        """
        if self._nowait_write:
            try:
                return os.pwritev(self._fd, buffers, offset, self._flags)
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno not in _fallocate.UNSUPPORTED:
                    raise from_oserror(error, self.target, "write", offset) from None
                self._nowait_write = False
        started = time.monotonic()
        if started < self._inline_writes_from:
            return 0
        try:
            return os.pwritev(self._fd, buffers, offset)
        except OSError as error:
            raise from_oserror(error, self.target, f"write of {total(buffers)} bytes", offset) from None
        finally:
            ended = time.monotonic()
            if ended - started > SLOW_WRITE:
                self._inline_writes_from = ended + SLOW_PAUSE

    async def write(self, offset: int, data: memoryview, /) -> None:
        await self.writev(offset, (data,))

    async def flush(self) -> None:
        """fdatasync: what was written before the call is on the disk after it."""
        self._check("flush", 0, 0, changes=False)
        if self.readonly:
            return
        self._flushing += 1
        try:
            await self._workers.run(lambda: self._call("flush", None, os.fdatasync, self._fd))
        finally:
            self._flushing -= 1

    async def discard(self, offset: int, length: int, /) -> None:
        """Punch a hole. Raises StorageError EOPNOTSUPP where there can be none (`discards` is False)."""
        self._check("discard", offset, length)
        if not self.discards:
            raise StorageError("EOPNOTSUPP", self.target, "discard", offset, "no holes can be punched here")
        if length:
            await self._workers.run(lambda: self._punch(offset, length))

    async def write_zeroes(self, offset: int, length: int) -> None:
        self._check("write zeroes", offset, length)
        if length:
            await self._workers.run(lambda: self._zero(offset, length))

    # In a thread

    def _call(self, what: str, offset: int | None, call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except OSError as error:
            raise from_oserror(error, self.target, what, offset) from None

    def _punch(self, offset: int, length: int) -> None:
        mode = _fallocate.PUNCH_HOLE | _fallocate.KEEP_SIZE
        self._call(f"discard of {length} bytes", offset, _fallocate.fallocate, self._fd, mode, offset, length)

    def _zero(self, offset: int, length: int) -> None:
        if self._zero_range:
            mode = _fallocate.ZERO_RANGE | _fallocate.KEEP_SIZE
            try:
                _fallocate.fallocate(self._fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in (*_fallocate.UNSUPPORTED, errno.EINVAL):
                    raise from_oserror(error, self.target, "write zeroes", offset) from None
                self._zero_range = False  # EINVAL: a device with larger sectors than ours
                log.info("%s: no fallocate for zeroes (%s), they are written", self.target, error.strerror)
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        for at in range(offset, offset + length, len(zeroes)):
            self._whole("write zeroes", os.pwritev, at, [zeroes[: offset + length - at]])

    def _whole(self, what: str, transfer: Transfer, offset: int, buffers: Buffers) -> None:
        """The whole transfer, however the kernel cuts it."""
        what = f"{what} of {total(buffers)} bytes"
        left = list(buffers)
        while left:
            try:
                count = transfer(self._fd, left[:IOV_MAX], offset)
            except OSError as error:
                raise from_oserror(error, self.target, what, offset) from None
            if not count and total(left):
                raise self._cut_short(what, offset)
            offset += count
            left = _after(left, count)

    def _cut_short(self, what: str, offset: int) -> StorageError:
        size = os.lseek(self._fd, 0, os.SEEK_END)
        detail = f"the file is {size} bytes long now, it was {self.size} when it was opened"
        return StorageError("EIO", self.target, what, offset, detail)

    def _check(self, what: str, offset: int, length: int, *, changes: bool = True) -> None:
        if self._closing:
            raise StorageError("EBADF", self.target, what, offset, "closed")
        if changes and self.readonly:
            raise StorageError("EROFS", self.target, what, offset, "opened read-only")
        check_range(self, self.target, what, offset, length)

    async def close(self) -> None:
        """Waits at most 30 s for calls in flight; a descriptor that a thread still uses is never closed."""
        if self._closing:
            return
        self._closing = True
        if not await self._workers.close(CLOSE_SECONDS):
            raise DeadlineError(f"close of {self.target}", "the disk below it", CLOSE_SECONDS)
        os.close(self._fd)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers after their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []


def _size_of(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fstat(fd).st_size
    if stat.S_ISBLK(mode):
        answer: bytes = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
        return int(struct.unpack("=Q", answer)[0])
    kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
    raise StorageError("EISDIR" if stat.S_ISDIR(mode) else "EINVAL", path, "open", detail=kind)


def _on_tmpfs(fd: int) -> bool:
    """tmpfs refuses RWF_NOWAIT, but its pages are memory: a plain read or write of it is as good."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:  # proc(5): "id parent major:minor root mountpoint options - type source options"
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0] in ("tmpfs", "ramfs")
    return False


@storage_scheme("file")
async def open_file(target: Target) -> FileStorage:
    """Raises StorageError that names the path: ENOENT, EACCES, EISDIR, EROFS, ..."""
    target.finish_options()
    path, readonly = target.rest, target.readonly
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK  # no wait on a FIFO
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise from_oserror(error, path, f"open {'read-only' if readonly else 'for writing'}") from None
    try:
        size = _size_of(fd, path)
        return FileStorage(fd, path, size, sector_size=target.sector_size or 512, readonly=readonly)
    except BaseException:
        os.close(fd)
        raise
