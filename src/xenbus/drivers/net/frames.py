"""Ethernet frames as far as offloads concern them: where the headers of IPv4, IPv6, TCP and UDP lie, their
checksums, and plain packets in place of what an end cannot take.

Pure: knows bytes and `packet.py`. Nothing here raises for what a frame holds: one that makes no sense has no
layout, and no plain packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from xenbus.drivers.net.packet import ETH_HLEN, Gso, Offloads, Packet

ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
# IEEE 802.1Q and 802.1ad: a tag is four bytes before the type.
_VLAN: Final = frozenset({0x8100, 0x88A8})
_TAGS_MAX: Final = 2

IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
# RFC 8200, 4: headers between IPv6's and the transport's whose second byte is their length.
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS: Final = frozenset({_HOP_BY_HOP, _ROUTING, _AH, _DESTINATION, 135, 139, 140, 253, 254})
_EXTENSIONS_MAX: Final = 16
_SEGMENT_ROUTING: Final = 4  # RFC 8754: the last one to be visited comes first

# By protocol: the least length of its header, and where the checksum is in it.
_TRANSPORT: Final = {IPPROTO_TCP: (20, 16), IPPROTO_UDP: (8, 6)}

_FIN_PSH: Final = 0x09
_CWR: Final = 0x80

_U16: Final = Struct(">H")
_U32: Final = Struct(">I")

# Of one packet: 64 KiB in the least segments that Linux lets a peer ask for (tcp_min_snd_mss, 48 bytes).
# Whoever wants more of them wants our time.
SEGMENTS_MAX: Final = 0xFFFF // 48
# Packets that a batch may have become when the next one of it is to be lowered: nobody keeps as many.
LOWERED_MAX: Final = 1024

Buffer = bytes | bytearray | memoryview


@dataclass(slots=True, frozen=True)
class Layout:
    """Where the headers of a frame begin. Offsets in bytes from the frame's first one.

    version:     4 or 6
    network:     the IP header
    transport:   the TCP or UDP header
    end:         behind the last byte that IP's length counts: shorter frames are padded
    protocol:    IPPROTO_TCP or IPPROTO_UDP
    source, destination: the addresses that the pseudo header has, (first, last + 1) each
    """

    version: int
    network: int
    transport: int
    end: int
    protocol: int
    source: tuple[int, int]
    destination: tuple[int, int]

    @property
    def checksum(self) -> int:
        """Where the transport's checksum is."""
        return self.transport + _TRANSPORT[self.protocol][1]


def network_of(frame: Buffer) -> tuple[int, int]:
    """(type, offset of what follows it), tags passed over; (0, 0) for a frame without that much."""
    at = ETH_HLEN
    for _ in range(_TAGS_MAX + 1):
        if len(frame) < at:
            break
        kind = _U16.unpack_from(frame, at - 2)[0]
        if kind not in _VLAN:
            return kind, at
        at += 4
    return 0, 0


def layout_of(frame: Buffer, *, gso: bool = False) -> Layout | None:
    """Of a whole TCP or UDP packet; None for anything else: other protocols, fragments, headers cut short.

    gso: where IP's length is 0, as Linux leaves it in what is longer than it can say, the frame's own counts
    """
    kind, at = network_of(frame)
    if kind == ETH_P_IP:
        found = _layout_v4(frame, at, gso)
    elif kind == ETH_P_IPV6:
        found = _layout_v6(frame, at, gso)
    else:
        return None
    if found is None or found.protocol not in _TRANSPORT:
        return None
    if found.transport + _TRANSPORT[found.protocol][0] > found.end:
        return None
    return found


def _layout_v4(frame: Buffer, at: int, gso: bool) -> Layout | None:
    if len(frame) < at + 20 or frame[at] >> 4 != 4:
        return None
    header = (frame[at] & 0xF) * 4
    total, fragment = _U16.unpack_from(frame, at + 2)[0], _U16.unpack_from(frame, at + 6)[0]
    if fragment & 0x3FFF or header < 20:  # more to come, or an offset
        return None
    end = len(frame) if gso and not total else at + total
    if end > len(frame) or at + header > end:
        return None
    return Layout(4, at, at + header, end, frame[at + 9], (at + 12, at + 16), (at + 16, at + 20))


def _layout_v6(frame: Buffer, at: int, gso: bool) -> Layout | None:
    if len(frame) < at + 40 or frame[at] >> 4 != 6:
        return None
    length = _U16.unpack_from(frame, at + 4)[0]
    end = len(frame) if gso and not length else at + 40 + length
    if end > len(frame):
        return None
    protocol, here = frame[at + 6], at + 40
    destination = (at + 24, at + 40)
    for _ in range(_EXTENSIONS_MAX):
        if protocol not in _EXTENSIONS:
            return Layout(6, at, here, end, protocol, (at + 8, at + 24), destination)
        if here + 8 > end:
            return None
        length = (frame[here + 1] + 2) * 4 if protocol == _AH else (frame[here + 1] + 1) * 8
        if here + length > end:
            return None
        if protocol == _ROUTING:
            destination = _final_destination(frame, here, length) or destination
        protocol, here = frame[here], here + length
    return None


