"""A network interface in one process: domain 0 with xnb, a guest with xn, the real store and hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.split import Guest, World, use, world
from tests.support.until import until
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.net import Packet, Xn, Xnb
from xenbus.drivers.net.capture import CapturedPort
from xenbus.drivers.net.ports.schemes.packet import PacketPort

MAC = "00:16:3e:01:02:03"
SETTINGS = Settings(callback=5.0, detach=2.0, boot=2.0)


def frame(size: int = 60, fill: int = 1) -> bytes:
    """An Ethernet frame of that size, of a type that is nobody's (IEEE's for experiments)."""
    head = bytes.fromhex("ffffffffffff00163e010203") + b"\x88\xb5"
    return head + bytes([fill & 0xFF]) * (size - len(head))


class Rig:
    """`front` and `back` are drivers (their `dev` is the device); `near` and `far` their ports."""

    def __init__(self, made: World, dom0: Guest, guest: Guest) -> None:
        """dom0: the domain of the back end, whatever its number."""
        self.world = made
        self.dom0 = dom0
        self.guest = guest
        self.devid = 0
        self.before = dom0.hv.held(), guest.hv.held()

    @property
    def front_dev(self) -> Any:
        return self.guest.front.devices[f"device/vif/{self.devid}"]

    @property
    def back_dev(self) -> Any:
        return self.dom0.back.devices[f"backend/vif/{self.guest.domid}/{self.devid}"]

    @property
    def front(self) -> Any:
        return self.front_dev.driver

    @property
    def back(self) -> Any:
        return self.back_dev.driver

    @property
    def near(self) -> Any:
        port = self.front.cable.port
        return port.inner if isinstance(port, CapturedPort) else port

    @property
    def far(self) -> PacketPort:
        return self.back.cable.port

    @property
    def fnode(self) -> str:
        return self.world.front_node("vif", self.devid, self.guest.domid)

    @property
    def bnode(self) -> str:
        return self.world.back_node("vif", self.devid, self.guest.domid, self.dom0.domid)

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
        domid, home = self.guest.domid, self.dom0.domid
        front |= {"backend": self.bnode, "backend-id": str(home)}
        back |= {"frontend": self.fnode, "frontend-id": str(domid), "online": "1"}
        halves = ((self.fnode, domid, home, front), (self.bnode, home, domid, back))

        async def write(tx: Any) -> None:
            for node, owner, peer, half in halves:
                await tx.mkdir(node)
                await tx.set_perms(node, [f"n{owner}", f"r{peer}"])
                for key, value in {**half, "state": "1"}.items():
                    await tx.write(f"{node}/{key}", value)

        await self.world.tool.transaction(write)

    async def states(self, front: XenbusState, back: XenbusState) -> None:
        near, far = f"device/vif/{self.devid}", f"backend/vif/{self.guest.domid}/{self.devid}"
        await until(lambda: near in self.guest.front.devices and far in self.dom0.back.devices)
        front_dev, back_dev = self.front_dev, self.back_dev
        await until(lambda: front_dev.state is front and back_dev.state is back)

    async def connected(self) -> Rig:
        await self.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
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

    async def error_of(self, node: str) -> str:
        """The text of a device's error node, "" if there is none. `node` is absolute."""
        home, _, rest = node.partition("/local/domain/")[2].partition("/")
        path = f"/local/domain/{home}/error/{rest}/error"
        if not await self.world.tool.exists(path):
            return ""
        return str(await self.world.tool.read_str(path))

    async def toolstack_close(self) -> None:
        """What libxl does to unplug: offline, and the back end's state to Closing."""

        async def write(tx: Any) -> None:
            await tx.write(f"{self.bnode}/online", "0")
            await tx.write(f"{self.bnode}/state", str(int(XenbusState.CLOSING)))

        await self.world.tool.transaction(write)

    def held(self) -> tuple[Any, Any]:
        return self.dom0.hv.held(), self.guest.hv.held()

    async def gone(self) -> None:
        """Nodes removed; neither side holds anything."""
        await self.world.unplug("vif", self.devid, self.guest.domid, self.dom0.domid)
        await until(lambda: not self.guest.front.devices and not self.dom0.back.devices)
        await until(lambda: self.held() == self.before)


@asynccontextmanager
async def rig(
    front: Any = Xn,
    back: Any = Xnb,
    settings: Settings = SETTINGS,
    *,
    home: int = 0,
    wrap: Any = lambda transport: transport,
) -> AsyncIterator[Rig]:
    """Both domains up, no device yet. home: the back end's domain; wrap: around its store transport."""
    async with world() as made:
        use(made, front, back, "vif")
        dom0, guest = await made.guest(home, settings, wrap), await made.guest(1, settings)
        found = Rig(made, dom0, guest)
        await dom0.attach()
        await guest.attach()
        yield found


def with_rig(check: Any, *, front: Any = Xn, back: Any = Xnb, **keys: str) -> None:
    """Runs `check(rig)` with both Connected; afterwards nothing may be held."""

    async def run() -> None:
        async with rig(front, back) as r:
            await r.up(**keys)
            await check(r)
            await r.gone()

    asyncio.run(run())
