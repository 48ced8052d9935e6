"""fallocate(2) with its modes, which the os module lacks, by ctypes; and whether a file can punch holes.

Knows file descriptors. Knows nothing of disks.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)


@functools.cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    import ctypes  # here: 10 ms that only a disk with discard pays

    libc = ctypes.CDLL(None, use_errno=True)
    # glibc's 64-bit name on 32-bit machines; musl's fallocate always takes 64 bits.
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return 0 if function(fd, mode, offset, length) == 0 else ctypes.get_errno()

    return call


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Blocks. Raises OSError."""
    call = _libc_fallocate()
    number = errno.EINTR
    while number == errno.EINTR:
        number = call(fd, mode, offset, length)
    if number:
        raise OSError(number, os.strerror(number))


def can_punch(fd: int) -> bool:
    """Whether PUNCH_HOLE works on this writable file or device; nothing is changed by asking."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        return _device_discards(info.st_rdev)
    try:
        # A hole wholly after the end of the file: refused where there are no holes, otherwise nothing.
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, -(-info.st_size // 4096) * 4096 + 4096, 4096)
    except OSError:
        return False
    return True


def _device_discards(rdev: int) -> bool:
    """The kernel's word in sysfs; a partition's queue is its parent's."""
    device = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    for queue in (device / "queue", device / ".." / "queue"):
        try:
            return int((queue / "discard_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False
