"""Page-aligned shared memory for grants: regions, aliases of their pages, sealed memfds.

Knows mmap and memfd; knows nothing of domains, grants or messages. Every byte that a memoryview can
reach stays mapped until the last memoryview on it is gone, so a stale view never crashes the process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Final

from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import PAGE_SIZE

# linux/fcntl.h and linux/mman.h: not all of these are in Python 3.11's modules.
F_SEAL_SEAL: Final = 0x01
F_SEAL_SHRINK: Final = 0x02
F_SEAL_GROW: Final = 0x04
F_SEAL_FUTURE_WRITE: Final = 0x10
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_MAP_SHARED: Final = 0x01
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

SIZE_SEALS: Final = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


def _check(result: int | None, what: str) -> None:
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise HypervisorError(errno.errorcode.get(number, "ENOMEM"), f"{what}: {os.strerror(number)}")


class Region:
    """`length` bytes of address space, owned by a Python mmap object.

    The mmap object unmaps the range only when nothing exports its buffer any more, whatever was mapped over
    it since (MAP_FIXED): that is what makes a late memoryview safe.
    """

    __slots__ = ("_map", "address", "length", "view")

    def __init__(self, length: int, *, shared: bool) -> None:
        """shared: memory of its own that can be aliased; otherwise a reservation to map something over."""
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, length, flags | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HypervisorError("ENOMEM", f"{length} bytes of address space: {error.strerror}") from None
        self.length = length
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)

    @classmethod
    def of_fd(cls, fd: int, length: int, *, writable: bool, offset: int = 0) -> Region:
        """`length` bytes of the memfd or device `fd`. The descriptor is not kept (mmap.mmap would hold a
        duplicate of it). HypervisorError with what mmap(2) says."""
        region = cls(length, shared=False)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            result = _libc.mmap(region.address, length, protection, _MAP_SHARED | _MAP_FIXED, fd, offset)
            _check(result, f"mapping {length} bytes")
        except HypervisorError:
            region.close()
            raise
        if not writable:
            region.view = region.view.toreadonly()
        return region

    @classmethod
    def stitched(cls, runs: Sequence[tuple[Region, int, int]], *, writable: bool) -> Region:
        """Runs of other regions' pages, (region, first page, count) each, side by side in one region.

        mremap(2) with an old size of 0 maps the same pages of a shared mapping once more: no descriptor is
        needed, and a page that was mapped read-only stays so.
        """
        region = cls(sum(count for _, _, count in runs) * PAGE_SIZE, shared=False)
        at = region.address
        try:
            for source, first, count in runs:
                length = count * PAGE_SIZE
                flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
                result = _libc.mremap(source.address + first * PAGE_SIZE, 0, length, flags, at)
                _check(result, f"mapping {length} bytes once more")
                at += length
        except HypervisorError:
            region.close()
            raise
        if not writable:
            region.view = region.view.toreadonly()
        return region

    def pages(self, first: int, count: int) -> memoryview:
        return self.view[first * PAGE_SIZE : (first + count) * PAGE_SIZE]

    def zero(self, first: int, count: int) -> None:
        ctypes.memset(self.address + first * PAGE_SIZE, 0, count * PAGE_SIZE)

    def close(self) -> None:
        """Unmap now, or when the last memoryview of it goes. Idempotent."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # a slice is still alive; the mmap object goes with it

    def detach(self) -> None:
        """As `close`, but what was mapped is gone now in any case: late slices are over zeros of nobody's."""
        release(self.view)
        try:
            self._map.close()
        except BufferError:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            result = _libc.mmap(self.address, self.length, protection, flags, -1, 0)
            _check(result, f"covering {self.length} bytes")


def release(view: memoryview) -> None:
    """Makes further use of `view` a ValueError; one that is being read from right now stays valid."""
    try:
        view.release()
    except BufferError:
        pass


def sealed_memfd(name: str, length: int) -> int:
    """A descriptor of `length` zero bytes whose size cannot change. More seals may be added."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        add_seals(fd, F_SEAL_SHRINK | F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


def add_seals(fd: int, seals: int) -> None:
    fcntl.fcntl(fd, _F_ADD_SEALS, seals)


def check_sealed(fd: int, length: int, *, writable: bool) -> None:
    """HypervisorError EINVAL unless `fd` is a memfd of exactly `length` bytes that nobody can resize, and,
    unless `writable`, that nobody can map writable any more.

    A mapping of a file that its peer truncates is a SIGBUS, and a descriptor opened read-only can be opened
    again read-write through /proc: only seals hold.
    """
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError:
        raise HypervisorError("EINVAL", "a descriptor that is no memfd") from None
    wanted = SIZE_SEALS | (0 if writable else F_SEAL_FUTURE_WRITE)
    if seals & wanted != wanted:
        raise HypervisorError("EINVAL", f"an arena with seals {seals:#x}, not {wanted:#x}")
    if size != length:
        raise HypervisorError("EINVAL", f"an arena of {size} bytes, not {length}")


class FreePages:
    """Which pages of one arena are free: first-fit runs, searched at the speed of bytes.find."""

    __slots__ = ("_busy", "free")

    def __init__(self, count: int) -> None:
        self._busy = bytearray(count)
        self.free = count

    @property
    def empty(self) -> bool:
        return self.free == len(self._busy)

    def take(self, count: int) -> int:
        """First page of a run of `count` that is busy from now on, -1 if there is none."""
        first = self._busy.find(bytes(count)) if count <= self.free else -1
        if first >= 0:
            self._busy[first : first + count] = b"\1" * count
            self.free -= count
        return first

    def give(self, page: int) -> None:
        self.free += self._busy[page]
        self._busy[page] = 0
