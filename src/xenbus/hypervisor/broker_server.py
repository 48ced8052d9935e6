"""The broker: serves grants, ports and their own lives to domain processes, one socket a handle.

Lives in the supervisor's event loop. May know the tables and the wire; knows nothing of the store or devices.
A handle that breaks the protocol, or does not read while events pile up, is dropped with a log line; the
others do not notice. What is enforced is enforced by who holds which socket: this separates processes that
make mistakes, it is no sandbox against hostile code under the same user.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass

from xenbus.errors import HypervisorError, LinkDown, UsageError
from xenbus.hypervisor import broker_wire as wire
from xenbus.hypervisor.broker_tables import Arena, Domain, Holder, Link, Port, Refused, Run, Tables
from xenbus.hypervisor.broker_wire import Op, ProtocolError
from xenbus.hypervisor.interface import DOMID_FIRST_RESERVED, GNTTAB_RESERVED_XENSTORE, PAGE_SIZE, Held
from xenbus.hypervisor.limits import Limits, check_domid
from xenbus.hypervisor.memory import check_sealed

log = logging.getLogger(__name__)

_MESSAGES_PER_WAKE_UP = 32
_SOCKET_BUFFER = 256 * 1024
# Replies are not made while this many messages wait for the handle to read: a client that asks and does not
# read stops itself. Events are one entry an object (port, link, arena, domain), however often it changes.
_BACKLOG = 64
_RETRY_SECONDS = 0.05


@dataclass(slots=True)
class _Packet:
    """`sent` runs once the packet is in the socket; `pinned` arenas keep their descriptors until then."""

    data: bytes
    fds: tuple[int, ...] = ()
    sent: Callable[[], None] | None = None
    pinned: tuple[Arena, ...] = ()

    def unpin(self) -> None:
        for arena in self.pinned:
            arena.unpin()


_Builder = Callable[[], _Packet | None]


class Handle:
    """One socket of one domain: reads requests, answers, tells events. A Listener of the tables."""

    def __init__(self, broker: Broker, domain: Domain, privileged: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self.theirs: socket.socket | None = theirs
        self.broker = broker
        self.domain = domain
        self.privileged = privileged
        self.holder = Holder(broker.tables, domain, self)
        self.suspend_serial: int | None = None
        self.renamed = False  # restored under another domid, and not told yet
        self.open = True
        self._sock = ours
        self._receiver = wire.Receiver(ours, 1)
        self._out: dict[object, _Packet | _Builder] = {}
        self._reply_key = 0
        self._reading = False
        self._writing = False
        self._loop = asyncio.get_running_loop()
        self._read(True)

    # -- receiving

    def _read(self, on: bool) -> None:
        if on != self._reading:
            self._reading = on
            if on:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)

    def _readable(self) -> None:
        try:
            for _ in range(_MESSAGES_PER_WAKE_UP):
                if len(self._out) >= _BACKLOG:
                    self._read(False)
                    break
                message = self._receiver.receive()
                if message is None:
                    self.broker.drop(self, "end of file")
                    break
                self._dispatch(message)
        except (BlockingIOError, InterruptedError):
            pass
        except ProtocolError as error:
            self.broker.drop(self, f"broke the protocol: {error}")
        except OSError as error:
            self.broker.drop(self, f"lost: {error}")
        self.broker.settle()

    def _dispatch(self, message: wire.Message) -> None:
        handler = _HANDLERS.get(message.op)
        try:
            if handler is None:
                raise ProtocolError(f"operation {message.op}")
            if message.fds and message.op != Op.ARENA:
                raise ProtocolError(f"a descriptor with operation {message.op}")
            try:
                if self.renamed:
                    raise Refused(errno.ESTALE)  # it does not know its new domid yet
                reply = handler(self, message)
            except Refused as refused:
                reply = wire.encode(message.op, message.serial, status=refused.errno)
        finally:
            wire.close_all(message.fds)
        if isinstance(reply, bytes):
            self._queue(None, _Packet(reply))
        elif reply is not None:
            self._queue(None, reply)

    # -- sending

    def _queue(self, key: object, item: _Packet | _Builder) -> None:
        """key: of an event, so that an object that changes often waits in the queue once."""
        if not self.open:
            return
        if key is None:
            self._reply_key += 1
            key = self._reply_key
        self._out.setdefault(key, item)
        self.broker.touched[self] = None

    def flush(self) -> None:
        """Sends what the socket takes. Drops the handle when too much is left."""
        try:
            while self._out:
                key, item = next(iter(self._out.items()))
                packet = item if isinstance(item, _Packet) else item()
                if packet is not None:
                    wire.send(self._sock, packet.data, packet.fds)
                    if packet.sent is not None:
                        packet.sent()
                    packet.unpin()
                del self._out[key]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                # unix(7): too many descriptors under way; somebody else may be the one who does not read.
                self._loop.call_later(_RETRY_SECONDS, self._writable)
                return
            self.broker.drop(self, f"lost: {error}")
            return
        if len(self._out) > self.broker.max_queued:
            self.broker.drop(self, f"does not read: {len(self._out)} messages wait")
            return
        if bool(self._out) != self._writing:
            self._writing = bool(self._out)
            if self._writing:
                self._loop.add_writer(self._sock, self._writable)
            else:
                self._loop.remove_writer(self._sock)
        if not self._out:
            self._read(True)

    def _writable(self) -> None:
        if self.open:
            self.flush()
            self.broker.settle()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._read(False)
            if self._writing:
                self._loop.remove_writer(self._sock)
            for item in self._out.values():
                if isinstance(item, _Packet):
                    item.unpin()
            self._out.clear()
            self._sock.close()
            if self.theirs is not None:
                self.theirs.close()

    # -- events

    def port_changed(self, port: Port) -> None:
        if port.told:
            self._queue(("port", port.number), lambda: self._port_state(port, Op.PORT, 0))

    def link_gone(self, link: Link) -> None:
        self._queue(("link", link.id), _Packet(wire.encode(Op.LINK_GONE, 0, wire.LINK.pack(link.id))))

    def arena_gone(self, arena: Arena) -> None:
        self._queue(("arena", arena.base), _Packet(wire.encode(Op.ARENA_GONE, 0, wire.REF.pack(arena.base))))

    def domain_dead(self, domid: int) -> None:
        self._queue(("dead", domid), _Packet(wire.encode(Op.DEAD, 0, wire.DOMID.pack(domid))))

    def _port_state(self, port: Port, op: Op, serial: int) -> _Packet | None:
        """Built when it is sent: what is said is the state then, and the link's descriptors go along once."""
        if self.holder.ports.get(port.number) is not port:
            return _Packet(wire.encode(op, serial, status=errno.ENOENT)) if serial else None
        link, side = port.link, port.side
        if link is None:
            return _Packet(wire.encode(op, serial, wire.PORT_STATE.pack(port.number, 0, 0, 0, 0)))
        new = side in link.unsent
        payload = wire.PORT_STATE.pack(port.number, link.id, port.index, side, new)
        data = wire.encode(op, serial, payload)
        if not new:
            return _Packet(data)
        return _Packet(data, link.descriptors(side), lambda: link.sent(side))

    # -- requests: each returns what to answer, or raises Refused or ProtocolError

    def hello(self, message: wire.Message) -> bytes:
        magic, version = wire.HELLO.unpack(message.payload)
        if magic != wire.MAGIC or version != wire.VERSION:
            raise ProtocolError(f"a greeting of {magic:#x} version {version}")
        return wire.encode(Op.HELLO, message.serial, wire.WELCOME.pack(self.domain.domid, self.privileged))

    def alloc(self, message: wire.Message) -> bytes:
        grantee, writable, count = wire.ALLOC.unpack(message.payload)
        _check_request(grantee, writable, count)
        arena, first = self.holder.alloc(grantee, count, bool(writable))
        return wire.encode(Op.ALLOC, message.serial, wire.ALLOCATED.pack(arena.base, arena.base + first))

    def arena(self, message: wire.Message) -> bytes:
        grantee, writable, pages = wire.ARENA.unpack(message.payload)
        _check_request(grantee, writable, pages)
        if len(message.fds) != 1:
            raise ProtocolError(f"{len(message.fds)} descriptors with an arena")
        try:
            check_sealed(message.fds[0], pages * PAGE_SIZE, writable=bool(writable))
        except HypervisorError as error:
            raise ProtocolError(str(error)) from None
        self.holder.check_room_for_arena(pages)
        try:
            fd = socket.dup(message.fds[0])
        except OSError as error:
            raise Refused(error.errno or errno.EMFILE) from None
        arena = self.holder.add_arena(grantee, pages, bool(writable), fd)
        return wire.encode(Op.ARENA, message.serial, wire.REF.pack(arena.base))

    def revoke(self, message: wire.Message) -> bytes:
        self.holder.revoke(*wire.REVOKE.unpack(message.payload))
        return wire.encode(Op.REVOKE, message.serial)

    def map(self, message: wire.Message) -> _Packet | bytes:
        strict, entries = wire.MAP.unpack_from(message.payload)
        if not 0 < entries <= wire.MAP_ENTRIES_MAX:
            raise ProtocolError(f"a mapping of {entries} entries")
        if len(message.payload) != wire.MAP.size + entries * wire.MAP_ENTRY.size:
            raise ProtocolError("a mapping of another length than it says")
        slots: list[tuple[int, Run | None]] = []
        for domid, writable, ref, count in wire.MAP_ENTRY.each(message.payload, wire.MAP.size, entries):
            _check_request(domid, writable, count)
            if not strict and count != 1:
                raise ProtocolError("more than one page in an entry of its own fate")
            try:
                slots.extend((0, run) for run in self.holder.resolve(domid, ref, count, bool(writable)))
            except Refused as refused:
                if strict:
                    raise
                slots.append((refused.errno, None))
        return self._map(message.serial, slots)

    def _map(self, serial: int, slots: list[tuple[int, Run | None]]) -> _Packet | bytes:
        runs = [run for _, run in slots if run is not None]
        self.holder.check_room_for_map(sum(run.count for run in runs))
        if len({run.arena for run in runs} - self.holder.uses.keys()) > wire.FDS_MAX:
            raise Refused(errno.E2BIG)
        if wire.HEADER.size + wire.MAPPED.size + len(slots) * wire.SLOT.size > wire.MESSAGE_MAX - 4096:
            raise Refused(errno.E2BIG)
        number, new = self.holder.map(runs)
        parts = [wire.MAPPED.pack(number, len(slots), len(new))]
        for status, run in slots:
            where = (run.arena.id, run.first, run.count) if run is not None else (0, 0, 0)
            parts.append(wire.SLOT.pack(status, *where))
        parts += [wire.NEW_ARENA.pack(arena.id, arena.pages, arena.writable) for arena in new]
        data = wire.encode(Op.MAP, serial, b"".join(parts))
        if not new:
            return data
        return _with_arenas(data, *new)

    def unmap(self, message: wire.Message) -> bytes:
        self.holder.unmap(*wire.MAP_ID.unpack(message.payload))
        return wire.encode(Op.UNMAP, message.serial)

    def port_alloc(self, message: wire.Message) -> bytes:
        (remote_domid,) = wire.DOMID.unpack(message.payload)
        _check_request(remote_domid)
        port = self.holder.alloc_port(remote_domid)
        return wire.encode(Op.PORT_ALLOC, message.serial, wire.PORT.pack(port.number))

    def port_bind(self, message: wire.Message) -> _Packet | bytes | None:
        remote_domid, remote_port = wire.BIND.unpack(message.payload)
        _check_request(remote_domid)
        port = self.holder.bind(remote_domid, remote_port)
        self._queue(None, lambda: self._port_state(port, Op.PORT_BIND, message.serial))
        return None

    def port_close(self, message: wire.Message) -> bytes:
        self.holder.close_port(*wire.PORT.unpack(message.payload))
        return wire.encode(Op.PORT_CLOSE, message.serial)

    def start_info(self, message: wire.Message) -> None:
        port = self.domain.store_port
        if message.payload:
            raise ProtocolError("start info takes nothing")
        if port is None or port.holder is not self.holder or port.told:
            raise Refused(errno.ENOENT)
        port.told = True
        arena = self.holder.arenas[GNTTAB_RESERVED_XENSTORE]
        payload = wire.STARTED.pack(arena.base, port.number)
        self._queue(None, _with_arenas(wire.encode(Op.START_INFO, message.serial, payload), arena))
        if port.link is not None:
            self.port_changed(port)  # the store bound it before the guest asked

    def suspend(self, message: wire.Message) -> None:
        if message.payload:
            raise ProtocolError("suspend takes nothing")
        if self.holder is not self.domain.holders[0]:
            raise Refused(errno.EPERM)
        if self.suspend_serial is not None:
            raise Refused(errno.EBUSY)
        self.suspend_serial = message.serial
        self.broker.note_parked(self.domain.domid)

    def resumed(self, cancelled: bool) -> None:
        serial, self.suspend_serial = self.suspend_serial, None
        self.renamed = False
        if serial is not None:
            payload = wire.SUSPENDED.pack(cancelled, self.domain.domid)
            self._queue(None, _Packet(wire.encode(Op.SUSPEND, serial, payload)))