def _final_destination(frame: Buffer, at: int, length: int) -> tuple[int, int] | None:
    """Where the address is that the pseudo header has (RFC 8200, 8.1), if the packet has to go on to it."""
    kind, left = frame[at + 2], frame[at + 3]
    if not left or length < 24:
        return None
    first = at + 8 if kind == _SEGMENT_ROUTING else at + length - 16
    return first, first + 16


def checksum_at(frame: Buffer, *, gso: bool = False) -> tuple[int, int, int] | None:
    """(IP's version, offset of the transport's header, where in that the checksum is), as `layout_of` has it.

    The headers that nearly every packet has are looked at in the short way, their lengths not at all.
    """
    size = len(frame)
    if size >= 34 and frame[12] == 8 and not frame[13] and frame[14] == 0x45:
        version, start, protocol = 4, 34, 0 if frame[20] & 0x3F or frame[21] else frame[23]
    elif size >= 54 and frame[12] == 0x86 and frame[13] == 0xDD:
        version, start, protocol = 6, 54, frame[20]
    else:
        version = start = protocol = 0
    if protocol in _TRANSPORT:
        least, offset = _TRANSPORT[protocol]
        if size >= start + least:
            return version, start, offset
    layout = layout_of(frame, gso=gso)
    if layout is None:
        return None
    return layout.version, layout.transport, layout.checksum - layout.transport


# -- checksums


def ones_sum(data: Buffer) -> int:
    """The sum of 16-bit words in ones' complement, modulo 65535: 0 stands for 0xFFFF, too (RFC 1071).

    As one long number: its digits to the base 65536 have the same sum modulo 65535 as the number itself.
    """
    total = int.from_bytes(data, "big") % 0xFFFF
    return (total << 8) % 0xFFFF if len(data) & 1 else total


def _complement(total: int) -> int:
    """Of a sum that is not of zeros alone, as every one with a header in it."""
    return (0xFFFF - total % 0xFFFF) % 0xFFFF


def _pseudo_sum(frame: Buffer, layout: Layout, length: int) -> int:
    view = memoryview(frame)
    addresses = ones_sum(view[slice(*layout.source)]) + ones_sum(view[slice(*layout.destination)])
    return (addresses + layout.protocol + (length >> 16) + (length & 0xFFFF)) % 0xFFFF


def _length(frame: Buffer, layout: Layout) -> int:
    """Of the transport's packet. UDP says its own, which may be less than IP's; 0 with jumbograms."""
    length = layout.end - layout.transport
    if layout.protocol == IPPROTO_UDP:
        said: int = _U16.unpack_from(frame, layout.transport + 4)[0]
        return said if 8 <= said <= length else length
    return length


def is_valid(frame: Buffer) -> bool | None:
    """Whether the TCP or UDP checksum is right; None if the frame has none that could be checked."""
    layout = layout_of(frame)
    if layout is None:
        return None
    if layout.protocol == IPPROTO_UDP and not any(frame[layout.checksum : layout.checksum + 2]):
        return None if layout.version == 4 else False  # RFC 768: none was made; RFC 8200: it has to be
    length = _length(frame, layout)
    data = memoryview(frame)[layout.transport : layout.transport + length]
    return (_pseudo_sum(frame, layout, length) + ones_sum(data)) % 0xFFFF == 0


def complete(frame: bytearray, layout: Layout) -> None:
    """Write the whole checksum, whatever was in its field. IP's own header is not touched."""
    at = layout.checksum
    frame[at : at + 2] = b"\0\0"
    length = _length(frame, layout)
    with memoryview(frame) as view:
        data = ones_sum(view[layout.transport : layout.transport + length])
    value = _complement(_pseudo_sum(frame, layout, length) + data)
    if not value and layout.protocol == IPPROTO_UDP:
        value = 0xFFFF  # the same number; 0 would say that there is no checksum
    _U16.pack_into(frame, at, value)


def blank(frame: bytearray, layout: Layout) -> None:
    """Write the sum of the pseudo header alone, as `csum_blank` says."""
    _U16.pack_into(frame, layout.checksum, blank_value(frame, layout))


def blank_value(frame: Buffer, layout: Layout) -> int:
    """What a blank checksum's field holds. Never 0: the protocol alone makes it more."""
    return _pseudo_sum(frame, layout, _length(frame, layout)) or 0xFFFF


