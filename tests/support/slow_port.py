"""A far side that takes so many packets and no more, until it is told to go on. No test here."""

from __future__ import annotations

from collections.abc import Sequence

from xenbus.drivers.net.packet import ALL, End, Link, Packet
from xenbus.drivers.net.ports import Target, port_scheme


class SlowPort:
    """room: how many it takes; got: their bytes"""

    name = "slow"

    def __init__(self) -> None:
        self.room = 0
        self.got: list[bytes] = []
        self.driver: End | None = None
        self.peer: Link | None = None

    def counters(self) -> dict[str, int]:
        return {}

    def start(self, driver: End) -> None:
        self.driver = driver
        driver.link(Link(ALL, 9000))

    def send(self, packets: Sequence[Packet]) -> int:
        taken = min(len(packets), self.room)
        self.room -= taken
        self.got += [bytes(packet.data) for packet in packets[:taken]]
        return taken

    def more(self, room: int) -> None:
        self.room += room
        if self.driver is not None:
            self.driver.ready()

    def ready(self) -> None:
        pass

    def link(self, link: Link | None) -> None:
        self.peer = link

    async def close(self, *, leave: bool = False) -> None:
        self.driver = None


@port_scheme("slow")
async def open_slow(target: Target) -> SlowPort:
    target.finish_options()
    return SlowPort()
