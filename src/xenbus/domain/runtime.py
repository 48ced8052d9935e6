"""One running domain: its store connection, its hypervisor handle, and `xenstore0` with both buses on it.

The same for domain 0 and for guests; what differs (how the store is reached, whether the domain can be
suspended) is handed in. Knows no toolstack.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from xenbus.bus.back import BackBus
from xenbus.bus.driver import drivers
from xenbus.bus.front import FrontBus
from xenbus.bus.state import Side as Half
from xenbus.bus.xenbusb import XenBus
from xenbus.domain.shutdown import ShutdownWatcher
from xenbus.errors import DeadlineError, LinkDown, XenbusError
from xenbus.hypervisor.interface import GuestLife, Hypervisor, StartInfo
from xenbus.newbus import Device, Newbus
from xenbus.newbus.runtime import wait_boot
from xenbus.xenstore.client import Client
from xenbus.xenstore.transport.ringpage import RingTransport, Side

log = logging.getLogger(__name__)

BOOT_DEADLINE = 20.0  # seconds that boot waits for devices to connect
CLOSE_DEADLINE = 8.0  # seconds for an orderly end of all devices; less than the host's patience with us

StoreFactory = Callable[[], Awaitable[Client]]
MakeBuses = Callable[[Client, Hypervisor, Device], tuple[XenBus, ...]]


def both_buses(store: Client, hv: Hypervisor, xenstore: Device) -> tuple[XenBus, ...]:
    """What every domain of an embedded host has on its xenstore0."""
    return FrontBus(store, hv, xenstore), BackBus(store, hv, xenstore)


def ring_store(life: GuestLife) -> StoreFactory:
    """A guest's way to the store: the ring page and port that the domain builder left, and nothing else."""

    async def connect() -> Client:
        transport: RingTransport | None = None

        def kicked() -> None:
            if transport is not None:
                transport.on_event()

        info: StartInfo = await life.start_info(kicked)
        notify = info.store_channel.notify
        transport = RingTransport(info.store_page, notify, Side.GUEST, "the store (ring page)")
        return await Client.connect(transport)

    return connect


class DomainRuntime:
    """`await start()`, `await ended`, `await stop()`.

    life:  given for a domain that can be suspended; it then obeys control/shutdown
    buses: makes the buses, in the order in which they end
    ended: its result is the reason: "poweroff", "reboot" or "lost"
    """

    def __init__(
        self,
        name: str,
        hv: Hypervisor,
        connect_store: StoreFactory,
        *,
        life: GuestLife | None = None,
        buses: MakeBuses = both_buses,
    ) -> None:
        self.name = name
        self.hv = hv
        self.life = life
        self.tree = Newbus()
        self.started = time.time()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._connect_store = connect_store
        self._store: Client | None = None
        self._make_buses = buses
        self.buses: tuple[XenBus, ...] = ()
        self._shutdown = ShutdownWatcher(
            {
                "suspend": self.suspend,
                "poweroff": lambda: self._end("poweroff"),
                "reboot": lambda: self._end("reboot"),
            }
        )

    @property
    def store(self) -> Client:
        """LinkDown while there is none: before the start, after the end, in the middle of a restore."""
        if self._store is None:
            raise LinkDown(f"{self.name} is not connected to the store")
        return self._store

    async def start(self) -> None:
        """The store reached, both buses attached, devices that were there at boot connected or given up."""
        drivers.load_entry_points()
        self._store = await self._connect_store()
        self._store.on_lost(self._store_lost)
        xenstore = self.tree.add_child(self.tree.root, name="xenstore", desc="XenStore")
        self.buses = self._make_buses(self.store, self.hv, xenstore)
        for bus in self.buses:
            await bus.attach()
        try:
            late = await wait_boot(self.tree.boot, BOOT_DEADLINE)
        except DeadlineError:
            late = self.tree.boot.holders
        if late:
            log.warning("boot goes on without %s", ", ".join(late))
        if self.life is not None:
            await self._shutdown.start(self.store)

    def end(self, reason: str) -> None:
        """Ask for the end; whoever runs this domain waits for `ended` and calls stop()."""
        if not self.ended.done():
            self.ended.set_result(reason)

    async def _end(self, reason: str) -> None:
        self.end(reason)

    def _store_lost(self, error: Exception) -> None:
        log.error("the store is lost: %s", error)
        self.end("lost")

    async def stop(self, *, handover: bool = False) -> None:
        """Orderly: devices close, front ends first, then the store connection and what the handle holds.

        A domain whose store or broker is lost has nobody to be orderly with. handover: back ends do not
        close, they are left for another process (see XenBus.release).
        """
        lost = self.ended.done() and self.ended.result() == "lost"
        if lost and self._store is not None:
            await self._store.close()  # nobody waits for an answer that can't come
        await self._shutdown.stop()
        now, share = asyncio.get_running_loop().time(), CLOSE_DEADLINE / max(1, len(self.buses))
        for number, bus in enumerate(() if lost else self.buses, start=1):
            try:
                async with asyncio.timeout_at(now + number * share):
                    if handover and bus.side is Half.BACK:
                        await bus.release()
                    else:
                        await bus.detach()
            except (XenbusError, TimeoutError) as error:
                log.warning("%s: not all devices closed: %s", bus, error)
        if self._store is not None:
            store, self._store = self._store, None
            await store.close()

    async def suspend(self) -> None:
        """HYPERVISOR_suspend with what comes before and after (FreeBSD control.c, xctrl_suspend)."""
        assert self.life is not None
        log.info("suspending")
        for bus in self.buses:
            await bus.suspend()
        result = await self.life.suspend()  # no deadline: it is the toolstack's to end
        if result.cancelled:
            log.info("suspend cancelled")
            for bus in self.buses:
                await bus.resume(cancelled=True)
            return
        log.info("restored as domain %d", result.domid)
        try:
            await self._come_back()
        except XenbusError as error:
            # Without a store there is no domain: whoever waits for it hears of its end.
            log.error("not restored: %s", error)
            self.end("lost")

    async def _come_back(self) -> None:
        old, self._store = self.store, None
        await old.close()
        self._store = await self._connect_store()
        self._store.on_lost(self._store_lost)
        for bus in self.buses:
            await bus.resume(cancelled=False, store=self._store, hv=self.hv)
        await self._shutdown.start(self._store)
