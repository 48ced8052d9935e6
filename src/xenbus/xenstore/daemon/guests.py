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
from xenbus.xenstore.engine import Connection
from xenbus.xenstore.state.dump import Held
from xenbus.xenstore.state.load import Restored, queue
from xenbus.xenstore.state.records import Ring, RingPosition
from xenbus.xenstore.transport import Transport
from xenbus.xenstore.transport.ringpage import ConnectionWord, RingFault, RingTransport, Side
from xenbus.xenstore.wire.message import next_begin

_log = logging.getLogger("xenbus.xenstored")


class Host(Protocol):
    """What guests need of their daemon."""

    def open_session(self, domid: int, transport: Transport, conn: Connection | None = None) -> Session: ...
    def features(self, domid: int) -> int: ...
    def target(self, domid: int) -> int | None: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None: ...


@dataclass(slots=True)
class _Guest:
    """What is held for one domain. port: the guest's own, as INTRODUCE named it."""

    port: int
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

    async def introduce(
        self, domid: int, port: int, done: Callable[[str | None], None], *, again: bool = False
    ) -> None:
        """Maps the ring, binds `port`, starts a session; then calls `done`. again: where a ring is served
        already, it goes on, and only the channel is bound anew."""
        if self._hypervisor is None:
            done("ENOSYS")
            return
        lock = self._locks.setdefault(domid, asyncio.Lock())
        self._opening[domid] = self._opening.get(domid, 0) + 1
        epoch = self._epochs.get(domid, 0)
        error: str | None = None
        try:
            async with lock:
                before = self._guests.pop(domid, None)
                if before is not None and again:
                    guest = await self._rebind(self._hypervisor, before, port)
                else:
                    if before is not None:
                        await self._give_back(before)
                    guest = await self._open(self._hypervisor, domid, port, fresh=before is not None)
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
        if error is None and guest is not before:
            guest.session.start()

    async def _rebind(self, hypervisor: Hypervisor, guest: _Guest, port: int) -> _Guest:
        domid = guest.session.conn.domid
        try:
            await guest.channel.close()
            guest.channel = await hypervisor.evtchn.bind_interdomain(domid, port, guest.transport.on_event)
        except BaseException:
            await self._give_back(guest)
            raise
        guest.transport.notify_by(guest.channel.notify)
        guest.port = port
        return guest

    def _forget(self, domid: int) -> None:
        self._opening[domid] -= 1
        if not self._opening[domid]:
            del self._opening[domid]
            self._epochs.pop(domid, None)
            if domid not in self._guests:
                self._locks.pop(domid, None)

    async def _open(self, hypervisor: Hypervisor, domid: int, port: int, *, fresh: bool) -> _Guest:
        mapping, channel, transport = await self._attach(hypervisor, domid, port)
        page = transport.page
        page.error = 0
        if fresh:
            page.empty()
        if page.connection:
            page.connection = ConnectionWord.CONNECTED
        channel.notify()
        session = self._host.open_session(domid, transport)
        return _Guest(port, mapping, channel, transport, session)

    async def _attach(
        self, hypervisor: Hypervisor, domid: int, port: int
    ) -> tuple[Mapping, Channel, RingTransport]:
        """The ring as it stands, with our feature bits."""
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
        transport = RingTransport(
            mapping.view,
            channel.notify,
            Side.DAEMON,
            f"domain {domid}",
            on_reconnect=lambda: self._begin_anew(domid),
        )
        ring.append(transport)
        transport.page.features = self._host.features(domid)
        return mapping, channel, transport

    def _begin_anew(self, domid: int) -> None:
        guest = self._guests.get(domid)
        if guest is not None:
            guest.session.reset()

    async def _give_back(self, guest: _Guest) -> None:
        guest.session.close()
        guest.transport.close()
        await self._let_go(guest)

    async def _let_go(self, guest: _Guest) -> None:
        """Of its channel and its page."""
        assert self._hypervisor is not None
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

    # ---- saved, and served again ----

    def held(self, domid: int) -> Held | None:
        """What is under way on a domain's ring; None if it has none that works."""
        guest = self._guests.get(domid)
        if guest is None or guest.session.closed:
            return None
        session = guest.session
        unsent, partial = session.unsent
        return Held(
            session.conn, Ring(domid, self._host.target(domid), guest.port), session.inbound, unsent, partial
        )

    def all_held(self) -> list[Held]:
        return [held for held in map(self.held, self._guests) if held is not None]

    def position(self, domid: int) -> RingPosition | None:
        guest = self._guests.get(domid)
        if guest is None or guest.transport.page.released:
            return None
        return RingPosition(domid, *guest.transport.page.indices)

    async def go_on(self, restored: Restored, position: RingPosition | None) -> None:
        """Open the ring of a domain that another process served, as it stands; `carry_on` begins to serve it.
        HypervisorError if it cannot be mapped or bound (any more). position: where the ring stood when the
        connection was written down, if it may have moved since."""
        data = restored.data
        assert self._hypervisor is not None and isinstance(data.spec, Ring)
        domid, port = data.spec.domid, data.spec.evtchn
        mapping, channel, transport = await self._attach(self._hypervisor, domid, port)
        session = self._host.open_session(domid, transport, restored.conn)
        self._guests[domid] = _Guest(port, mapping, channel, transport, session)
        if transport.page.error:
            session.close()  # it was stopped, and knows
            return
        outbound, partial = data.outbound, data.partial
        if position is not None:
            req_cons, rsp_prod = transport.page.indices
            if data.inbound and req_cons != position.req_cons:
                session.stop(RingFault.COMM, None)
                _log.warning("domain %d: a part of a request is lost with the daemon that read it", domid)
                return
            outbound, partial = _after(outbound, partial, (rsp_prod - position.rsp_prod) & 0xFFFF_FFFF)
            restored.conn.drop_queue()
            queue(restored.conn, outbound, partial)
        session.prepare(data.inbound, outbound[:partial])

    async def park(self) -> None:
        """Rings and channels are given back as they stand; sessions keep what is under way. Before another
        process goes on with them; `unpark` if none does."""
        for guest in self._guests.values():
            guest.session.hold()
            guest.transport.detach()
        for guest in list(self._guests.values()):
            await self._let_go(guest)

    def carry_on(self) -> None:
        """Serve those that `go_on` opened."""
        for guest in self._guests.values():
            if guest.session.held:
                guest.session.carry_on(guest.transport)
                guest.channel.notify()

    async def unpark(self) -> None:
        """What `park` gave back is taken again."""
        for domid, guest in list(self._guests.items()):
            assert self._hypervisor is not None
            if guest.session.closed:
                continue
            try:
                found = await self._attach(self._hypervisor, domid, guest.port)
            except (XenbusError, OSError) as exc:
                _log.warning("domain %d is not served any more: %s", domid, exc)
                guest.session.close()
                continue
            guest.mapping, guest.channel, guest.transport = found
            guest.session.carry_on(guest.transport)
            guest.channel.notify()

    async def close(self) -> None:
        """Every ring is given back."""
        guests, self._guests = self._guests, {}
        for guest in guests.values():
            await self._give_back(guest)


def _after(outbound: bytes, partial: int, pushed: int) -> tuple[bytes, int]:
    """What is left of `outbound` when the ring has `pushed` bytes more, and how much of it is the rest of a
    message. More than there was: answers to what came later, and nothing is left."""
    if pushed >= len(outbound):
        return b"", 0
    return outbound[pushed:], next_begin(outbound, partial, pushed) - pushed
