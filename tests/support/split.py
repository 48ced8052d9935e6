"""A small machine for the bus: a store daemon, an embedded hypervisor, domains with both buses, toy drivers.

All real parts, in one process. `World` is the toolstack too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.support.unhandled import nothing_unhandled
from xenbus.bus import BackBus, DriverRegistry, FrontBus, Settings, Side, XenbusDriver, XenbusState
from xenbus.bus.xenbusb import XenBus
from xenbus.errors import NoEntry
from xenbus.hypervisor.embedded import Machine
from xenbus.newbus import Newbus
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon

S = XenbusState
QUICK = Settings(callback=2.0, detach=0.05, boot=2.0)


class Guest:
    """One domain: its handle, its store connection, xenstore0 with both buses."""

    def __init__(self, world: World, domid: int) -> None:
        self.world = world
        self.domid = domid
        self.hv = world.machine.domain(domid)
        self.tree = Newbus()
        self.xenstore0 = self.tree.add_child(self.tree.root, name="xenstore", desc="XenStore")
        self.store: Client
        self.front: FrontBus
        self.back: BackBus

    async def connect(self, wrap: Callable[[Any], Any] = lambda transport: transport) -> Client:
        return await Client.connect(wrap(self.world.daemon.connect_local(self.domid)))

    async def start(
        self, settings: Settings, wrap: Callable[[Any], Any] = lambda t: t, inherits: bool = False
    ) -> Guest:
        self.store = await self.connect(wrap)
        registry = self.world.registry
        self.front = FrontBus(self.store, self.hv, self.xenstore0, registry, settings)
        self.back = BackBus(self.store, self.hv, self.xenstore0, registry, settings, inherits=inherits)
        return self

    @property
    def buses(self) -> tuple[XenBus, XenBus]:
        return self.front, self.back

    async def attach(self) -> Guest:
        for bus in self.buses:
            await bus.attach()
        return self

    async def stop(self) -> None:
        for bus in self.buses:
            await bus.detach()
        await self.store.close()


class World:
    """The machine and its toolstack (domain 0's connection `tool`)."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.registry = DriverRegistry()
        self.registry._loaded = True  # no installed package's drivers
        self.daemon: Daemon
        self.tool: Client
        self.guests: dict[int, Guest] = {}

    async def guest(
        self, domid: int, settings: Settings = QUICK, wrap: Any = lambda t: t, inherits: bool = False
    ) -> Guest:
        guest = Guest(self, domid)
        home = f"/local/domain/{domid}"
        await self.tool.mkdir(home)
        await self.tool.set_perms(home, [f"n{domid}"])
        await self.tool.write(f"{home}/name", f"domain-{domid}")
        self.guests[domid] = await guest.start(settings, wrap, inherits)
        return guest

    def front_node(self, kind: str, devid: int, front: int = 1) -> str:
        return f"/local/domain/{front}/device/{kind}/{devid}"

    def back_node(self, kind: str, devid: int, front: int = 1, back: int = 0) -> str:
        return f"/local/domain/{back}/backend/{kind}/{front}/{devid}"

    async def plug(
        self, kind: str = "toy", devid: int = 0, front: int = 1, back: int = 0, **keys: str
    ) -> None:
        """Both halves' nodes in one transaction, permissions as libxl sets them. `keys`: the back end's."""
        fnode, bnode = self.front_node(kind, devid, front), self.back_node(kind, devid, front, back)

        async def write(tx: Any) -> None:
            await tx.mkdir(fnode)
            await tx.set_perms(fnode, [f"n{front}", f"r{back}"])
            await tx.mkdir(bnode)
            await tx.set_perms(bnode, [f"n{back}", f"r{front}"])
            for key, value in {"backend": bnode, "backend-id": str(back), "state": "1"}.items():
                await tx.write(f"{fnode}/{key}", value)
            half = {"frontend": fnode, "frontend-id": str(front), "online": "1", "state": "1", **keys}
            for key, value in half.items():
                await tx.write(f"{bnode}/{key}", value)

        await self.tool.transaction(write)

    async def unplug(self, kind: str = "toy", devid: int = 0, front: int = 1, back: int = 0) -> None:
        """Both halves' nodes go, as after a device was closed."""

        async def remove(tx: Any) -> None:
            for node in (self.front_node(kind, devid, front), self.back_node(kind, devid, front, back)):
                try:
                    await tx.rm(node)
                except NoEntry:
                    pass

        await self.tool.transaction(remove)

    async def state(self, node: str) -> int:
        """0 if it is gone."""
        try:
            return int(await self.tool.read(f"{node}/state"))
        except NoEntry:
            return 0


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Everything is closed at the end. No callback may raise."""
    made = World()
    made.daemon = Daemon(made.machine.domain(0))
    made.tool = await Client.connect(made.daemon.connect_local(0))
    with nothing_unhandled():
        try:
            yield made
        finally:
            for guest in made.guests.values():
                if not guest.store.closed:
                    await guest.stop()
            await made.tool.close()
            await made.daemon.close()


def in_world(check: Callable[[World], Awaitable[None]]) -> None:
    """Runs `check(world)`."""

    async def run() -> None:
        async with world() as made:
            await check(made)

    asyncio.run(run())


class Recorder(XenbusDriver):
    """A driver that writes down what it hears: `heard` is [(callback, argument)]."""

    name = "rec"
    description = "Recorder"

    def __init__(self, dev: Any) -> None:
        super().__init__(dev)
        self.heard: list[tuple[Any, ...]] = []
        made.append(self)

    async def attach(self) -> None:
        self.heard.append(("attach",))

    async def detach(self) -> None:
        self.heard.append(("detach",))

    async def otherend_changed(self, state: XenbusState) -> None:
        self.heard.append(("otherend", state))

    async def localend_changed(self, path: str) -> None:
        self.heard.append(("localend", path))

    async def suspend(self) -> None:
        self.heard.append(("suspend",))

    async def resume(self, cancelled: bool) -> None:
        self.heard.append(("resume", cancelled))

    def count(self, what: str) -> int:
        return sum(1 for entry in self.heard if entry[0] == what)


# Every Recorder that was made, the latest last. A test that counts takes its own slice.
made: list[Recorder] = []


class ToyFront(Recorder):
    """A front end with one page of ring and a port, that walks the whole handshake."""

    name = "toy"
    description = "Toy front end"

    async def otherend_changed(self, state: XenbusState) -> None:
        await super().otherend_changed(state)
        if state is S.INIT_WAIT and self.dev.state is S.INITIALISING:
            self.pages = await self.dev.grant_ring(1)
            self.port = await self.dev.alloc_evtchn(lambda: None)
            await self.dev.set_state(
                S.INITIALISED, {"ring-ref": self.pages.refs[0], "event-channel": self.port.port}
            )
        elif state is S.CONNECTED and self.dev.state is S.INITIALISED:
            await self.dev.set_state(S.CONNECTED)
        elif state in (S.CLOSING, S.CLOSED) and self.dev.state is not S.CLOSED:
            await self.drop()
            await self.dev.set_state(S.CLOSED)

    async def drop(self) -> None:
        if getattr(self, "pages", None) is not None:
            await self.dev.close_evtchn(self.port)
            await self.dev.revoke(self.pages)
            self.pages = None


class ToyBack(Recorder):
    """The back end of ToyFront."""

    name = "toyb"
    description = "Toy back end"
    ring: Any = None

    async def attach(self) -> None:
        await super().attach()
        await self.dev.set_state(S.INIT_WAIT)

    async def otherend_changed(self, state: XenbusState) -> None:
        await super().otherend_changed(state)
        if state in (S.INITIALISED, S.CONNECTED) and self.dev.state is S.INIT_WAIT:
            keys = await self.dev.otherend_gather({"ring-ref": int, "event-channel": int})
            self.ring = await self.dev.map_ring([keys["ring-ref"]])
            self.port = await self.dev.bind_evtchn(keys["event-channel"], lambda: None)
            await self.dev.set_state(S.CONNECTED)
        elif state is S.CLOSING and self.dev.state not in (S.CLOSING, S.CLOSED):
            await self.dev.set_state(S.CLOSING)
        elif state is S.CLOSED and self.dev.state is not S.CLOSED:
            await self.drop()
            await self.dev.set_state(S.CLOSED)

    async def drop(self) -> None:
        if self.ring is not None:
            await self.dev.close_evtchn(self.port)
            await self.dev.unmap(self.ring)
            self.ring = None


def use(world: World, front: Any, back: Any, kind: str = "toy") -> None:
    """Registers a front end, a back end, or either (None: no driver)."""
    if front is not None:
        world.registry.add(Side.FRONT, kind, front)
    if back is not None:
        world.registry.add(Side.BACK, kind, back)


NODE = "device/toy/0"


async def one(w: World, driver: Any = Recorder, settings: Settings = QUICK, wrap: Any = None) -> Any:
    """Guest 1 with one attached front end at NODE; the test is its back end. (guest, device)"""
    use(w, driver, None)
    guest = await w.guest(1, settings, *([wrap.around] if wrap else []))
    await guest.attach()
    await w.plug()
    async with asyncio.timeout(5):
        while NODE not in guest.front.devices or not guest.front.devices[NODE].device.attached:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await settle(guest)
    return guest, guest.front.devices[NODE]


async def settle(*guests: Guest) -> None:
    """Every bus has looked at everything and every device's mailbox is empty."""
    async with asyncio.timeout(5):
        while True:
            for guest in guests:
                for bus in guest.buses:
                    await bus.quiet()
            await asyncio.gather(*(guest.store.exists("/") for guest in guests), return_exceptions=True)
            busy = [
                dev
                for guest in guests
                for bus in guest.buses
                for dev in bus.devices.values()
                if not dev.mailbox.idle
            ]
            if not busy and not any(bus._queue or bus._tasks for g in guests for bus in g.buses):
                return
            await asyncio.sleep(0)
