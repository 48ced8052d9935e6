"""A GSO packet whose sender did not leave its checksum blank, as old netfronts send them: put right.

Knows packets and frames.
"""

from __future__ import annotations

from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.frames import blank, layout_of
from xenbus.drivers.net.packet import Packet


def with_blank_checksum(packet: Packet, counters: Counters) -> Packet | None:
    """None, and counted, if it is no TCP packet."""
    data = bytearray(packet.data)
    layout = layout_of(data, gso=True)
    if layout is None:
        counters.bad_rx("frame", "a GSO packet that is no TCP")
        return None
    blank(data, layout)
    counters.rx_gso_checksum_fixup += 1
    return Packet(data, True, packet.data_validated, packet.gso, packet.gso_size)
