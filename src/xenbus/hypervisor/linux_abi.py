"""The numbers and layouts of /dev/xen/{gntdev,gntalloc,evtchn}, and an ioctl that speaks HypervisorError.

From include/uapi/xen/{gntdev,gntalloc,evtchn}.h of Linux. Every request is _IOC(_IOC_NONE, type, nr, size):
the size is the C struct's, with its tail padding. Knows nothing of handles.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from xenbus.errors import HypervisorError

GNTDEV: Final = "/dev/xen/gntdev"
GNTALLOC: Final = "/dev/xen/gntalloc"
EVTCHN: Final = "/dev/xen/evtchn"


def _ioc(kind: str, number: int, size: int) -> int:
    return size << 16 | ord(kind) << 8 | number


# struct ioctl_gntdev_map_grant_ref: count, pad, index out; then a domid and a ref for each page.
MAP_GRANT: Final = struct.Struct("=IIQ")
MAP_GRANT_REF: Final = struct.Struct("=II")
IOCTL_GNTDEV_MAP_GRANT_REF: Final = _ioc("G", 0, MAP_GRANT.size + MAP_GRANT_REF.size)
# struct ioctl_gntdev_unmap_grant_ref: index, count, pad.
UNMAP_GRANT: Final = struct.Struct("=QII")
IOCTL_GNTDEV_UNMAP_GRANT_REF: Final = _ioc("G", 1, UNMAP_GRANT.size)
# struct ioctl_gntdev_unmap_notify, and gntalloc's twin: index of a byte, actions, port.
UNMAP_NOTIFY: Final = struct.Struct("=QII")
IOCTL_SET_UNMAP_NOTIFY: Final = _ioc("G", 7, UNMAP_NOTIFY.size)
UNMAP_NOTIFY_CLEAR_BYTE: Final = 1
UNMAP_NOTIFY_SEND_EVENT: Final = 2
# struct ioctl_gntdev_grant_copy: count, pointer to the segments.
GRANT_COPY: Final = struct.Struct("=I4xQ")
IOCTL_GNTDEV_GRANT_COPY: Final = _ioc("G", 8, GRANT_COPY.size)
# struct gntdev_grant_copy_segment: two unions of 8 bytes, source and dest, each an address or a foreign page;
# then length, flags, status.
COPY_LOCAL: Final = struct.Struct("=Q")
COPY_FOREIGN: Final = struct.Struct("=IHH")  # ref, offset, domid
# The same in one: from a foreign page to an address, and from an address to a foreign page.
COPY_IN: Final = struct.Struct("=IHHQHHh2x")
COPY_OUT: Final = struct.Struct("=QIHHHHh2x")
COPY_TAIL: Final = struct.Struct("=HHh2x")
COPY_DEST: Final = 8
COPY_END: Final = 16
COPY_STATUS: Final = 20  # where the status is, of two bytes
COPY_SEGMENT_SIZE: Final = 24
GNTCOPY_source_gref: Final = 1
GNTCOPY_dest_gref: Final = 2

# struct ioctl_gntalloc_alloc_gref: domid, flags, count, index out; then a ref out for each page.
ALLOC_GREF: Final = struct.Struct("=HHIQ")
IOCTL_GNTALLOC_ALLOC_GREF: Final = _ioc("G", 5, 24)
GNTALLOC_FLAG_WRITABLE: Final = 1
# struct ioctl_gntalloc_dealloc_gref: index, count.
DEALLOC_GREF: Final = struct.Struct("=QI4x")
IOCTL_GNTALLOC_DEALLOC_GREF: Final = _ioc("G", 6, DEALLOC_GREF.size)

PORT: Final = struct.Struct("=I")
BIND_INTERDOMAIN: Final = struct.Struct("=II")
IOCTL_EVTCHN_BIND_INTERDOMAIN: Final = _ioc("E", 1, BIND_INTERDOMAIN.size)
IOCTL_EVTCHN_BIND_UNBOUND_PORT: Final = _ioc("E", 2, PORT.size)
IOCTL_EVTCHN_UNBIND: Final = _ioc("E", 3, PORT.size)
IOCTL_EVTCHN_NOTIFY: Final = _ioc("E", 4, PORT.size)


def error_of(error: OSError, what: str) -> HypervisorError:
    return HypervisorError(errno.errorcode.get(error.errno or 0, "EIO"), what)


def open_device(path: str, *, nonblocking: bool = False) -> int:
    """HypervisorError with what open(2) says: ENOENT where the kernel's module is not loaded, EACCES, ..."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0))
    except OSError as error:
        raise error_of(error, path) from None


def call(fd: int, request: int, argument: bytearray | bytes, what: str) -> int:
    """ioctl(2); a bytearray is written back to. Answers the return value: a port, for the BIND calls."""
    try:
        return (
            fcntl.ioctl(fd, request, argument)
            if isinstance(argument, bytearray)
            else _in(fd, request, argument)
        )
    except OSError as error:
        raise error_of(error, what) from None


def _in(fd: int, request: int, argument: bytes) -> int:
    fcntl.ioctl(fd, request, argument)
    return 0