# -- plain packets


def lower(packet: Packet, offloads: Offloads) -> Sequence[Packet]:
    """What an end that takes `offloads` gets in place of `packet`: itself, it with its checksum completed, or
    the segments of a GSO packet. Nothing for one whose headers are not what it claims: drop it, and count."""
    if packet.gso is not Gso.NONE:
        taken = offloads.tso4 if packet.gso is Gso.TCPV4 else offloads.tso6
        return (packet,) if taken else _segments(packet, offloads)
    if not packet.csum_blank:
        return (packet,)
    kind, _ = network_of(packet.data)
    if (kind == ETH_P_IP and offloads.csum) or (kind == ETH_P_IPV6 and offloads.csum6):
        return (packet,)
    layout = layout_of(packet.data)
    if layout is None:
        return ()
    frame = bytearray(packet.data)
    complete(frame, layout)
    return (Packet(frame, data_validated=True),)


@dataclass(slots=True)
class Lowered:
    """packets: plain ones; wrong: how many were not what they claimed; left: how many were not looked at"""

    packets: Sequence[Packet]
    wrong: int = 0
    left: int = 0


def lower_all(packets: Sequence[Packet], offloads: Offloads) -> Lowered:
    """`lower` for a batch, as long as it has made no more than LOWERED_MAX of it."""
    if not any(packet.csum_blank or packet.gso for packet in packets):
        return Lowered(packets)
    found: list[Packet] = []
    wrong = 0
    for done, packet in enumerate(packets):
        if len(found) > LOWERED_MAX:
            return Lowered(found, wrong, len(packets) - done)
        plain = lower(packet, offloads)
        wrong += not plain
        found += plain
    return Lowered(found, wrong)


def segments_of(packet: Packet) -> int:
    """How many packets it stands for."""
    return -(-len(packet.data) // packet.gso_size) if packet.gso_size > 0 else 1


def _segments(packet: Packet, offloads: Offloads) -> list[Packet]:
    layout = layout_of(packet.data, gso=True)
    if layout is None or layout.protocol != IPPROTO_TCP or packet.gso_size <= 0:
        return []
    if segments_of(packet) > SEGMENTS_MAX:
        return []
    if layout.version != (4 if packet.gso is Gso.TCPV4 else 6):
        return []
    stays_blank = offloads.csum if layout.version == 4 else offloads.csum6
    return [
        Packet(frame, csum_blank=stays_blank, data_validated=True)
        for frame in segment(packet.data, layout, packet.gso_size, blank_checksum=stays_blank)
    ]


def segment(data: Buffer, layout: Layout, size: int, *, blank_checksum: bool = False) -> list[bytearray]:
    """The TCP packets of at most `size` bytes of payload that a long one stands for, checksums included.

    As a network card does it: sequence numbers and IPv4's identification go on, FIN and PSH are the last
    one's, CWR the first one's (RFC 3168, 6.1.2). [] if the headers are cut short.
    """
    header = (data[layout.transport + 12] >> 4) * 4
    start = layout.transport + header
    if header < 20 or start > layout.end:
        return []
    view = memoryview(data)
    head = bytes(view[:start])
    sequence: int = _U32.unpack_from(head, layout.transport + 4)[0]
    flags = head[layout.transport + 13]
    identification: int = _U16.unpack_from(head, layout.network + 4)[0]
    made = []
    for index, at in enumerate(range(start, layout.end, size) if layout.end > start else (start,)):
        frame = bytearray(head)
        frame += view[at : min(at + size, layout.end)]
        whole = Layout(
            layout.version,
            layout.network,
            layout.transport,
            len(frame),
            layout.protocol,
            layout.source,
            layout.destination,
        )
        last = at + size >= layout.end
        keep = 0xFF if last else 0xFF & ~_FIN_PSH
        frame[layout.transport + 13] = flags & (keep if index == 0 else keep & ~_CWR)
        _U32.pack_into(frame, layout.transport + 4, (sequence + at - start) & 0xFFFFFFFF)
        _set_length(frame, whole, identification + index)
        (blank if blank_checksum else complete)(frame, whole)
        made.append(frame)
    return made


def _set_length(frame: bytearray, layout: Layout, identification: int) -> None:
    """IP's length, and what of IPv4's header depends on it."""
    at, length = layout.network, layout.end - layout.network
    if layout.version == 6:
        _U16.pack_into(frame, at + 4, length - 40)
        return
    _U16.pack_into(frame, at + 2, length)
    _U16.pack_into(frame, at + 4, identification & 0xFFFF)
    frame[at + 10 : at + 12] = b"\0\0"
    _U16.pack_into(frame, at + 10, _complement(ones_sum(frame[at : layout.transport])))
