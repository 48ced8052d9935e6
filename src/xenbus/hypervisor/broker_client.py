"""A domain process's handle on the broker: grants, mappings, ports, its own life.

Runs in the domain's event loop. May know the wire, memory and links; knows nothing of the store or devices.
Every request has a deadline; when the broker goes away every waiter gets LinkDown, and `on_lost` is called.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenbus.errors import HypervisorError, UsageError
from xenbus.hypervisor import broker_wire as wire
from xenbus.hypervisor.broker_call import DEADLINE_SECONDS, BrokerCall
from xenbus.hypervisor.broker_links import BrokerChannel, LinkEnd
from xenbus.hypervisor.broker_wire import Message, Op, ProtocolError
from xenbus.hypervisor.handle import Handle
from xenbus.hypervisor.interface import (
    PAGE_SIZE,
    Channel,
    CopyOp,
    DomainEvents,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_okay,
    GNTST_permission_denied,
    GrantedPages,
    GuestLife,
    Held,
    Hypervisor,
    Mapping,
    StartInfo,
    SuspendResult,
    check_copy,
)
from xenbus.hypervisor.limits import check_domid
from xenbus.hypervisor.memory import (
    F_SEAL_FUTURE_WRITE,
    SIZE_SEALS,
    Region,
    add_seals,
    check_sealed,
    release,
    sealed_memfd,
)

_ARENA_PAGES_FIRST = 256
_ARENA_PAGES_MOST = 4096
_COPY_STATUS = {errno.ENOENT: GNTST_bad_gntref, errno.EPERM: GNTST_permission_denied}


@dataclass(slots=True, eq=False)
class _OwnArena:
    """`used`: pages that were given out once and are zeroed before they are again."""

    kind: tuple[int, bool]
    region: Region
    used: bytearray


@dataclass(slots=True, eq=False)
class _PeerArena:
    """An arena of somebody else, mapped whole. `uses` counts mapped pages just as the broker does, so that
    both know when its descriptor must be sent again. region None: it could not be mapped here."""

    region: Region | None
    uses: int = 0


@dataclass(slots=True, eq=False)
class BrokerPages:
    """GrantedPages. `view` raises ValueError once revoked."""

    domid: int
    refs: tuple[int, ...]
    writable: bool
    view: memoryview


@dataclass(slots=True, eq=False)
class BrokerMapping:
    """Mapping. `view` raises ValueError once unmapped."""

    domid: int
    refs: tuple[int, ...]
    writable: bool
    view: memoryview
    raw: _RawMapping
    region: Region | None


@dataclass(slots=True, eq=False)
class _RawMapping:
    """What the broker answered to MAP: (errno, arena, first page, pages) each."""

    number: int
    slots: list[tuple[int, _PeerArena | None, int, int]] = field(default_factory=list)
    arenas: dict[int, int] = field(default_factory=dict)


class BrokerHypervisor(Handle):
    """Hypervisor, GuestLife and DomainEvents over a broker socket. Made by `connect`."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._call = BrokerCall(sock, deadline, self._event, self._ended)
        self._lost_callbacks: list[Callable[[], None]] = []
        self._dead_callbacks: list[Callable[[int], None]] = []
        self.privileged = False
        self._own: dict[int, _OwnArena] = {}
        self._arena_locks: dict[tuple[int, bool], asyncio.Lock] = {}
        self._granted: dict[BrokerPages, None] = {}
        self._granted_pages = 0
        self._peers: dict[int, _PeerArena] = {}
        self._mappings: dict[BrokerMapping, None] = {}
        self._mapped_pages = 0
        self._links: dict[tuple[int, int], LinkEnd | None] = {}
        self._channels: dict[int, BrokerChannel] = {}
        self._start: StartInfo | None = None

    def held(self) -> Held:
        return Held(self._granted_pages, self._mapped_pages, len(self._channels))

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead_callbacks.append(callback)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Called at once if the broker is gone already."""
        self._lost_callbacks.append(callback)
        if self._call.lost is not None:
            self._loop.call_soon(callback)

    # -- grants

    async def alloc(self, domid: int, count: int, *, writable: bool = True) -> BrokerPages:
        check_domid(domid)
        if count < 1:
            raise UsageError(f"{count} pages")
        what = f"granting {count} pages to domain {domid}"
        if count > wire.ARENA_PAGES_MAX:
            raise HypervisorError("ENOSPC", what)
        payload = wire.ALLOC.pack(domid, writable, count)

        def accept(message: Message) -> BrokerPages:
            return self._allocated(message, domid, count, writable)

        # One at a time a kind: several that find no room would each bring an arena.
        async with self._arena_locks.setdefault((domid, writable), asyncio.Lock()):
            while True:
                try:
                    return await self._call.request(Op.ALLOC, payload, accept, what, undo=self._revoke)
                except HypervisorError as error:
                    if error.name != "EAGAIN":
                        raise
                await self._add_arena(domid, count, writable)

    def _allocated(self, message: Message, domid: int, count: int, writable: bool) -> BrokerPages:
        base, ref = wire.ALLOCATED.unpack(message.payload)
        arena = self._own.get(base)
        first = ref - base
        if arena is None or not 0 <= first <= len(arena.used) - count:
            raise ProtocolError(f"pages in arena {base}, which is not ours")
        if any(arena.used[first : first + count]):
            arena.region.zero(first, count)
        arena.used[first : first + count] = b"\1" * count
        pages = BrokerPages(domid, tuple(range(ref, ref + count)), writable, arena.region.pages(first, count))
        self._granted[pages] = None
        self._granted_pages += count
        return pages

    async def _add_arena(self, domid: int, count: int, writable: bool) -> None:
        """A new sealed memfd for this grantee and mode, mapped here, then given to the broker."""
        alike = sum(arena.kind == (domid, writable) for arena in self._own.values())
        size = min(_ARENA_PAGES_FIRST << min(alike, 8), _ARENA_PAGES_MOST)
        pages = max(size, count)
        what = f"an arena of {pages} pages for domain {domid}"
        try:
            fd = sealed_memfd(f"xenbus-{self._domid}-{domid}", pages * PAGE_SIZE)
        except OSError as error:
            raise HypervisorError(errno.errorcode.get(error.errno or 0, "EIO"), what) from None
        region = Region.of_fd(fd, pages * PAGE_SIZE, writable=True)
        # memfd_create(2): after this seal nobody maps it writable any more; our mapping stays as it is.
        add_seals(fd, SIZE_SEALS | (0 if writable else F_SEAL_FUTURE_WRITE))

        def accept(message: Message) -> None:
            (base,) = wire.REF.unpack(message.payload)
            self._own[base] = _OwnArena((domid, writable), region, bytearray(pages))

        await self._call.request(Op.ARENA, wire.ARENA.pack(domid, writable, pages), accept, what, fds=(fd,))

    async def revoke(self, pages: GrantedPages) -> None:
        if isinstance(pages, BrokerPages) and pages in self._granted:
            await self._call.give_back(Op.REVOKE, self._forget_pages(pages), _ignore)

    def _revoke(self, pages: BrokerPages) -> None:
        self._call.tell(Op.REVOKE, self._forget_pages(pages), _ignore)

    def _forget_pages(self, pages: BrokerPages) -> bytes:
        del self._granted[pages]
        self._granted_pages -= len(pages.refs)
        release(pages.view)
        return wire.REVOKE.pack(pages.refs[0], len(pages.refs))

    def _arena_gone(self, message: Message) -> None:
        (base,) = wire.REF.unpack(message.payload)
        arena = self._own.pop(base, None)
        if arena is not None:
            arena.region.close()

    # -- mappings

    async def map(self, domid: int, refs: Sequence[int], *, writable: bool = True) -> BrokerMapping:
        check_domid(domid)
        if not refs:
            raise UsageError("mapping no page")
        what = f"mapping {len(refs)} pages of domain {domid} for domain {self._domid}"
        entries = [wire.MAP_ENTRY.pack(domid, writable, ref, count) for ref, count in wire.runs_of(refs)]
        if len(entries) > wire.MAP_ENTRIES_MAX:
            raise HypervisorError("E2BIG", what)

        def accept(message: Message) -> BrokerMapping:
            raw = self._mapped(message)
            try:
                return self._mapping(raw, domid, tuple(refs), writable)
            except HypervisorError:
                self._unmap_raw(raw)
                raise

        payload = wire.MAP.pack(1, len(entries)) + b"".join(entries)
        return await self._call.request(Op.MAP, payload, accept, what, undo=self._unmap)

    def _mapped(self, message: Message) -> _RawMapping:
        """Books what the broker has mapped, and maps the arenas that came along."""
        number, n_slots, n_new = wire.MAPPED.unpack_from(message.payload)
        raw = _RawMapping(number)
        slots_end = wire.MAPPED.size + n_slots * wire.SLOT.size
        try:
            new = list(wire.NEW_ARENA.each(message.payload, slots_end, n_new))
            if len(message.fds) != n_new:
                raise ProtocolError(f"{len(message.fds)} descriptors for {n_new} arenas")
            for fd, (arena, pages, writable) in zip(message.fds, new, strict=True):
                self._peers[arena] = _PeerArena(_try_region(fd, pages * PAGE_SIZE, bool(writable)))
        finally:
            wire.close_all(message.fds)
        for status, number, first, count in wire.SLOT.each(message.payload, wire.MAPPED.size, n_slots):
            peer = self._peers.get(number) if not status else None
            if peer is not None:
                peer.uses += count
                raw.arenas[number] = raw.arenas.get(number, 0) + count
            raw.slots.append((status, peer, first, count))
        return raw

    def _mapping(self, raw: _RawMapping, domid: int, refs: tuple[int, ...], writable: bool) -> BrokerMapping:
        runs: list[tuple[Region, int, int]] = []
        for _, peer, first, count in raw.slots:
            if peer is None or peer.region is None:
                raise HypervisorError("ENOMEM", f"mapping {len(refs)} pages of domain {domid}")
            if (first + count) * PAGE_SIZE > peer.region.length:
                raise ProtocolError("pages beyond their arena")
            if runs and runs[-1][0] is peer.region and runs[-1][1] + runs[-1][2] == first:
                runs[-1] = (peer.region, runs[-1][1], runs[-1][2] + count)
            else:
                runs.append((peer.region, first, count))
        if sum(count for _, _, count in runs) != len(refs):
            raise ProtocolError(f"another number of pages than the {len(refs)} asked for")
        region = None
        if len(runs) == 1:
            view = runs[0][0].pages(*runs[0][1:])
        else:
            region = Region.stitched(runs, writable=writable)
            view = region.pages(0, len(refs))
        mapping = BrokerMapping(domid, refs, writable, view if writable else view.toreadonly(), raw, region)
        self._mappings[mapping] = None
        self._mapped_pages += len(refs)
        return mapping

    async def unmap(self, mapping: Mapping) -> None:
        if isinstance(mapping, BrokerMapping) and mapping in self._mappings:
            self._forget_mapping(mapping)
            payload = wire.MAP_ID.pack(mapping.raw.number)
            await self._call.give_back(Op.UNMAP, payload, lambda _: self._unmapped(mapping.raw))

    def _unmap(self, mapping: BrokerMapping) -> None:
        self._forget_mapping(mapping)
        self._unmap_raw(mapping.raw)

    def _unmap_raw(self, raw: _RawMapping) -> None:
        self._call.tell(Op.UNMAP, wire.MAP_ID.pack(raw.number), lambda _: self._unmapped(raw))

    def _forget_mapping(self, mapping: BrokerMapping) -> None:
        del self._mappings[mapping]
        self._mapped_pages -= len(mapping.refs)
        release(mapping.view)
        if mapping.region is not None:
            mapping.region.close()

    def _unmapped(self, raw: _RawMapping) -> None:
        for number, count in raw.arenas.items():
            peer = self._peers[number]
            peer.uses -= count
            if not peer.uses:
                del self._peers[number]
                if peer.region is not None:
                    peer.region.close()

    async def copy(self, ops: Sequence[CopyOp]) -> list[int]:
        status = [GNTST_okay if check_copy(op) else GNTST_bad_copy_arg for op in ops]
        good = [number for number, value in enumerate(status) if value == GNTST_okay]
        for at in range(0, len(good), wire.MAP_ENTRIES_MAX):
            await self._copy(ops, good[at : at + wire.MAP_ENTRIES_MAX], status)
        return status

    async def _copy(self, ops: Sequence[CopyOp], numbers: list[int], status: list[int]) -> None:
        """Maps the pages of these segments for the moment, each with a fate of its own."""
        entries: list[bytes] = []
        for number in numbers[:]:
            op = ops[number]
            try:
                entries.append(
                    wire.MAP_ENTRY.pack(check_domid(op.domid), op.to_remote, wire.check_ref(op.ref), 1)
                )
            except UsageError:
                status[number] = GNTST_bad_domain
                numbers.remove(number)
            except HypervisorError:
                status[number] = GNTST_bad_gntref
                numbers.remove(number)
        if not entries:
            return

        def accept(message: Message) -> None:
            raw = self._mapped(message)
            if len(raw.slots) != len(numbers):
                raise ProtocolError("another number of slots than asked for")
            for number, (error, peer, page, _) in zip(numbers, raw.slots, strict=True):
                if error:
                    status[number] = _COPY_STATUS.get(error, GNTST_general_error)
                else:
                    status[number] = _copy_segment(ops[number], peer, page)
            self._unmap_raw(raw)

        payload = wire.MAP.pack(0, len(entries)) + b"".join(entries)
        await self._call.request(Op.MAP, payload, accept, f"copying {len(entries)} segments")

    # -- event channels

    async def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> BrokerChannel:
        def accept(message: Message) -> BrokerChannel:
            (port,) = wire.PORT.unpack(message.payload)
            return self._add_channel(port, remote_domid, handler)

        payload = wire.DOMID.pack(check_domid(remote_domid))
        what = f"a port for domain {remote_domid}"
        return await self._call.request(Op.PORT_ALLOC, payload, accept, what, undo=self._close_channel)

    async def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> BrokerChannel:
        what = f"port {remote_port} of domain {remote_domid} for domain {self._domid}"
        if not 0 <= remote_port < 1 << 32:
            raise HypervisorError("ENOENT", what)

        def accept(message: Message) -> BrokerChannel:
            (port, *_) = wire.PORT_STATE.unpack(message.payload)
            channel = self._add_channel(port, remote_domid, handler)
            try:
                self._port_changed(message)
            except HypervisorError:
                self._close_channel(channel)
                raise
            channel.kick_self()  # event_channel.c: the binder looks once for what it missed
            return channel

        payload = wire.BIND.pack(check_domid(remote_domid), remote_port)
        return await self._call.request(Op.PORT_BIND, payload, accept, what, undo=self._close_channel)

    def _add_channel(self, port: int, remote_domid: int, handler: Callable[[], None]) -> BrokerChannel:
        channel = BrokerChannel(port, remote_domid, handler, self._channel_closed)
        self._channels[port] = channel
        return channel

    async def _channel_closed(self, channel: BrokerChannel) -> None:
        if self._channels.pop(channel.port, None) is not None:
            await self._call.give_back(Op.PORT_CLOSE, wire.PORT.pack(channel.port), _ignore)

    def _close_channel(self, channel: BrokerChannel) -> None:
        channel.drop()
        self._channels.pop(channel.port, None)
        self._call.tell(Op.PORT_CLOSE, wire.PORT.pack(channel.port), _ignore)

    def _port_changed(self, message: Message) -> None:
        port, number, index, side, new = wire.PORT_STATE.unpack(message.payload)
        if new:
            if len(message.fds) != 3 or side > 1:
                wire.close_all(message.fds)
                raise ProtocolError(f"a link with {len(message.fds)} descriptors")
            self._links[number, side] = LinkEnd.kept(message.fds, side, self._call.reserve)
        channel = self._channels.get(port)
        if channel is None:
            return  # closed meanwhile
        if not number:
            channel.unbind()
            return
        if (number, side) not in self._links or index >= wire.LINK_PORTS:
            raise ProtocolError(f"port {port} on a link that was not told")
        link = self._links[number, side]
        if link is None:
            channel.unbind()
            raise HypervisorError("EMFILE", f"port {port}: no descriptor was free for its doorbells")
        channel.bind(link, index)

    def _port_event(self, message: Message) -> None:
        try:
            self._port_changed(message)
        except HypervisorError as error:
            logging.getLogger(__name__).error("%s", error)  # nobody asked for this message

    def _link_gone(self, message: Message) -> None:
        (number,) = wire.LINK.unpack(message.payload)
        for side in (0, 1):
            link = self._links.pop((number, side), None)
            if link is not None:
                link.close()

    def _domain_dead(self, message: Message) -> None:
        (domid,) = wire.DOMID.unpack(message.payload)
        for callback in list(self._dead_callbacks):
            self._loop.call_soon(callback, domid)

    # -- its own life

    async def start_info(self, store_handler: Callable[[], None]) -> StartInfo:
        """Again before the next resume: the same, with the new handler."""
        if self._start is None:
            await self._call.request(Op.START_INFO, b"", self._started, f"start info of domain {self._domid}")
        start = self._start
        if start is None:
            raise HypervisorError("ENOENT", f"start info of domain {self._domid}")
        channel = self._channels.get(start.store_channel.port)
        if channel is not None:
            channel.take_over(store_handler)
        return start

    def _started(self, message: Message) -> None:
        try:
            ref, port = wire.STARTED.unpack(message.payload)
            if len(message.fds) != 1:
                raise ProtocolError("start info without its page")
            check_sealed(message.fds[0], PAGE_SIZE, writable=True)
            region = Region.of_fd(message.fds[0], PAGE_SIZE, writable=True)
        finally:
            wire.close_all(message.fds)
        self._own[ref] = _OwnArena((0, True), region, bytearray(b"\1"))
        pages = BrokerPages(0, (ref,), True, region.pages(0, 1))
        self._granted[pages] = None
        self._granted_pages += 1
        channel = self._add_channel(port, 0, _nothing)
        self._start = StartInfo(pages.view, channel)

    async def suspend(self) -> SuspendResult:
        """No deadline: the toolstack's move, however long it takes. LinkDown if the broker goes away."""
        what = f"suspending domain {self._domid}"
        return await self._call.request(Op.SUSPEND, b"", self._resumed, what, endless=True)

    def _resumed(self, message: Message) -> SuspendResult:
        cancelled, domid = wire.SUSPENDED.unpack(message.payload)
        if not cancelled:
            self._wipe()
            self._domid = domid
        return SuspendResult(bool(cancelled), domid)

    def _wipe(self) -> None:
        """Views raise ValueError, channels are silent; a slice that was kept is memory of nobody's."""
        for channel in list(self._channels.values()):
            channel.drop()
        self._channels.clear()
        for link in filter(None, self._links.values()):
            link.close()
        self._links.clear()
        for mapping in list(self._mappings):
            self._forget_mapping(mapping)
        for pages in list(self._granted):
            self._forget_pages(pages)
        regions = [arena.region for arena in self._own.values()]
        regions += [peer.region for peer in self._peers.values() if peer.region is not None]
        for region in regions:
            region.close()
        self._own.clear()
        self._peers.clear()
        self._start = None

    def _event(self, message: Message) -> None:
        event = _EVENTS.get(message.op)
        if event is None:
            wire.close_all(message.fds)
            raise ProtocolError(f"event {message.op}")
        event(self, message)

    def _ended(self, unasked: bool) -> None:
        self._wipe()
        if unasked:
            for callback in self._lost_callbacks:
                self._loop.call_soon(callback)

    async def close(self) -> None:
        self._call.close()

    def welcome(self, message: Message) -> None:
        domid, privileged = wire.WELCOME.unpack(message.payload)
        self._domid = domid
        self.privileged = bool(privileged)

    async def greet(self) -> None:
        payload = wire.HELLO.pack(wire.MAGIC, wire.VERSION)
        await self._call.request(Op.HELLO, payload, self.welcome, "the broker's greeting")


