"""`echo:`: a far side that sends every packet back, for a back end in a process of its own. No test here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xenbus.drivers.net.packet import ALL, End, Link, Packet
from xenbus.drivers.net.ports import Target, port_scheme


class EchoPort:
    """What the driver has no room for is dropped."""

    name = "echo"

    def __init__(self) -> None:
        self.dropped = 0
        self._driver: End | None = None

    def counters(self) -> dict[str, int]:
        return {"dropped": self.dropped}

    def start(self, driver: End) -> None:
        self._driver = driver
        driver.link(Link(ALL, 9000))

    def send(self, packets: Sequence[Packet]) -> int:
        if self._driver is not None:
            back = [replace(packet, data=bytes(packet.data)) for packet in packets]
            self.dropped += len(back) - self._driver.send(back)
        return len(packets)

    def ready(self) -> None:
        pass

    def link(self, link: Link | None) -> None:
        pass

    async def close(self, *, leave: bool = False) -> None:
        self._driver = None


@port_scheme("echo")
async def open_echo(target: Target) -> EchoPort:
    target.finish_options()
    return EchoPort()
