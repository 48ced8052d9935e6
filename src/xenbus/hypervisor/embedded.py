"""A machine in one process: many domains, one asyncio loop, no descriptors.

May know the interface and memory; knows nothing of the broker, the store or devices. The rules (who may map
or bind what, what a dead domain gives back) are those of the broker, and one conformance suite holds both.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from xenbus.errors import HypervisorError, LinkDown, UsageError
from xenbus.hypervisor.handle import Handle
from xenbus.hypervisor.interface import (
    GNTTAB_NR_RESERVED_ENTRIES,
    GNTTAB_RESERVED_XENSTORE,
    PAGE_SIZE,
    Channel,
    CopyOp,
    DomainEvents,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_bad_gntref,
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
from xenbus.hypervisor.limits import Limits, check_domid
from xenbus.hypervisor.memory import FreePages, Region, release

_CHUNK_PAGES = 256


class _Page:
    """One page of a domain: free again when it is neither granted nor mapped."""

    __slots__ = ("chunk", "granted", "grantee", "index", "mapped", "owner", "writable")

    def __init__(self, chunk: _Chunk, index: int, owner: EmbeddedHypervisor, grantee: int, writable: bool):
        self.chunk = chunk
        self.index = index
        self.owner = owner
        self.grantee = grantee
        self.writable = writable
        self.granted = True
        self.mapped = 0


class _Chunk:
    """Backing of the machine's pages."""

    __slots__ = ("free", "region")

    def __init__(self, pages: int) -> None:
        self.region = Region(pages * PAGE_SIZE, shared=True)
        self.free = FreePages(pages)


class EmbeddedPages:
    """GrantedPages. `view` raises ValueError once revoked."""

    __slots__ = ("domid", "pages", "refs", "view", "writable")

    def __init__(
        self, domid: int, refs: tuple[int, ...], writable: bool, view: memoryview, pages: list[_Page]
    ):
        self.domid = domid
        self.refs = refs
        self.writable = writable
        self.view = view
        self.pages = pages


class EmbeddedMapping:
    """Mapping. `view` raises ValueError once unmapped."""

    __slots__ = ("domid", "pages", "refs", "region", "view", "writable")

    def __init__(self, domid: int, refs: tuple[int, ...], writable: bool, pages: list[_Page]) -> None:
        self.domid = domid
        self.refs = refs
        self.writable = writable
        self.pages = pages
        self.region, view = _contiguous(pages)
        self.view = view if writable else view.toreadonly()


def _contiguous(pages: list[_Page]) -> tuple[Region | None, memoryview]:
    """The pages in a row: a slice of their chunk where they are one run, otherwise a region of aliases."""
    first = pages[0]
    run = all(page.chunk is first.chunk and page.index == first.index + n for n, page in enumerate(pages))
    if run:
        return None, first.chunk.region.pages(first.index, len(pages))
    region = Region.stitched([(page.chunk.region, page.index, 1) for page in pages], writable=True)
    return region, region.pages(0, len(pages))


class EmbeddedChannel:
    """Channel. Unbound while `peer` is None."""

    __slots__ = (
        "_closed",
        "_handler",
        "_loop",
        "_masked",
        "_owner",
        "_pending",
        "_scheduled",
        "peer",
        "port",
        "remote_domid",
    )

    def __init__(self, owner: EmbeddedHypervisor, port: int, remote_domid: int, handler: Callable[[], None]):
        self._owner = owner
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._masked = False
        self._pending = False
        self._scheduled = False
        self._closed = False
        self.port = port
        self.remote_domid = remote_domid
        self.peer: EmbeddedChannel | None = None

    def notify(self) -> None:
        if self.peer is not None:
            self.peer.raise_event()

    def raise_event(self) -> None:
        """Pending, and a call of the handler on its way unless masked."""
        self._pending = True
        if not self._masked and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        if self._pending and not self._masked and not self._closed:
            self._pending = False
            self._handler()

    def mask(self) -> None:
        self._masked = True

    def unmask(self) -> None:
        self._masked = False
        if self._pending:
            self.raise_event()

    def take_over(self, handler: Callable[[], None]) -> None:
        """start_info gives the builder's channel the handler of the guest."""
        self._handler = handler

    def drop(self) -> None:
        """Closed; the other end is unbound, and may be bound anew by the same domain (event_channel.h)."""
        if self._closed:
            return
        self._closed = True
        self._handler = _nothing
        if self.peer is not None:
            self.peer.peer = None
            self.peer = None
        self._owner.channels.pop(self.port, None)

    async def close(self) -> None:
        self.drop()


def _nothing() -> None:
    pass


