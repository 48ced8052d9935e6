"""Files that a driver writes what guests say into, named by an operator: a capture, a console's log.

Knows descriptors. Opening one never waits, whatever is at that path; and one file has one writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

# What file systems answer that have no locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def open_for_writing(path: Path, *, truncate: bool = False) -> int:
    """A descriptor of a regular file that is there or made, mode 0600; not through a link.

    truncate: empty it, otherwise append. OSError, which for what is no file, and for a file that another
    device writes, says so.
    """
    # O_NONBLOCK: a FIFO that nobody reads would hold up every device of the process.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | (0 if truncate else os.O_APPEND), 0o600)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise _no_file() from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a device would be renamed when a log is rotated
            raise _no_file()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another device writes this file") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if truncate:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _no_file() -> OSError:
    return OSError(errno.EINVAL, "that is no file, but a pipe, a socket or a device")
