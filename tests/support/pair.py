"""A device in one process: domain 0 with the back end, a guest with the front end, real store and hypervisor.

`vbd`, `vif` and `consoles` say what kind of device it is, and what is peculiar to it. No test here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self

from tests.support.split import Guest, World, use, world
from tests.support.until import until
from xenbus.bus import Settings, XenbusState

SETTINGS = Settings(callback=5.0, detach=2.0, boot=2.0)


class Pair:
    """`front` and `back` are drivers; their `dev` is the device."""

    kind: ClassVar[str]
    devid: int

    def __init__(self, made: World, dom0: Guest, guest: Guest) -> None:
        """dom0: the domain of the back end, whatever its number."""
        self.world = made
        self.dom0 = dom0
        self.guest = guest
        self.before = self.held()

    @classmethod
    @asynccontextmanager
    async def rig(
        cls, front: Any, back: Any, settings: Settings, home: int = 0, wrap: Any = lambda transport: transport
    ) -> AsyncIterator[Self]:
        """Both domains up, no device yet. home: the back end's domain; wrap: around its store transport."""
        async with world() as made:
            use(made, front, back, cls.kind)
            dom0, guest = await made.guest(home, settings, wrap), await made.guest(1, settings)
            found = cls(made, dom0, guest)
            await dom0.attach()
            await guest.attach()
            yield found

    @property
    def front_dev(self) -> Any:
        return self.guest.front.devices[f"device/{self.kind}/{self.devid}"]

    @property
    def back_dev(self) -> Any:
        return self.dom0.back.devices[f"backend/{self.kind}/{self.guest.domid}/{self.devid}"]

    @property
    def front(self) -> Any:
        return self.front_dev.driver

    @property
    def back(self) -> Any:
        return self.back_dev.driver

    @property
    def fnode(self) -> str:
        return self.world.front_node(self.kind, self.devid, self.guest.domid)

    @property
    def bnode(self) -> str:
        return self.world.back_node(self.kind, self.devid, self.guest.domid, self.dom0.domid)

    async def write_halves(self, front: Mapping[str, str], back: Mapping[str, str]) -> None:
        """Both nodes as the toolstack writes them, with these keys beside those that every device has."""
        domid, home = self.guest.domid, self.dom0.domid
        near = {"backend": self.bnode, "backend-id": str(home), **front}
        far = {"frontend": self.fnode, "frontend-id": str(domid), "online": "1", **back}

        async def write(tx: Any) -> None:
            for node, owner, peer, half in ((self.fnode, domid, home, near), (self.bnode, home, domid, far)):
                await tx.mkdir(node)
                await tx.set_perms(node, [f"n{owner}", f"r{peer}"])
                for key, value in {**half, "state": "1"}.items():
                    await tx.write(f"{node}/{key}", value)

        await self.world.tool.transaction(write)

    async def states(self, front: XenbusState, back: XenbusState) -> None:
        """Until both devices are there and have these states."""
        near, far = f"device/{self.kind}/{self.devid}", f"backend/{self.kind}/{self.guest.domid}/{self.devid}"

        def reached() -> bool:
            if near not in self.guest.front.devices or far not in self.dom0.back.devices:
                return False
            return self.front_dev.state is front and self.back_dev.state is back

        await until(reached)

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

    async def leave(self) -> dict[str, Any]:
        """The back end's process ends, states as they are. What could not end, by node."""
        failures = await self.dom0.back.release()
        await self.dom0.front.detach()
        await self.dom0.store.close()
        return dict(failures)

    async def inherit(self, settings: Settings) -> None:
        """Another process of the same domain."""
        self.dom0 = await self.world.guest(self.dom0.domid, settings, inherits=True)
        await self.dom0.attach()

    def held(self) -> tuple[Any, Any]:
        return self.dom0.hv.held(), self.guest.hv.held()

    async def removed(self) -> None:
        """Until both devices are gone and neither side holds anything."""
        await until(lambda: not self.guest.front.devices and not self.dom0.back.devices)
        await until(lambda: self.held() == self.before)

    async def gone(self) -> None:
        """Nodes removed; neither side holds anything."""
        await self.world.unplug(self.kind, self.devid, self.guest.domid, self.dom0.domid)
        await self.removed()