def _with_arenas(data: bytes, *arenas: Arena) -> _Packet:
    for arena in arenas:
        arena.pin()
    return _Packet(data, tuple(arena.fd for arena in arenas), pinned=arenas)


def _check_request(domid: int, flag: int = 0, count: int = 1) -> None:
    if domid >= DOMID_FIRST_RESERVED or flag > 1:
        raise ProtocolError(f"domain {domid}, flag {flag}")
    if not count:
        raise ProtocolError("no page")
    if count > wire.ARENA_PAGES_MAX:
        raise Refused(errno.ENOSPC)


_HANDLERS: dict[int, Callable[[Handle, wire.Message], _Packet | bytes | None]] = {
    Op.HELLO: Handle.hello,
    Op.ALLOC: Handle.alloc,
    Op.ARENA: Handle.arena,
    Op.REVOKE: Handle.revoke,
    Op.MAP: Handle.map,
    Op.UNMAP: Handle.unmap,
    Op.PORT_ALLOC: Handle.port_alloc,
    Op.PORT_BIND: Handle.port_bind,
    Op.PORT_CLOSE: Handle.port_close,
    Op.START_INFO: Handle.start_info,
    Op.SUSPEND: Handle.suspend,
}


class Broker:
    """Make it, and call it, in one running event loop.

    on_dead:    called with the domid after everything the domain held was taken back.
    limits:     what one domain may hold
    max_queued: messages that may wait for a handle that does not read, before it is dropped
    """

    def __init__(
        self,
        on_dead: Callable[[int], None] | None = None,
        *,
        limits: Limits | None = None,
        max_queued: int = 65536,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.max_queued = max_queued
        # An arena costs us a descriptor: half of what the process may open is for everything else.
        self.tables = Tables(limits or Limits(), resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self.touched: dict[Handle, None] = {}
        self._handles: dict[Domain, list[Handle]] = {}
        self._unclaimed: set[Domain] = set()
        self._parked: dict[int, asyncio.Event] = {}
        self._dropping: dict[Handle, str] = {}
        self._settling = False
        self._dead_callbacks = [on_dead] if on_dead is not None else []

    def create(self, domid: int, *, store_domid: int = 0) -> None:
        """Makes the domain, its primary handle, its store ring page (grant 1) and an unbound store port.

        The domain of `store_domid` itself has neither page nor port. UsageError if `domid` is there already.
        """
        if self.tables.exists(check_domid(domid)):
            raise UsageError(f"there is a domain {domid} already")
        domain = Domain(domid, check_domid(store_domid) if store_domid != domid else None)
        self.tables.domains[domid] = domain
        self._handles[domain] = []
        self._add_handle(domain, False)
        self._unclaimed.add(domain)
        self.tables.build(domain)

    def _add_handle(self, domain: Domain, privileged: bool) -> Handle:
        handle = Handle(self, domain, privileged)
        self._handles[domain].append(handle)
        domain.holders.append(handle.holder)
        return handle

    def _domain(self, domid: int) -> Domain:
        domain = self.tables.domains.get(domid)
        if domain is None:
            raise UsageError(f"there is no domain {domid}")
        return domain

    def handle(self, domid: int, *, privileged: bool = False) -> socket.socket:
        """The process's end of a new handle: give it away and close it here. The first one is the primary:
        the domain is dead at its end of file. A privileged handle is told of deaths."""
        domain = self._domain(domid)
        if domain in self._unclaimed:
            self._unclaimed.discard(domain)
            handle = self._handles[domain][0]
            handle.privileged = privileged
        else:
            handle = self._add_handle(domain, privileged)
        theirs, handle.theirs = handle.theirs, None
        if theirs is None:
            raise UsageError(f"the handle of domain {domid} was given away already")
        return theirs

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead_callbacks.append(callback)

    def destroy(self, domid: int) -> None:
        """Takes the domain down; its process sees end of file. Nothing happens if it is not there."""
        domain = self.tables.domains.get(domid)
        if domain is not None:
            self.drop(self._handles[domain][0], "destroyed")
            self.settle()

    def held(self, domid: int) -> Held:
        domain = self.tables.domains.get(domid)
        return domain.held() if domain is not None else Held(0, 0, 0)

    def domids(self) -> tuple[int, ...]:
        return tuple(self.tables.domains)

    def store_port(self, domid: int) -> int:
        """For INTRODUCE. UsageError if the domain has none."""
        port = self._domain(domid).store_port
        if port is None:
            raise UsageError(f"domain {domid} has no store port")
        return port.number

    # -- suspend and resume

    def note_parked(self, domid: int) -> None:
        self._parked.setdefault(domid, asyncio.Event()).set()

    async def suspended(self, domid: int) -> None:
        """Returns when the domain has parked itself; LinkDown if it dies instead. Set a deadline."""
        domain = self._domain(domid)
        await self._parked.setdefault(domid, asyncio.Event()).wait()
        if self.tables.domains.get(domid) is not domain:
            raise LinkDown(f"domain {domid} died before it suspended")

    def rename(self, domid: int, new_domid: int) -> None:
        """Gives a parked domain a new id and a fresh ring page and store port; what it held is gone.

        It stays parked, so that a toolstack can introduce it and write its nodes before it goes on. Told to
        privileged handles as the death of the old one, as after `xl restore`; `on_dead` is not called, for
        the process lives.
        """
        primary = self._parked_handle(domid)
        if self.tables.exists(check_domid(new_domid)):
            raise UsageError(f"there is a domain {new_domid} already")
        self._parked[new_domid] = self._parked.pop(domid)
        primary.renamed = True
        self._rename(primary.domain, primary, new_domid)
        self.settle()

    def resume(self, domid: int, *, cancelled: bool | None = None, new_domid: int | None = None) -> None:
        """Lets a parked domain go on: as it was, or, if it was renamed (or is, by `new_domid`), anew."""
        primary = self._parked_handle(domid)
        if cancelled is not None and cancelled == (new_domid is not None or primary.renamed):
            raise UsageError("a resume is either cancelled or has a new domid")
        if new_domid is not None:
            self.rename(domid, new_domid)
            domid = new_domid
        self._parked.pop(domid, None)
        primary.resumed(not primary.renamed)
        self.settle()

    def _parked_handle(self, domid: int) -> Handle:
        primary = self._handles[self._domain(domid)][0]
        if primary.suspend_serial is None:
            raise UsageError(f"domain {domid} is not suspended")
        return primary

    def _rename(self, domain: Domain, primary: Handle, new_domid: int) -> None:
        for handle in self._handles[domain][1:]:
            self.drop(handle, "its domain was restored")
        primary.holder.give_back()
        old = domain.domid
        del self.tables.domains[old]
        domain.domid = new_domid
        self.tables.domains[new_domid] = domain
        self.tables.build(domain)
        self.tables.shed_for(old)
        self._tell_dead(old)

    def _wake_waiters(self, domid: int) -> None:
        event = self._parked.pop(domid, None)
        if event is not None:
            event.set()

    # -- the end of handles

    def drop(self, handle: Handle, why: str) -> None:
        """At the next settle(): never in the middle of somebody's request."""
        self._dropping.setdefault(handle, why)

    def settle(self) -> None:
        """Sends what a request or a call has caused, and buries what fell meanwhile."""
        if self._settling:
            return
        self._settling = True
        try:
            while self._dropping or self.touched:
                while self._dropping:
                    handle, why = next(iter(self._dropping.items()))
                    self._bury(handle, why)
                    del self._dropping[handle]
                while self.touched:
                    handle = next(iter(self.touched))
                    del self.touched[handle]
                    if handle.open:
                        handle.flush()
        finally:
            self._settling = False

    def _bury(self, handle: Handle, why: str) -> None:
        if not handle.open:
            return
        domain = handle.domain
        handles = self._handles[domain]
        primary = handle is handles[0]
        log.info("domain %d: %s handle: %s", domain.domid, "primary" if primary else "second", why)
        for fallen in handles[:] if primary else [handle]:
            fallen.close()
            handles.remove(fallen)
            fallen.holder.give_back()
            domain.holders.remove(fallen.holder)
        if primary:
            self._end(domain)

    def _end(self, domain: Domain) -> None:
        del self._handles[domain]
        del self.tables.domains[domain.domid]
        self._unclaimed.discard(domain)
        self._wake_waiters(domain.domid)
        self.tables.shed_for(domain.domid)
        self._tell_dead(domain.domid)
        for callback in self._dead_callbacks:
            try:
                callback(domain.domid)
            except Exception as error:  # noqa: BLE001 - others' callback
                context = {"message": f"on_dead({domain.domid})", "exception": error}
                self.loop.call_exception_handler(context)

    def _tell_dead(self, domid: int) -> None:
        for handles in self._handles.values():
            for handle in handles:
                if handle.privileged and handle.domain.domid != domid:
                    handle.domain_dead(domid)

    async def close(self) -> None:
        """Takes every domain down. Idempotent."""
        for domid in self.domids():
            self.destroy(domid)
