"""The network interface of xen/include/public/io/netif.h: layouts, flags, constants, the names of its keys.

Knows bytes alone, and texts as the store has them: no ring, no store, no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from xenbus.drivers.net.packet import Gso
from xenbus.drivers.net.ports.mac import mac_text
from xenbus.errors import PeerError

PAGE_SIZE: Final = 4096
# Slots of data that each end has to take in one packet.
NR_SLOTS_MIN: Final = 18

TX_SLOT_SIZE: Final = 12
RX_SLOT_SIZE: Final = 8
EXTRA_SIZE: Final = 8

TX_REQUEST: Final = Struct("<IHHHH")  # gref, offset, flags, id, size
TX_RESPONSE: Final = Struct("<Hh8x")  # id, status; a whole slot
RX_REQUEST: Final = Struct("<H2xI")  # id, gref
RX_RESPONSE: Final = Struct("<HHHh")  # id, offset, flags, status
# struct netif_extra_info: type, flags, then gso (size, type, pad, features) or an address.
EXTRA_GSO: Final = Struct("<BBHBxH")
EXTRA_MCAST: Final = Struct("<BB6s")

# NETTXF_*
TX_CSUM_BLANK: Final = 1
TX_DATA_VALIDATED: Final = 2
TX_MORE_DATA: Final = 4
TX_EXTRA_INFO: Final = 8
# NETRXF_*: the first two are the other way round.
RX_DATA_VALIDATED: Final = 1
RX_CSUM_BLANK: Final = 2
RX_MORE_DATA: Final = 4
RX_EXTRA_INFO: Final = 8

EXTRA_TYPE_GSO: Final = 1
EXTRA_TYPE_MCAST_ADD: Final = 2
EXTRA_TYPE_MCAST_DEL: Final = 3
EXTRA_TYPE_MAX: Final = 5
EXTRA_FLAG_MORE: Final = 1
# One of each type in a packet is all that makes sense.
EXTRAS_MAX: Final = EXTRA_TYPE_MAX - 1

NETIF_RSP_DROPPED: Final = -2
NETIF_RSP_ERROR: Final = -1
NETIF_RSP_OKAY: Final = 0
NETIF_RSP_NULL: Final = 1

MAX_QUEUES: Final = 16

# Keys of either half (see docs/net.md for who writes which).
MAX_QUEUES_KEY: Final = "multi-queue-max-queues"
NUM_QUEUES_KEY: Final = "multi-queue-num-queues"
RX_COPY_KEY: Final = "request-rx-copy"
MULTICAST_KEY: Final = "request-multicast-control"
# Ours: the far side, a target of `open_port`.
PORT_KEY: Final = "xenbus-port"

BROADCAST: Final = b"\xff" * 6


class BadPacket(PeerError):
    """The peer sent what is no packet. It is dropped and counted; others go on. kind: of which counter."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(slots=True, frozen=True)
class Extra:
    """One netif_extra_info. gso_size: of EXTRA_TYPE_GSO; address: of EXTRA_TYPE_MCAST_*"""

    kind: int
    gso: Gso = Gso.NONE
    gso_size: int = 0
    address: bytes = b""


def gso_extra(gso: int, gso_size: int) -> bytes:
    """The extra info of a packet to be segmented. gso: a Gso"""
    return EXTRA_GSO.pack(EXTRA_TYPE_GSO, 0, gso_size, gso, 0)


def multicast_extra(address: bytes, *, add: bool) -> bytes:
    """Put a group into the back end's filter, or take it out."""
    return EXTRA_MCAST.pack(EXTRA_TYPE_MCAST_ADD if add else EXTRA_TYPE_MCAST_DEL, 0, address)


def parse_extra(raw: bytes) -> Extra:
    """The first EXTRA_SIZE bytes of a slot. BadPacket for what is no extra info; its MORE is `extra_more`."""
    kind = raw[0]
    if kind == EXTRA_TYPE_GSO:
        _, _, size, number, _ = EXTRA_GSO.unpack_from(raw)
        if number not in (Gso.TCPV4, Gso.TCPV6):
            raise BadPacket("frame", f"GSO type {number}: neither TCPv4 (1) nor TCPv6 (2)")
        if not size:
            raise BadPacket("frame", "GSO with segments of 0 bytes")
        return Extra(kind, Gso(number), size)
    if kind in (EXTRA_TYPE_MCAST_ADD, EXTRA_TYPE_MCAST_DEL):
        address = EXTRA_MCAST.unpack_from(raw)[2]
        if not address[0] & 1:
            raise BadPacket("frame", f"{mac_text(address)} is no multicast group")
        return Extra(kind, address=address)
    raise BadPacket("frame", f"extra info of type {kind}, which nobody asked for")


def extra_more(raw: bytes) -> bool:
    """Whether another extra info follows this one."""
    return bool(raw[1] & EXTRA_FLAG_MORE)


def data_slots(size: int) -> int:
    """Pages that so many bytes take."""
    return -(-size // PAGE_SIZE)
