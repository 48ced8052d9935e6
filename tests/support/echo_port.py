"""`echo:`: a far side that sends every packet back, for a back end in a process of its own. No test here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.packet import ALL, End, Link, Packet
from xenbus.drivers.net.ports import Target, port_scheme

PATIENCE = 60.0  # seconds


class EchoPort:
    """Drops nothing: it takes no more while the driver has no room for what it was given last."""

    name = "echo"

    def __init__(self) -> None:
        self._left: list[Packet] = []
        self._driver: End | None = None

    def counters(self) -> dict[str, int]:
        return {"waiting": len(self._left)}

    def start(self, driver: End) -> None:
        self._driver = driver
        if isinstance(driver, Cable):  # a front end on a busy machine is slow, not gone
            driver.stall = driver.stall_shared = PATIENCE
        driver.link(Link(ALL, 9000))

    def send(self, packets: Sequence[Packet]) -> int:
        if self._left:
            return 0
        if self._driver is not None:
            back = [replace(packet, data=bytes(packet.data)) for packet in packets]
            self._left = back[self._driver.send(back) :]
        return len(packets)

    def ready(self) -> None:
        if self._left and self._driver is not None:
            self._left = self._left[self._driver.send(self._left) :]
            if not self._left:
                self._driver.ready()

    def link(self, link: Link | None) -> None:
        pass

    async def close(self, *, leave: bool = False) -> None:
        self._driver = None


@port_scheme("echo")
async def open_echo(target: Target) -> EchoPort:
    target.finish_options()
    return EchoPort()
