"""Domains that talk to the store over their ring page: INTRODUCE, RELEASE, death. asyncio.

Knows a `Hypervisor` handle (maps grant 1, binds the event channel) and sessions; not the tree.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from xenbus.errors import WIRE_ERRORS, HypervisorError, XenbusError
from xenbus.hypervisor.interface import GNTTAB_RESERVED_XENSTORE, Channel, Hypervisor, Mapping
from xenbus.xenstore.daemon.session import Session
from xenbus.xenstore.transport import Transport
from xenbus.xenstore.transport.ringpage import ConnectionWord, RingTransport, Side

_log = logging.getLogger("xenbus.xenstored")


class Host(Protocol):
    """What guests need of their daemon."""

    def open_session(self, domid: int, transport: Transport) -> Session: ...
    def features(self, domid: int) -> int: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None: ...


@dataclass(slots=True)
class _Guest:
    """What is held for one domain."""

    mapping: Mapping
    channel: Channel
    transport: RingTransport
    session: Session


class Guests:
    """The rings being served, by domid."""

    def __init__(self, hypervisor: Hypervisor | None, host: Host) -> None:
        self._hypervisor = hypervisor
        self._host = host
        self._guests: dict[int, _Guest] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        # Bumped by release and death: an introduction that was under way meanwhile is void.
        self._epochs: dict[int, int] = {}
        self._opening: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._guests)

    async def introduce(self, domid: int, port: int, done: Callable[[str | None], None]) -> None:
        """Maps the ring, binds `port`, starts a session; then calls `done`."""
        if self._hypervisor is None:
            done("ENOSYS")
            return
        lock = self._locks.setdefault(domid, asyncio.Lock())
        self._opening[domid] = self._opening.get(domid, 0) + 1
        epoch = self._epochs.get(domid, 0)
        error: str | None = None
        try:
            async with lock:
                again = self._guests.pop(domid, None)
                if again is not None:
                    await self._give_back(again)
                guest = await self._open(self._hypervisor, domid, port, fresh=again is not None)
                if epoch != self._epochs.get(domid, 0):
                    await self._give_back(guest)
                    error = "ENOENT"
                else:
                    self._guests[domid] = guest
        except HypervisorError as exc:
            _log.warning("domain %d is not introduced: %s", domid, exc)
            error = exc.name if exc.name in WIRE_ERRORS else "EIO"
        except (XenbusError, OSError) as exc:
            _log.warning("domain %d is not introduced: %s", domid, exc)
            error = "EIO"
        finally:
            self._forget(domid)
        done(error)
        if error is None:
            guest.session.start()

    def _forget(self, domid: int) -> None:
        self._opening[domid] -= 1
        if not self._opening[domid]:
            del self._opening[domid]
            self._epochs.pop(domid, None)
            if domid not in self._guests:
                self._locks.pop(domid, None)

    async def _open(self, hypervisor: Hypervisor, domid: int, port: int, *, fresh: bool) -> _Guest:
        mapping = await hypervisor.gntdev.map(domid, [GNTTAB_RESERVED_XENSTORE])
        ring: list[RingTransport] = []

        def kicked() -> None:
            for transport in ring:
                transport.on_event()

        try:
            channel = await hypervisor.evtchn.bind_interdomain(domid, port, kicked)
        except BaseException:
            await hypervisor.gntdev.unmap(mapping)
            raise
        transport = RingTransport(mapping.view, channel.notify, Side.DAEMON, f"domain {domid}")
        ring.append(transport)
        page = transport.page
        page.features = self._host.features(domid)
        page.error = 0
        if fresh:
            page.empty()
        if page.connection:
            page.connection = ConnectionWord.CONNECTED
        channel.notify()
        return _Guest(mapping, channel, transport, self._host.open_session(domid, transport))

    async def _give_back(self, guest: _Guest) -> None:
        assert self._hypervisor is not None
        guest.session.close()
        guest.transport.close()
        with suppress(XenbusError, OSError):
            await guest.channel.close()
        with suppress(XenbusError, OSError):
            await self._hypervisor.gntdev.unmap(guest.mapping)

    def release(self, domid: int) -> None:
        """The domain is no longer served; its page and port are given back soon after."""
        if domid in self._opening:
            self._epochs[domid] = self._epochs.get(domid, 0) + 1
        guest = self._guests.pop(domid, None)
        if guest is None:
            return
        guest.session.close()
        self._host.spawn(self._release(domid, guest), f"release domain {domid}")

    async def _release(self, domid: int, guest: _Guest) -> None:
        self._opening[domid] = self._opening.get(domid, 0) + 1
        try:
            async with self._locks.setdefault(domid, asyncio.Lock()):
                await self._give_back(guest)
        finally:
            self._forget(domid)

    async def close(self) -> None:
        """Every ring is given back."""
        guests, self._guests = self._guests, {}
        for guest in guests.values():
            await self._give_back(guest)
