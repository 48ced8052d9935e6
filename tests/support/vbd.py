"""A disk in one process: domain 0 with xbbd, a guest with xbd, the real store and hypervisor between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.split import Guest, World, use, world
from tests.support.until import until
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.block import Xbbd, Xbd

VDEV = 51712
SETTINGS = Settings(callback=5.0, detach=2.0, boot=2.0)


class Rig:
    """`front` and `back` are drivers (their `dev` is the device); `disk` is what the guest's programs see."""

    def __init__(self, made: World, dom0: Guest, guest: Guest) -> None:
        self.world = made
        self.dom0 = dom0
        self.guest = guest
        self.vdev = VDEV
        self.before = dom0.hv.held(), guest.hv.held()

    @property
    def front_dev(self) -> Any:
        return self.guest.front.devices[f"device/vbd/{self.vdev}"]

    @property
    def back_dev(self) -> Any:
        return self.dom0.back.devices[f"backend/vbd/{self.guest.domid}/{self.vdev}"]

    @property
    def front(self) -> Any:
        return self.front_dev.driver

    @property
    def back(self) -> Any:
        return self.back_dev.driver

    @property
    def disk(self) -> Any:
        return self.front.disk

    @property
    def fnode(self) -> str:
        return self.world.front_node("vbd", self.vdev, self.guest.domid)

    @property
    def bnode(self) -> str:
        return self.world.back_node("vbd", self.vdev, self.guest.domid)

    async def plug(self, params: str, **keys: str) -> None:
        """Nodes as the toolstack writes them; `_` in a key stands for `-`."""
        front = {"virtual-device": str(self.vdev), "device-type": "disk"}
        back = {
            "params": params,
            "mode": "w",
            "type": "xenbus",
            **{k.replace("_", "-"): v for k, v in keys.items()},
        }
        domid = self.guest.domid

        async def write(tx: Any) -> None:
            for node, owner, peer, half in (
                (self.fnode, domid, 0, {"backend": self.bnode, "backend-id": "0", "state": "1", **front}),
                (
                    self.bnode,
                    0,
                    domid,
                    {"frontend": self.fnode, "frontend-id": str(domid), "online": "1", "state": "1", **back},
                ),
            ):
                await tx.mkdir(node)
                await tx.set_perms(node, [f"n{owner}", f"r{peer}"])
                for key, value in half.items():
                    await tx.write(f"{node}/{key}", value)

        await self.world.tool.transaction(write)

    async def connected(self) -> Rig:
        await until(lambda: self.guest.front.devices and self.dom0.back.devices)
        front, back = self.front_dev, self.back_dev
        await until(lambda: front.state is back.state is XenbusState.CONNECTED)
        await self.disk.connected(5)
        return self

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
        await self.world.unplug("vbd", self.vdev, self.guest.domid)
        await until(lambda: not self.guest.front.devices and not self.dom0.back.devices)
        await until(lambda: self.held() == self.before)


@asynccontextmanager
async def rig(front: Any = Xbd, back: Any = Xbbd, settings: Settings = SETTINGS) -> AsyncIterator[Rig]:
    """Both domains up, no disk yet."""
    async with world() as made:
        use(made, front, back, "vbd")
        dom0, guest = await made.guest(0, settings), await made.guest(1, settings)
        found = Rig(made, dom0, guest)
        await dom0.attach()
        await guest.attach()
        yield found
