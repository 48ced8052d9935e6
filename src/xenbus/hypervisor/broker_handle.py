"""One socket of the broker: takes a domain's requests, answers them, tells it what happens to it.

Every limit on what a domain process may say or leave unread is here. Knows the tables and the wire; what ends
a domain is the broker's to decide.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenbus.errors import HypervisorError
from xenbus.hypervisor import broker_wire as wire
from xenbus.hypervisor.broker_tables import Arena, Domain, Holder, Link, Port, Refused, Run
from xenbus.hypervisor.broker_wire import Op, ProtocolError
from xenbus.hypervisor.interface import DOMID_FIRST_RESERVED, GNTTAB_RESERVED_XENSTORE, PAGE_SIZE
from xenbus.hypervisor.memory import check_sealed

if TYPE_CHECKING:
    from xenbus.hypervisor.broker_server import Broker

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
        self._receiver = wire.Receiver(ours, 1, broker.reserve)
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
            self.broker.reserve.fill()
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
