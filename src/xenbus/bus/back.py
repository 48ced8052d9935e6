"""The bus of back ends: `backend/<type>/<domid>/<devid>`. What FreeBSD's xenbusb_back.c overrides.

Knows the shared bus alone.
"""

from __future__ import annotations

import logging

from xenbus.bus import journals
from xenbus.bus.device import XenbusDevice
from xenbus.bus.state import Side, XenbusState
from xenbus.bus.xenbusb import XenBus
from xenbus.errors import NoEntry, StoreError, XenbusError
from xenbus.ring.journal import JournalError

log = logging.getLogger("xenbus.bus")
_INHERITED = (XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)


class BackBus(XenBus):
    """Back ends serve other domains: our own boot does not wait for those."""

    side = Side.BACK
    root = "backend"
    id_components = 2
    otherend_keys = ("frontend-id", "frontend")
    name = "xenbusb_back"
    description = "Xen Backend Devices"
    holds_boot = False

    async def enumerate_type(self, device_type: str) -> list[str]:
        """seed: xenbusb_back_enumerate_type, but a domain that cannot be listed does not stop the rest."""
        base = f"{self.root}/{device_type}"
        nodes: list[str] = []
        for domid in await self.store.directory(base):
            try:
                devids = await self.store.directory(f"{base}/{domid}")
            except StoreError as exc:
                log.info("%s/%s: %s", base, domid, exc)
                continue
            nodes += [f"{base}/{domid}/{devid}" for devid in devids]
        return nodes

    async def attach(self) -> None:
        inherits = self._inherits
        await super().attach()
        if inherits and self.settings.journals is not None:
            try:
                for path in journals.sweep(self.settings.journals, {*self.devices, *self.left}):
                    log.info("%s: %s removed: there is no such device any more", self.name, path)
            except JournalError as exc:
                log.warning("%s: %s", self.name, exc)

    async def inheritable(self, node: str, state: XenbusState) -> bool:
        """What was on its way, connected or closing; and what is closed, if it is to come back with its front
        (`online`)."""
        if state is XenbusState.CLOSED:
            try:
                return int(await self.store.read(f"{node}/online")) != 0
            except (NoEntry, ValueError):
                return False
        return state in _INHERITED

    async def otherend_changed(self, dev: XenbusDevice, state: XenbusState) -> None:
        """The driver first; then, if a front end comes back to an online, closed device, offer to
        reconnect."""
        await super().otherend_changed(dev, state)
        if (
            state is XenbusState.INITIALISING
            and dev.state is XenbusState.CLOSED
            and not dev.detaching
            and await dev.online()
        ):
            dev.renew()
            await dev.set_state(XenbusState.INIT_WAIT)

    async def localend_changed(self, dev: XenbusDevice, path: str) -> None:
        await super().localend_changed(dev, path)
        if path in ("/state", "/online"):
            await self.closed(dev)

    async def closed(self, dev: XenbusDevice) -> None:
        """Closed and offline: without `hotplug-status` the toolstack knows that the node may go."""
        if dev.state is XenbusState.CLOSED and not await dev.online():
            try:
                await dev.remove("hotplug-status")
            except XenbusError as exc:
                dev.log.warning("hotplug-status: %s", exc)
