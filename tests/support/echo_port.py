"""`echo:`: a far side that sends every packet back, for a back end in a process of its own. No test here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xenbus.drivers.net.packet import ALL, End, Link, Packet
from xenbus.drivers.net.ports import Target, port_scheme

KEPT = 4096


class EchoPort:
    """What the driver has no room for waits until it has; of more than KEPT it is dropped."""

    name = "echo"

    def __init__(self) -> None:
        self.dropped = 0
        self._kept: list[Packet] = []
        self._full = False
        self._driver: End | None = None

    def counters(self) -> dict[str, int]:
        return {"dropped": self.dropped}

    def start(self, driver: End) -> None:
        self._driver = driver
        driver.link(Link(ALL, 9000))

    def send(self, packets: Sequence[Packet]) -> int:
        self._kept += [replace(packet, data=bytes(packet.data)) for packet in packets]
        self.dropped += len(self._kept[KEPT:])
        del self._kept[KEPT:]
        if not self._full:
            self.ready()
        return len(packets)

    def ready(self) -> None:
        kept, self._kept = self._kept, []
        if kept and self._driver is not None:
            self._kept = kept[self._driver.send(kept) :] + self._kept
        self._full = bool(self._kept)

    def link(self, link: Link | None) -> None:
        if link is None:
            self._kept, self._full = [], False

    async def close(self) -> None:
        self._driver = None


@port_scheme("echo")
async def open_echo(target: Target) -> EchoPort:
    target.finish_options()
    return EchoPort()
