"""A domain of a real Xen, served by this process: its store and devices under /dev/xen, its buses.

Knows which device types Linux has drivers of its own for: those are served only where they are claimed.
Knows no toolstack.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from xenbus.bus.back import BackBus
from xenbus.bus.driver import drivers
from xenbus.bus.front import FrontBus
from xenbus.bus.state import Side
from xenbus.bus.xenbusb import Settings, XenBus
from xenbus.domain.layout import check_name
from xenbus.domain.runtime import DomainRuntime, MakeBuses, StoreFactory
from xenbus.errors import NoEntry, PeerError, UsageError, XenbusError
from xenbus.hypervisor.interface import Hypervisor
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.newbus import Device
from xenbus.xenstore.client import Client
from xenbus.xenstore.transport import default_address

log = logging.getLogger(__name__)

ASLEEP = 0.01  # seconds that the clocks differ by after a suspend, at least
# Linux has a driver for either half of these (drivers/xen, drivers/block/xen-*, ...), and a node with two
# drivers is two back ends on one ring. udev loads the module when the first such node appears.
# Of a console it drives the front half; whoever serves such a node is QEMU, by libxl's doing.
LINUX_TYPES = frozenset(
    {"vbd", "vif", "console", "vkbd", "vfb", "vscsi", "vusb", "pci", "9pfs", "vsnd", "vdispl"}
)
_SYSFS = {Side.FRONT: "/sys/bus/xen", Side.BACK: "/sys/bus/xen-backend"}
# sysfs lists the drivers of a bus by the device type that they are for, but for these.
_DRIVERS = {(Side.FRONT, "console"): "xenconsole"}
_MODULES = {
    (Side.FRONT, "vbd"): "xen-blkfront",
    (Side.FRONT, "vif"): "xen-netfront",
    (Side.FRONT, "console"): "hvc_xen",
    (Side.BACK, "vbd"): "xen-blkback",
    (Side.BACK, "vif"): "xen-netback",
}


@dataclass(frozen=True, slots=True)
class Served:
    """What a process serves of its domain.

    sides:    its buses
    claims:   device types that are taken although Linux may have a driver for them
    journals: where back ends keep what the next process needs to go on after this one (a directory of ours
              alone, on a tmpfs); back ends that a former one left are taken over. None: neither
    """

    sides: frozenset[Side] = frozenset({Side.BACK})
    claims: frozenset[str] = frozenset()
    journals: Path | None = None

    def accepts(self, side: Side, device_type: str) -> bool:
        return device_type in self.claims or device_type not in LINUX_TYPES

    def types(self) -> dict[str, list[str]]:
        """By side's value, the device types that a driver of ours would take here."""
        registry = drivers.only(self.accepts)
        return {side.value: registry.types(side) for side in self.sides}

    def check(self, sysfs: Path = Path("/")) -> None:
        """UsageError if Linux's driver has what is claimed, or nobody of ours drives it."""
        drivers.load_entry_points()
        for side in self.sides:
            for device_type in self.claims:
                if _linux_has(sysfs / _SYSFS[side].lstrip("/"), side, device_type):
                    module = _MODULES.get((side, device_type), "?")
                    raise UsageError(
                        f"{device_type}: Linux's own driver has every {side.value} of that type ({module}): "
                        f"unload it and keep udev from loading it (blacklist in /etc/modprobe.d); if it is "
                        f"part of the kernel, write 0 to {_SYSFS[side]}/drivers_autoprobe before there is "
                        f"such a device; or don't claim it"
                    )
        known = {name for side in self.sides for name in drivers.types(side)}
        for device_type in self.claims - known:
            raise UsageError(f"no driver for {device_type!r}: there are {', '.join(sorted(known))}")


