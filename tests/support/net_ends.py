"""The driver's end of a far side, played; and frames by the letters that tests name stations with."""

from __future__ import annotations

from collections.abc import Sequence

from xenbus.drivers.net.packet import PLAIN, Link, Offloads, Packet

BROADCAST = b"\xff" * 6


def station(number: int) -> bytes:
    """A MAC of Xen's."""
    return b"\x00\x16\x3e" + number.to_bytes(3, "big")


def frame(destination: bytes, source: bytes, payload: bytes = b"x" * 46, kind: int = 0x88B5) -> bytes:
    return destination + source + kind.to_bytes(2, "big") + payload


class Sink:
    """Takes packets as long as there is room; `got` are copies of them, `links` what the port said."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.got: list[Packet] = []
        self.links: list[Link | None] = []
        self.batches: list[int] = []
        self.readied = 0

    def send(self, packets: Sequence[Packet]) -> int:
        taken = min(self.room, len(packets))
        self.room -= taken
        self.batches.append(taken)
        for packet in packets[:taken]:
            self.got.append(
                Packet(
                    bytes(packet.data), packet.csum_blank, packet.data_validated, packet.gso, packet.gso_size
                )
            )
        return taken

    def ready(self) -> None:
        self.readied += 1

    def link(self, link: Link | None) -> None:
        self.links.append(link)

    @property
    def frames(self) -> list[bytes]:
        return [bytes(packet.data) for packet in self.got]


def up(offloads: Offloads = PLAIN, mtu: int = 1500, mac: bytes | None = None) -> Link:
    return Link(offloads, mtu, mac)
