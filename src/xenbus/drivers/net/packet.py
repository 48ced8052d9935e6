"""What crosses between a net driver and its far side: packets, what each end can take, and the two ends.

Types alone. Knows no ring, no store, no socket. An end is xn, xnb, or a Port: a TAP device, a switch's port,
the packet interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

ETH_HLEN: Final = 14
ETH_DATA_LEN: Final = 1500
VLAN_HLEN: Final = 4
# The longest frame that there is, GSO ones included: XEN_NETIF_MAX_TX_SIZE, which counts the header, too.
MAX_FRAME: Final = 0xFFFF
# MTUs that a device may have: IPv4's least, and what fits into the longest frame behind an untagged header.
MIN_MTU: Final = 68
MAX_MTU: Final = MAX_FRAME - ETH_HLEN


class Gso(IntEnum):
    """XEN_NETIF_GSO_TYPE_* of xen/include/public/io/netif.h."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 2


@dataclass(slots=True)
class Packet:
    """One Ethernet frame, without its FCS.

    data:           bytes-like, contiguous. It is its sender's: valid, and unchanged, until the call that
                    handed it over returns. Whoever keeps it longer takes a copy (`bytes(packet.data)`).
    csum_blank:     the TCP or UDP checksum field holds the sum of the pseudo header alone (not complemented)
    data_validated: the checksum is right, or (with csum_blank) the data never left this machine
    gso:            a TCP packet longer than the MTU, to be cut into segments; csum_blank goes with it
    gso_size:       bytes of TCP payload in a segment (the MSS); 0 with Gso.NONE
    """

    data: bytes | bytearray | memoryview
    csum_blank: bool = False
    data_validated: bool = False
    gso: Gso = Gso.NONE
    gso_size: int = 0


@dataclass(slots=True, frozen=True)
class Offloads:
    """What an end takes besides plain packets. Nobody sends an end more than that: the sender makes plain
    packets of the others (`frames.lower(packet, offloads)`).

    csum, csum6: csum_blank of TCP and UDP over IPv4, IPv6
    tso4, tso6:  Gso.TCPV4, Gso.TCPV6 (only together with csum, csum6)
    """

    csum: bool = False
    csum6: bool = False
    tso4: bool = False
    tso6: bool = False


PLAIN: Final = Offloads()
ALL: Final = Offloads(csum=True, csum6=True, tso4=True, tso6=True)


@dataclass(slots=True, frozen=True)
class Link:
    """What an end says of itself as long as its link is up.

    offloads: what it takes of `send`
    mtu:      bytes of payload behind the Ethernet header, of what is not GSO
    mac:      the guest's address, six bytes; None where it is not known
    """

    offloads: Offloads = PLAIN
    mtu: int = ETH_DATA_LEN
    mac: bytes | None = None


class End(Protocol):
    """One end of the cable, as the other one sees it. Everything here is synchronous, runs in the loop's
    thread and never raises: a packet that an end cannot use it drops, and counts."""

    def send(self, packets: Sequence[Packet]) -> int:
        """Take packets, the first ones first. Returns how many were taken; those that were dropped count.

        Fewer than given: there is no room. The rest stays the caller's, who sends nothing before `ready`.
        """
        ...

    def ready(self) -> None:
        """The other end took fewer packets than it was given, and has room again: send, now or later."""
        ...

    def link(self, link: Link | None) -> None:
        """The other end's link is up, or is another one now; None: it is down, and takes nothing."""
        ...


class Port(End, Protocol):
    """The far side of a net driver. Opened by `open_port`; starts with its link down until it says otherwise.

    name:    for messages, sysctl and the tree: "tap vif1.0", "switch lan"
    """

    @property
    def name(self) -> str: ...

    def counters(self) -> dict[str, int]:
        """What it counted, by the names of `ip -s link`: shown below the driver's own in sysctl."""
        ...

    def start(self, driver: End) -> None:
        """Once, before any other call: the driver's end. The port may call it from here on."""
        ...

    async def close(self, *, leave: bool = False) -> None:
        """Give everything back. Nothing is called afterwards. Idempotent.

        leave: another process goes on and opens the same target; what it is to find stays
        """
        ...
