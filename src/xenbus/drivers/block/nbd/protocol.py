"""The NBD protocol's numbers and layouts (newstyle fixed), each as it is in doc/proto.md of the nbd project.

Pure: bytes to values and back. Knows no socket and no disk.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from xenbus.errors import PeerError

DEFAULT_PORT = 10809
NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

LENGTH_MAX = 32 << 20  # bytes of one read or write: what every server takes without having said so
NAME_MAX = 4096  # bytes of an export's name
OPTION_MAX = 64 << 10  # bytes of one option's data, either way

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_INFO = struct.Struct(">HQH")
BLOCK_SIZE_INFO = struct.Struct(">HIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
STRUCTURED_REPLY = struct.Struct(">IHHQI")

FIXED_NEWSTYLE = 1  # handshake flags, the same bits from server and client
NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags: what the export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2


class Chunk(IntEnum):
    """Types of structured reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_DONE = 1
CHUNK_ERROR_BIT = 0x8000

# The errors that may be sent; the numbers are the protocol's own and happen to be Linux's.
ERRORS: dict[str, int] = {
    "EPERM": 1,
    "EIO": 5,
    "ENOMEM": 12,
    "EINVAL": 22,
    "ENOSPC": 28,
    "EOVERFLOW": 75,
    "EOPNOTSUPP": 95,
    "ESHUTDOWN": 108,
}
_NAMES = {number: name for name, number in ERRORS.items()}
_NAMES[30] = "EROFS"  # not in the list of proto.md, but some servers send it


class NbdError(PeerError):
    """The other end broke the NBD protocol, or its handshake refused us."""


@dataclass(slots=True)
class Export:
    """What the handshake says of an export. Sizes in bytes; `block_max` bounds one read or write."""

    name: str
    size: int
    flags: Flag
    block_min: int = 1
    block_preferred: int = 4096
    block_max: int = LENGTH_MAX
    description: str = ""


def error_name(number: int) -> str:
    """The errno name for an error from the wire; what is not in the protocol is taken as EIO."""
    return _NAMES.get(number, "EIO")


def error_number(name: str) -> int:
    """The number that may be sent for an errno name; EROFS is EPERM, anything unknown EIO."""
    if name in ("EROFS", "EACCES"):
        return ERRORS["EPERM"]
    return ERRORS.get(name, errno.EIO)


def check_name(raw: bytes) -> str:
    """An export's name from the wire. Raises NbdError."""
    if len(raw) > NAME_MAX:
        raise NbdError(f"NBD: an export name of {len(raw)} bytes (at most {NAME_MAX})")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise NbdError("NBD: an export name that is no UTF-8") from None