class EmbeddedHypervisor(Handle):
    """One domain of a Machine: Hypervisor, GuestLife and DomainEvents, its own grants, gntdev and evtchn."""

    def __init__(self, machine: Machine, domid: int, store_domid: int | None) -> None:
        super().__init__(domid)
        self._machine = machine
        self._store_domid = store_domid
        self._closed = False
        self._parked: asyncio.Future[SuspendResult] | None = None
        self._lost_callbacks: list[Callable[[], None]] = []
        self._dead_callbacks: list[Callable[[int], None]] = []
        self.refs: dict[int, _Page] = {}
        self.granted: dict[EmbeddedPages, None] = {}
        self.mappings: dict[EmbeddedMapping, None] = {}
        self._mapped = 0
        self.renamed = False  # restored under another domid, and not told yet
        self.channels: dict[int, EmbeddedChannel] = {}
        self._begin()

    def _begin(self) -> None:
        """What the domain builder leaves behind, and fresh ref and port numbers."""
        self._next_ref = itertools.count(GNTTAB_NR_RESERVED_ENTRIES)
        self._next_port = itertools.count(1)
        self._store_page: EmbeddedPages | None = None
        self.store_channel: EmbeddedChannel | None = None
        if self._store_domid is not None:
            self._store_page = self._grant(self._store_domid, [GNTTAB_RESERVED_XENSTORE], True)
            self.store_channel = self._channel(self._store_domid, _nothing)

    def held(self) -> Held:
        return Held(len(self.refs), self._mapped, len(self.channels))

    def _check_alive(self) -> None:
        if self._closed:
            raise LinkDown(f"domain {self._domid} is gone")
        if self.renamed:
            raise HypervisorError("ESTALE", "a domain that was restored and does not know it yet")

    # -- grants

    async def alloc(self, domid: int, count: int, *, writable: bool = True) -> EmbeddedPages:
        self._check_alive()
        check_domid(domid)
        if count < 1:
            raise UsageError(f"{count} pages")
        if len(self.refs) + count > self._machine.limits.granted_pages:
            raise HypervisorError("ENOSPC", f"granting {count} pages to domain {domid}")
        return self._grant(domid, list(itertools.islice(self._next_ref, count)), writable)

    def _grant(self, domid: int, refs: list[int], writable: bool) -> EmbeddedPages:
        chunk, first = self._machine.take_pages(len(refs))
        pages = [_Page(chunk, first + n, self, domid, writable) for n in range(len(refs))]
        self.refs.update(zip(refs, pages, strict=True))
        granted = EmbeddedPages(domid, tuple(refs), writable, chunk.region.pages(first, len(refs)), pages)
        self.granted[granted] = None
        return granted

    async def revoke(self, pages: GrantedPages) -> None:
        if isinstance(pages, EmbeddedPages) and pages in self.granted:
            self._revoke(pages)

    def _revoke(self, granted: EmbeddedPages) -> None:
        del self.granted[granted]
        release(granted.view)
        for ref, page in zip(granted.refs, granted.pages, strict=True):
            page.granted = False
            del self.refs[ref]
            self._machine.give_page(page)

    # -- gntdev

    def _page(self, domid: int, ref: int, writable: bool) -> _Page:
        owner = self._machine.find(domid)
        page = owner.refs.get(ref) if owner is not None else None
        what = f"grant {ref} of domain {domid} for domain {self._domid}"
        if page is None:
            raise HypervisorError("ENOENT", what)
        if page.grantee != self._domid or (writable and not page.writable):
            raise HypervisorError("EPERM", what + (", writable" if writable else ""))
        return page

    async def map(self, domid: int, refs: Sequence[int], *, writable: bool = True) -> EmbeddedMapping:
        self._check_alive()
        check_domid(domid)
        if not refs:
            raise UsageError("mapping no page")
        if self._mapped + len(refs) > self._machine.limits.mapped_pages:
            raise HypervisorError("ENOSPC", f"mapping {len(refs)} pages of domain {domid}")
        pages = [self._page(domid, ref, writable) for ref in refs]
        mapping = EmbeddedMapping(domid, tuple(refs), writable, pages)
        for page in pages:
            page.mapped += 1
        self.mappings[mapping] = None
        self._mapped += len(pages)
        return mapping

    async def unmap(self, mapping: Mapping) -> None:
        if isinstance(mapping, EmbeddedMapping) and mapping in self.mappings:
            self._unmap(mapping)

    def _unmap(self, mapping: EmbeddedMapping) -> None:
        del self.mappings[mapping]
        self._mapped -= len(mapping.pages)
        release(mapping.view)
        if mapping.region is not None:
            mapping.region.close()
        for page in mapping.pages:
            page.mapped -= 1
            self._machine.give_page(page)

    async def copy(self, ops: Sequence[CopyOp]) -> list[int]:
        self._check_alive()
        return [self._copy(op) for op in ops]

    def _copy(self, op: CopyOp) -> int:
        if not check_copy(op):
            return GNTST_bad_copy_arg
        owner = self._machine.find(op.domid)
        if owner is None:
            return GNTST_bad_domain
        page = owner.refs.get(op.ref)
        if page is None:
            return GNTST_bad_gntref
        if page.grantee != self._domid or (op.to_remote and not page.writable):
            return GNTST_permission_denied
        start = page.index * PAGE_SIZE + op.offset
        remote, local = page.chunk.region.view[start : start + op.length], op.local[: op.length]
        if op.to_remote:
            remote[:] = local
        else:
            local[:] = remote
        return GNTST_okay

    # -- event channels

    def _channel(self, remote_domid: int, handler: Callable[[], None]) -> EmbeddedChannel:
        if len(self.channels) >= self._machine.limits.ports:
            raise HypervisorError("ENOSPC", f"a port for domain {remote_domid}")
        channel = EmbeddedChannel(self, next(self._next_port), remote_domid, handler)
        self.channels[channel.port] = channel
        return channel

    async def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> EmbeddedChannel:
        self._check_alive()
        return self._channel(check_domid(remote_domid), handler)

    async def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> EmbeddedChannel:
        self._check_alive()
        owner = self._machine.find(check_domid(remote_domid))
        remote = owner.channels.get(remote_port) if owner is not None else None
        what = f"port {remote_port} of domain {remote_domid} for domain {self._domid}"
        if remote is None:
            raise HypervisorError("ENOENT", what)
        if remote.peer is not None or remote.remote_domid != self._domid:
            raise HypervisorError("EPERM", what)
        channel = self._channel(remote_domid, handler)
        channel.peer, remote.peer = remote, channel
        channel.raise_event()  # event_channel.c: the binder looks once for what it missed
        return channel

    # -- its own life

    async def start_info(self, store_handler: Callable[[], None]) -> StartInfo:
        self._check_alive()
        if self._store_page is None or self.store_channel is None:
            raise HypervisorError("ENOENT", f"start info of domain {self._domid}")
        self.store_channel.take_over(store_handler)
        return StartInfo(self._store_page.view, self.store_channel)

    async def suspend(self) -> SuspendResult:
        self._check_alive()
        if self._parked is not None:
            raise HypervisorError("EBUSY", f"suspending domain {self._domid}")
        self._parked = asyncio.get_running_loop().create_future()
        self._machine.note_parked(self._domid)
        try:
            return await self._parked
        finally:
            self._parked = None

    @property
    def parked(self) -> bool:
        return self._parked is not None and not self._parked.done()

    def rename(self, new_domid: int) -> None:
        """Everything is given back and the domain begins anew; still parked."""
        self.renamed = True
        self.give_back()
        self._domid = new_domid
        self._begin()

    def resumed(self) -> None:
        if self._parked is not None:
            self._parked.set_result(SuspendResult(not self.renamed, self._domid))
        self.renamed = False

    def give_back(self) -> None:
        """Every port, mapping and grant, in that order."""
        for channel in list(self.channels.values()):
            channel.drop()
        for mapping in list(self.mappings):
            self._unmap(mapping)
        for granted in list(self.granted):
            self._revoke(granted)

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead_callbacks.append(callback)

    def on_lost(self, callback: Callable[[], None]) -> None:
        self._lost_callbacks.append(callback)

    def tell_dead(self, domid: int) -> None:
        for callback in self._dead_callbacks:
            callback(domid)

    def lost(self) -> None:
        """The machine killed this domain."""
        self._closed = True
        self.give_back()
        if self._parked is not None and not self._parked.done():
            self._parked.set_exception(LinkDown(f"domain {self._domid} is gone"))
        for callback in self._lost_callbacks:
            callback()

    async def close(self) -> None:
        if not self._closed:
            self._lost_callbacks.clear()
            self._machine.kill(self._domid)


