"""The block interface of xen/include/public/io/blkif.h: layouts for both x86 ABIs, constants, vdev numbers.

Knows bytes alone: no ring, no store, no device. Every sector number and
count here is in units of 512 bytes, whatever `sector-size` says (the current header; Xen 4.17's says
otherwise, and corrupts data).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from enum import IntEnum
from struct import Struct
from typing import Final

from xenbus.errors import PeerError, UsageError

SECTOR_SHIFT: Final = 9
SECTOR_SIZE: Final = 1 << SECTOR_SHIFT
PAGE_SIZE: Final = 4096
SECTORS_PER_PAGE: Final = PAGE_SIZE >> SECTOR_SHIFT

BLKIF_MAX_SEGMENTS_PER_REQUEST: Final = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST: Final = 8
SEGMENT_SIZE: Final = 8
SEGMENTS_PER_INDIRECT_PAGE: Final = PAGE_SIZE // SEGMENT_SIZE
BLKIF_DISCARD_SECURE: Final = 1

BLKIF_RSP_OKAY: Final = 0
BLKIF_RSP_ERROR: Final = -1
BLKIF_RSP_EOPNOTSUPP: Final = -2

VDISK_CDROM: Final = 0x1
VDISK_REMOVABLE: Final = 0x2
VDISK_READONLY: Final = 0x4


class Op(IntEnum):
    """BLKIF_OP_*. 4 is set aside and is nobody's."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH_DISKCACHE = 3
    DISCARD = 5
    INDIRECT = 6


# One segment as a 64-bit word: gref, then first_sect and last_sect, then 16 bits of padding nobody cleared.
# A run of whole pages with consecutive grefs is then a run of consecutive words.
SEGMENT: Final = Struct("<IBBxx")
SEGMENT_WORD_MASK: Final = (1 << 48) - 1
WHOLE_PAGE: Final = (SECTORS_PER_PAGE - 1) << 40


def segment_word(gref: int, first_sect: int = 0, last_sect: int = SECTORS_PER_PAGE - 1) -> int:
    """One blkif_request_segment as a little-endian 64-bit word."""
    return gref | first_sect << 32 | last_sect << 40


@dataclass(frozen=True, slots=True)
class Abi:
    """Where things are in a slot: it differs by how the compiler aligns a 64-bit member.

    name:          what the front writes to `protocol` (io/protocols.h)
    rw:            operation, nr_segments, handle, id, sector_number; the segments follow at `segments_at`
    discard:       operation, flag, handle, id, sector_number, nr_sectors
    indirect:      operation, indirect_op, nr_segments, id, sector_number, handle, indirect_grefs[8]
    head:          operation, nr_segments, id: what every request begins with
    response:      id, operation, status
    request_size:  sizeof(struct blkif_request), which is a slot's; response_size likewise, both in bytes
    id_at:         where in a request its id is (in a response it comes first)
    words:         by count: the segments of a rw request as 64-bit words
    one:           rw with its first segment's word: most requests are one page
    request_slots, response_slots: `one` and `response` padded to a slot, for `iter_unpack`
    """

    name: str
    head: Struct
    rw: Struct
    segments_at: int
    discard: Struct
    indirect: Struct
    response: Struct
    request_size: int
    response_size: int
    one: Struct
    request_slots: Struct
    response_slots: Struct
    id_at: int
    words: tuple[Struct, ...] = field(
        default=tuple(Struct(f"<{n}Q") for n in range(BLKIF_MAX_SEGMENTS_PER_REQUEST + 1)), repr=False
    )


