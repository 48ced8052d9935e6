"""A network interface in one process: domain 0 with xnb, a guest with xn, the real store and hypervisor."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.pair import SETTINGS, Pair
from tests.support.until import until
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.net import Packet, Xn, Xnb
from xenbus.drivers.net.capture import CapturedPort
from xenbus.drivers.net.ports.schemes.packet import PacketPort

MAC = "00:16:3e:01:02:03"


def frame(size: int = 60, fill: int = 1) -> bytes:
    """An Ethernet frame of that size, of a type that is nobody's (IEEE's for experiments)."""
    head = bytes.fromhex("ffffffffffff00163e010203") + b"\x88\xb5"
    return head + bytes([fill & 0xFF]) * (size - len(head))


class Rig(Pair):
    """`near` and `far` are the ports of the two drivers."""

    kind = "vif"
    devid = 0

    @property
    def near(self) -> Any:
        port = self.front.cable.port
        return port.inner if isinstance(port, CapturedPort) else port

    @property
    def far(self) -> PacketPort:
        return self.back.cable.port

    async def plug(
        self,
        *,
        port: str = "packet:?offloads=1",
        front_port: str = "packet:?offloads=1",
        mac: str = MAC,
        **keys: str,
    ) -> None:
        """Nodes as the toolstack writes them; `_` in a key stands for `-`. mtu and mac go to both, what
        begins with xn_ to the front."""
        both = {"mac": mac, "handle": str(self.devid)}
        if "mtu" in keys:
            both["mtu"] = keys.pop("mtu")
        front = {**both, "xenbus-port": front_port}
        back = {**both, "xenbus-port": port}
        for key, value in keys.items():
            (front if key.startswith("xn_") else back)[key.replace("_", "-")] = value
        back = {key: value for key, value in back.items() if value}
        await self.write_halves(front, back)

    async def connected(self) -> Rig:
        await self.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
        await until(lambda: self.back.cable.connected)
        await self.near.linked(5)
        await self.far.linked(5)
        return self

    async def up(self, **keys: str) -> Rig:
        await self.plug(**keys)
        return await self.connected()

    async def exchange(self, packet: Packet | bytes, *, back: bool = False) -> Packet:
        """Sent by the guest (or the other way), as it arrives."""
        one, other = (self.far, self.near) if back else (self.near, self.far)
        await one.put(packet, 5)
        return await other.get(5)


def rig(front: Any = Xn, back: Any = Xnb, settings: Settings = SETTINGS, **given: Any) -> Any:
    """Both domains up, no device yet. What else may be given: see Pair.rig."""
    return Rig.rig(front, back, settings, **given)


def with_rig(check: Any, *, front: Any = Xn, back: Any = Xnb, **keys: str) -> None:
    """Runs `check(rig)` with both Connected; afterwards nothing may be held."""

    async def run() -> None:
        async with rig(front, back) as r:
            await r.up(**keys)
            await check(r)
            await r.gone()

    asyncio.run(run())