class Machine:
    """Domains that share one process. All of it is used from one event loop."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._domains: dict[int, EmbeddedHypervisor] = {}
        self._dead_callbacks: list[Callable[[int], None]] = []
        self._parked: dict[int, asyncio.Event] = {}
        self._chunks: list[_Chunk] = []

    def domain(self, domid: int, *, store_domid: int = 0) -> EmbeddedHypervisor:
        """The domain of that id, made if it is not there. Call it inside the event loop.

        A domain other than `store_domid` is made with a store ring page (grant 1) and a port for that one.
        """
        found = self._domains.get(check_domid(domid))
        if found is None:
            found = EmbeddedHypervisor(self, domid, store_domid if domid != store_domid else None)
            self._domains[domid] = found
        return found

    def find(self, domid: int) -> EmbeddedHypervisor | None:
        return self._domains.get(domid)

    def domids(self) -> Iterable[int]:
        return tuple(self._domains)

    def _known(self, domid: int) -> EmbeddedHypervisor:
        found = self._domains.get(domid)
        if found is None:
            raise UsageError(f"there is no domain {domid}")
        return found

    def kill(self, domid: int) -> None:
        """Ends a domain as SIGKILL ends a process: all it held is taken back, then the death is told."""
        domain = self._domains.pop(domid, None)
        if domain is None:
            return
        parked = self._parked.pop(domid, None)
        if parked is not None:
            parked.set()
        domain.lost()
        self._tell_dead(domid)

    def _tell_dead(self, domid: int) -> None:
        for callback in self._dead_callbacks:
            callback(domid)
        for other in list(self._domains.values()):
            other.tell_dead(domid)

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead_callbacks.append(callback)

    def store_port(self, domid: int) -> int:
        """The port that the domain builder made for the store, for INTRODUCE. UsageError if there is none."""
        channel = self._known(domid).store_channel
        if channel is None:
            raise UsageError(f"domain {domid} has no store port")
        return channel.port

    def held(self, domid: int) -> Held:
        domain = self._domains.get(domid)
        return domain.held() if domain is not None else Held(0, 0, 0)

    def note_parked(self, domid: int) -> None:
        self._parked.setdefault(domid, asyncio.Event()).set()

    async def suspended(self, domid: int) -> None:
        """Returns when the domain has parked itself; LinkDown if it dies instead. Set a deadline."""
        domain = self._known(domid)
        await self._parked.setdefault(domid, asyncio.Event()).wait()
        if self._domains.get(domid) is not domain:
            raise LinkDown(f"domain {domid} died before it suspended")

    def _parked_domain(self, domid: int) -> EmbeddedHypervisor:
        domain = self._known(domid)
        if not domain.parked:
            raise UsageError(f"domain {domid} is not suspended")
        return domain

    def rename(self, domid: int, new_domid: int) -> None:
        """Gives a parked domain a new id and a fresh ring page and store port; what it held is gone.

        It stays parked. The death of the old id is told to the other domains, as after `xl restore`.
        """
        domain = self._parked_domain(domid)
        if check_domid(new_domid) in self._domains:
            raise UsageError(f"there is a domain {new_domid} already")
        domain.rename(new_domid)
        self._parked[new_domid] = self._parked.pop(domid)
        self._domains[new_domid] = self._domains.pop(domid)
        for other in list(self._domains.values()):
            if other is not domain:
                other.tell_dead(domid)

    def resume(self, domid: int, *, cancelled: bool | None = None, new_domid: int | None = None) -> None:
        """Lets a parked domain go on: as it was, or, if it was renamed (or is, by `new_domid`), anew."""
        domain = self._parked_domain(domid)
        if cancelled is not None and cancelled == (new_domid is not None or domain.renamed):
            raise UsageError("a resume is either cancelled or has a new domid")
        if new_domid is not None:
            self.rename(domid, new_domid)
        self._parked.pop(domain.domid, None)
        domain.resumed()

    # -- pages

    def take_pages(self, count: int) -> tuple[_Chunk, int]:
        """`count` zeroed pages in a row."""
        for chunk in reversed(self._chunks):
            first = chunk.free.take(count)
            if first >= 0:
                return chunk, first
        chunk = _Chunk(max(_CHUNK_PAGES, count))
        self._chunks.append(chunk)
        return chunk, chunk.free.take(count)

    def give_page(self, page: _Page) -> None:
        """Back to the pool, zeroed, if nobody maps it and it is granted no more."""
        if page.granted or page.mapped:
            return
        page.chunk.region.zero(page.index, 1)
        page.chunk.free.give(page.index)
        if page.chunk.free.empty and len(self._chunks) > 1:
            self._chunks.remove(page.chunk)
            page.chunk.region.close()


if TYPE_CHECKING:
    _HANDLES: tuple[type[Hypervisor], type[GuestLife], type[DomainEvents]] = (EmbeddedHypervisor,) * 3
    _THINGS: tuple[type[Channel], type[Mapping], type[GrantedPages]] = (
        EmbeddedChannel,
        EmbeddedMapping,
        EmbeddedPages,
    )