_EVENTS: dict[int, Callable[[BrokerHypervisor, Message], None]] = {
    Op.PORT: BrokerHypervisor._port_event,
    Op.LINK_GONE: BrokerHypervisor._link_gone,
    Op.ARENA_GONE: BrokerHypervisor._arena_gone,
    Op.DEAD: BrokerHypervisor._domain_dead,
}


def _ignore(_: Message) -> None:
    pass


def _nothing() -> None:
    pass


def _try_region(fd: int, length: int, writable: bool) -> Region | None:
    try:
        check_sealed(fd, length, writable=writable)
        return Region.of_fd(fd, length, writable=writable)
    except HypervisorError:
        return None


def _copy_segment(op: CopyOp, peer: _PeerArena | None, page: int) -> int:
    if peer is None or peer.region is None:
        return GNTST_general_error
    start = page * PAGE_SIZE + op.offset
    remote, local = peer.region.view[start : start + op.length], op.local[: op.length]
    if op.to_remote:
        remote[:] = local
    else:
        local[:] = remote
    return GNTST_okay


async def connect(sock: socket.socket | int, *, deadline: float = DEADLINE_SECONDS) -> BrokerHypervisor:
    """The handle behind a broker socket, or the number of an inherited descriptor of one. Takes it.

    deadline: seconds that any request may take. LinkDown if the broker does not answer as ours does.
    """
    if isinstance(sock, int):
        sock = socket.socket(fileno=sock)
    sock.setblocking(False)
    hypervisor = BrokerHypervisor(sock, deadline)
    try:
        await hypervisor.greet()
    except BaseException:
        await hypervisor.close()
        raise
    return hypervisor


if TYPE_CHECKING:
    _HANDLES: tuple[type[Hypervisor], type[GuestLife], type[DomainEvents]] = (BrokerHypervisor,) * 3
    _THINGS: tuple[type[Channel], type[Mapping], type[GrantedPages]] = (
        BrokerChannel,
        BrokerMapping,
        BrokerPages,
    )