def _linux_has(bus: Path, side: Side, device_type: str) -> bool:
    """Whether Linux's driver has devices of that type, or would take the next one. bus: of sysfs"""
    driver, probes = (
        bus / "drivers" / _DRIVERS.get((side, device_type), device_type),
        bus / "drivers_autoprobe",
    )
    if not driver.exists():
        return False
    return any(driver.glob(f"{device_type}-*")) or not probes.exists() or probes.read_text().strip() != "0"


async def own_domid(store: Client) -> int:
    """PeerError if the store says nonsense."""
    raw = await store.read("domid")
    if not raw.isdigit() or len(raw) > 5:
        raise PeerError(f"domid: {raw[:16]!r} is no domain")
    return int(raw)


async def own_name(store: Client, domid: int) -> str:
    """Its name, if it is one that a file can have."""
    try:
        return check_name(await store.read_str("name"))
    except (NoEntry, UsageError, UnicodeDecodeError):
        return f"domain-{domid}"


class GuestRuntime(DomainRuntime):
    """Of a guest, which may be saved and restored without a word to its processes (drivers/xen/manage.c
    freezes them). The signs afterwards: another domid; or, where that is the same, a device's own state back
    at Initialising and a clock that ran on while we did not."""

    def __init__(self, name: str, hv: LinuxHypervisor, connect_store: StoreFactory, buses: MakeBuses) -> None:
        super().__init__(name, hv, connect_store, buses=buses)
        self._resuming: asyncio.Task[None] | None = None
        self._asleep = seconds_asleep()

    async def start(self) -> None:
        await super().start()
        for bus in self.buses:
            bus.restored = self.was_restored
        await self._watch_domid()

    async def _watch_domid(self) -> None:
        """The kernel sets every watch again after a restore, which makes each fire."""
        await self.store.watch("domid", self._domid_event)

    def _domid_event(self, _path: str) -> None:
        asyncio.ensure_future(self._look()).add_done_callback(_log_failure)

    async def _look(self) -> None:
        if self._resuming is None and await own_domid(self.store) != self.hv.domid:
            await self.was_restored()

    async def was_restored(self) -> bool:
        """Asked where a device seems to have ended. True: it has not, the resume is under way."""
        if self._resuming is None:
            domid = await own_domid(self.store)
            if domid == self.hv.domid and seconds_asleep() - self._asleep < ASLEEP:
                return False
            if self._resuming is None:
                self._resuming = asyncio.create_task(self._resume(domid), name="resume")
        return True

    async def _resume(self, domid: int) -> None:
        log.info("restored as domain %d", domid)
        self._asleep = seconds_asleep()
        old, self.hv = self.hv, LinuxHypervisor(domid)
        try:
            for bus in self.buses:
                await bus.stand_still()
            await self._come_back()
            await self._watch_domid()
        except XenbusError as error:
            log.error("not restored: %s", error)
            self.end("lost")
        finally:
            self._resuming = None
            assert isinstance(old, LinuxHypervisor)
            old.abandon()


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("domid: %s", error)


def seconds_asleep() -> float:
    """How long this system was suspended since it booted (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


async def native_runtime(served: Served, address: str | None = None) -> DomainRuntime:
    """Not started yet. LinkDown if there is no store to reach: this is no Xen domain."""
    address = address or default_address()
    async with await Client.connect(address) as store:
        domid = await own_domid(store)
        name = await own_name(store, domid)

    def buses(store: Client, hv: Hypervisor, xenstore: Device) -> tuple[XenBus, ...]:
        registry = drivers.only(served.accepts)
        settings = Settings(journals=served.journals)
        inherits = served.journals is not None
        made: list[XenBus] = []
        if Side.FRONT in served.sides:
            made.append(FrontBus(store, hv, xenstore, registry))
        if Side.BACK in served.sides:
            made.append(BackBus(store, hv, xenstore, registry, settings, inherits=inherits))
        return tuple(made)

    hv = LinuxHypervisor(domid)
    if domid:
        return GuestRuntime(name, hv, lambda: Client.connect(address), buses)
    return DomainRuntime(name, hv, lambda: Client.connect(address), buses=buses)