X86_64: Final = Abi(
    name="x86_64-abi",
    head=Struct("<BB6xQ"),
    rw=Struct("<BBH4xQQ"),
    segments_at=24,
    discard=Struct("<BBH4xQQQ"),
    indirect=Struct("<BBH4xQQH2x8I"),
    response=Struct("<QBxh4x"),
    request_size=112,
    response_size=16,
    one=Struct("<BBH4xQQQ"),
    request_slots=Struct("<BBH4xQQQ80x"),
    response_slots=Struct("<QBxh100x"),
    id_at=8,
)
X86_32: Final = Abi(
    name="x86_32-abi",
    head=Struct("<BB2xQ"),
    rw=Struct("<BBHQQ"),
    segments_at=20,
    discard=Struct("<BBHQQQ"),
    indirect=Struct("<BBHQQH2x8I"),
    response=Struct("<QBxh"),
    request_size=108,
    response_size=12,
    one=Struct("<BBHQQQ"),
    request_slots=Struct("<BBHQQQ80x"),
    response_slots=Struct("<QBxh96x"),
    id_at=4,
)
# Both ARM ABIs align 64-bit members as x86_64 does.
ARM: Final = replace(X86_64, name="arm-abi")
ABIS: Final = {abi.name: abi for abi in (X86_64, X86_32, ARM)}
NATIVE: Final = {"aarch64": ARM, "armv7l": ARM, "i686": X86_32, "i386": X86_32}.get(
    os.uname().machine, X86_64
)


def abi_of(protocol: str) -> Abi:
    """The ABI that a front named in `protocol`; "" is the native one. PeerError for a name that is none."""
    if not protocol:
        return NATIVE
    try:
        return ABIS[protocol]
    except KeyError:
        raise PeerError(f"protocol {protocol!r}: none of {', '.join(ABIS)}") from None


def indirect_pages(segments: int) -> int:
    """Pages of descriptors that a request of so many segments needs."""
    return -(-segments // SEGMENTS_PER_INDIRECT_PAGE)


# docs/man/xen-vbd-interface.7: (name, number's upper part, shift of the disk, first disk, disks, partitions).
_VDEV_RANGES: Final = (
    ("xvd", 202 << 8, 4, 0, 16, 16),
    ("sd", 8 << 8, 4, 0, 16, 16),
    ("hd", 3 << 8, 6, 0, 2, 64),
    ("hd", 22 << 8, 6, 2, 2, 64),
    ("xvd", 1 << 28, 8, 0, 1 << 20, 256),
)
_NAME: Final = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?")
_DISK: Final = re.compile(r"d(0|[1-9][0-9]{0,6})(?:p(0|[1-9][0-9]{0,2}))?")


def vdev_parts(vdev: int) -> tuple[str, int, int]:
    """A `virtual-device` number as ("xvd" | "sd" | "hd", disk, partition). UsageError."""
    for prefix, base, shift, first, disks, partitions in _VDEV_RANGES:
        disk, partition = divmod(vdev - base, 1 << shift)
        if 0 <= disk < disks and partition < partitions:
            return prefix, first + disk, partition
    raise UsageError(f"virtual device {vdev}: in none of the ranges of xen-vbd-interface(7)")


def vdev_name(vdev: int) -> str:
    """51712 -> "xvda", 51713 -> "xvda1", 768 -> "hda". UsageError."""
    prefix, disk, partition = vdev_parts(vdev)
    letters = ""
    disk += 1
    while disk:
        disk, letter = divmod(disk - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return prefix + letters + (str(partition) if partition else "")


def vdev_number(name: str) -> int:
    """ "xvda", "sda1", "hdc", "d0p1", or a number as text -> the number for `virtual-device`. UsageError."""
    if match := _NAME.fullmatch(name):
        prefix, letters, part = match.groups()
        disk = 0
        for letter in letters:
            disk = disk * 26 + ord(letter) - ord("a") + 1
        return _number(name, prefix, disk - 1, int(part or 0))
    if match := _DISK.fullmatch(name):
        return _number(name, "xvd", int(match[1]), int(match[2] or 0))
    try:
        vdev = int(name, 0) if name.isascii() and name.isalnum() else -1
    except ValueError:
        vdev = -1
    if not 0 <= vdev < 2 << 28:
        raise UsageError(f"no such virtual device: {name!r} (xvda, xvdb1, sda, hda, d0p1, 51712)")
    return vdev


def _number(name: str, prefix: str, disk: int, partition: int) -> int:
    for candidate, base, shift, first, disks, partitions in _VDEV_RANGES:
        if candidate == prefix and 0 <= disk - first < disks and partition < partitions:
            return base | (disk - first) << shift | partition
    raise UsageError(f"virtual device {name!r}: no number for disk {disk}, partition {partition}")


def vdev_unit(vdev: int) -> int:
    """The unit that a front asks for, as FreeBSD's blkfront_vdevice_to_unit: the disk's number."""
    return vdev_parts(vdev)[1]
