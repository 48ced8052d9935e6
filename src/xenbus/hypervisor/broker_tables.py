"""What the broker knows: domains, their arenas and pages, ports and links. State and rules, no messages.

Enforcement is here: who may map a page or bind a port is decided by which handle asks. Descriptors that a
table holds are closed by the table.
"""

from __future__ import annotations

import array
import bisect
import errno
import os
from dataclasses import dataclass, field
from typing import Protocol

from xenbus.hypervisor.broker_wire import LINK_PORTS, close_all
from xenbus.hypervisor.interface import GNTTAB_NR_RESERVED_ENTRIES, PAGE_SIZE, Held
from xenbus.hypervisor.limits import Limits
from xenbus.hypervisor.memory import SIZE_SEALS, FreePages, add_seals, sealed_memfd

# An arena takes memory only where it is written to: room in it may be larger than what may be granted.
SPARE_PAGES = 4096


class Refused(Exception):
    """A request breaks a rule: answered with the errno, and nothing has changed."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, number))
        self.errno = number


class Listener(Protocol):
    """What the tables tell a handle; the handle sends it when its socket has room."""

    def port_changed(self, port: Port) -> None: ...
    def link_gone(self, link: Link) -> None: ...
    def arena_gone(self, arena: Arena) -> None: ...


@dataclass(eq=False)
class Arena:
    """Pages of one holder for one grantee, writable or not, in one sealed memfd. `base` is the first ref."""

    id: int
    tables: Tables
    holder: Holder
    base: int
    pages: int
    grantee: int
    writable: bool
    fd: int
    alive: bool = True
    pins: int = 0
    free: FreePages = field(init=False)
    granted: bytearray = field(init=False)
    mapped: array.array[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = FreePages(self.pages)
        self.granted = bytearray(self.pages)
        self.mapped = array.array("I", bytes(4 * self.pages))

    def take(self, count: int) -> int:
        first = self.free.take(count)
        if first >= 0:
            self.granted[first : first + count] = b"\1" * count
        return first

    def settle(self, page: int) -> None:
        """A page is free again after it was revoked and its last mapping went."""
        if not self.granted[page] and not self.mapped[page]:
            self.free.give(page)

    def pin(self) -> None:
        """The descriptor waits in some queue: it stays open though the arena may go."""
        self.pins += 1

    def unpin(self) -> None:
        self.pins -= 1
        if not self.alive and not self.pins:
            self._close_fd()

    def close(self) -> None:
        if self.alive:
            self.alive = False
            if not self.pins:
                self._close_fd()

    def _close_fd(self) -> None:
        os.close(self.fd)
        self.tables.open_arenas -= 1


@dataclass(slots=True, eq=False)
class Run:
    """Consecutive pages of one arena in one mapping."""

    arena: Arena
    first: int
    count: int


@dataclass(slots=True, eq=False)
class Port:
    """`told`: the handle knows of this port (the builder's store port waits for start_info)."""

    number: int
    holder: Holder
    remote_domid: int
    told: bool = True
    peer: Port | None = None
    link: Link | None = None
    index: int = 0
    side: int = 0


class Link:
    """What two handles kick each other through: a doorbell each way, and a pending byte a channel and side.

    The descriptors stay here only until both sides have them.
    """

    __slots__ = ("_free", "_next", "bells", "ends", "id", "pending", "ports", "unsent")

    def __init__(self, number: int, ends: tuple[Holder, Holder]) -> None:
        self.id = number
        self.ends = ends
        self.ports = 0
        self._next = 0
        self._free: list[int] = []
        self.unsent = {0, 1}
        fds: list[int] = []
        try:
            # Non-blocking: a peer that fills the counter must not stop us in notify.
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            fds.append(sealed_memfd("xenbus-pending", 2 * LINK_PORTS))
            add_seals(fds[2], SIZE_SEALS)
        except OSError as error:
            close_all(fds)
            raise Refused(error.errno or errno.EMFILE) from None
        self.bells = (fds[0], fds[1])
        self.pending = fds[2]

    def descriptors(self, side: int) -> tuple[int, int, int]:
        """The doorbell that wakes `side`, the other side's, and the pending map."""
        return self.bells[side], self.bells[1 - side], self.pending

    def sent(self, side: int) -> None:
        if side in self.unsent:
            self.unsent.discard(side)
            if not self.unsent:
                close_all((*self.bells, self.pending))

    def close(self) -> None:
        if self.unsent:
            self.unsent = set()
            close_all((*self.bells, self.pending))

    def take(self) -> int:
        if self._free:
            index = self._free.pop()
        elif self._next < LINK_PORTS:
            index, self._next = self._next, self._next + 1
        else:
            raise Refused(errno.ENOSPC)
        self.ports += 1
        return index

    def give(self, index: int) -> None:
        self._free.append(index)
        self.ports -= 1


class Holder:
    """What one handle holds, given back with it. Numbers are the domain's and are never used again."""

    def __init__(self, tables: Tables, domain: Domain, listener: Listener) -> None:
        self._tables = tables
        self.domain = domain
        self.listener = listener
        self.arenas: dict[int, Arena] = {}
        self.maps: dict[int, list[Run]] = {}
        self.uses: dict[Arena, int] = {}
        self.ports: dict[int, Port] = {}
        self._next_map = 0

    # -- our pages

    def add_arena(self, grantee: int, pages: int, writable: bool, fd: int, base: int = 0) -> Arena:
        """Takes `fd`. base 0: the next free refs."""
        tables, domain = self._tables, self.domain
        if not base:
            base = domain.next_ref
            domain.next_ref += pages
        tables.open_arenas += 1
        arena = Arena(tables.number(), tables, self, base, pages, grantee, writable, fd)
        self.arenas[base] = arena
        domain.arenas[base] = arena
        bisect.insort(domain.bases, base)
        return arena

    def check_room_for_arena(self, pages: int) -> None:
        domain, limits = self.domain, self._tables.limits
        held = sum(arena.pages for arena in domain.arenas.values())
        if len(domain.arenas) >= limits.arenas or held + pages > 4 * limits.granted_pages + SPARE_PAGES:
            raise Refused(errno.ENOSPC)
        if self._tables.open_arenas >= self._tables.max_arenas or domain.next_ref + pages > 1 << 32:
            raise Refused(errno.ENOSPC)

    def alloc(self, grantee: int, count: int, writable: bool) -> tuple[Arena, int]:
        """A run of free pages, now granted. EAGAIN: bring an arena first. ENOSPC: the limit is reached."""
        busy = sum(arena.pages - arena.free.free for arena in self.domain.arenas.values())
        if busy + count > self._tables.limits.granted_pages:
            raise Refused(errno.ENOSPC)
        for arena in self.arenas.values():
            if arena.grantee == grantee and arena.writable == writable:
                first = arena.take(count)
                if first >= 0:
                    return arena, first
        raise Refused(errno.EAGAIN)

    def revoke(self, ref: int, count: int) -> None:
        arena = self.domain.find(ref)
        if arena is None or arena.holder is not self or ref + count > arena.base + arena.pages:
            raise Refused(errno.ENOENT)
        first = ref - arena.base
        if count < 1 or arena.granted.count(1, first, first + count) != count:
            raise Refused(errno.ENOENT)
        arena.granted[first : first + count] = bytes(count)
        for page in range(first, first + count):
            arena.settle(page)
        self._shed(arena)

    def _shed(self, arena: Arena) -> None:
        """Drops an arena without a page in use, but for one that spares the next alloc a new memfd."""
        if not arena.alive or not arena.free.empty:
            return
        spare = any(
            other is not arena
            and other.free.empty
            and other.grantee == arena.grantee
            and other.writable == arena.writable
            for other in self.arenas.values()
        )
        if spare or not self._tables.exists(arena.grantee):
            self._forget_arena(arena)
            self.listener.arena_gone(arena)

    def shed_all(self, grantee: int) -> None:
        for arena in [arena for arena in self.arenas.values() if arena.grantee == grantee]:
            self._shed(arena)

    def _forget_arena(self, arena: Arena) -> None:
        arena.close()
        self.arenas.pop(arena.base, None)
        self.domain.arenas.pop(arena.base, None)
        self.domain.bases.remove(arena.base)

    # -- pages of others

    def resolve(self, domid: int, ref: int, count: int, writable: bool) -> list[Run]:
        """The runs behind `count` refs, checked. ENOENT: not there; EPERM: not for us, or not writable."""
        domain = self._tables.domains.get(domid)
        runs: list[Run] = []
        while count:
            arena = domain.find(ref) if domain is not None else None
            if arena is None:
                raise Refused(errno.ENOENT)
            first = ref - arena.base
            part = min(count, arena.pages - first)
            if arena.granted.count(1, first, first + part) != part:
                raise Refused(errno.ENOENT)
            if arena.grantee != self.domain.domid or (writable and not arena.writable):
                raise Refused(errno.EPERM)
            runs.append(Run(arena, first, part))
            ref += part
            count -= part
        return runs

    def check_room_for_map(self, pages: int) -> None:
        if self.domain.mapped_pages + pages > self._tables.limits.mapped_pages:
            raise Refused(errno.ENOSPC)

    def map(self, runs: list[Run]) -> tuple[int, list[Arena]]:
        """An id for the mapping, and the arenas that the handle did not map so far."""
        self._next_map = (self._next_map + 1) & 0xFFFFFFFF
        new: list[Arena] = []
        for run in runs:
            if run.arena not in self.uses:
                self.uses[run.arena] = 0
                new.append(run.arena)
            self.uses[run.arena] += run.count
            self.domain.mapped_pages += run.count
            for page in range(run.first, run.first + run.count):
                run.arena.mapped[page] += 1
        self.maps[self._next_map] = runs
        return self._next_map, new

    def unmap(self, number: int) -> None:
        runs = self.maps.pop(number, None)
        if runs is None:
            raise Refused(errno.ENOENT)
        for run in runs:
            arena = run.arena
            self.uses[arena] -= run.count
            if not self.uses[arena]:
                del self.uses[arena]
            self.domain.mapped_pages -= run.count
            for page in range(run.first, run.first + run.count):
                arena.mapped[page] -= 1
                if arena.alive:
                    arena.settle(page)
            arena.holder._shed(arena)

    # -- ports

    def alloc_port(self, remote_domid: int, *, told: bool = True) -> Port:
        domain = self.domain
        if len(domain.ports) >= self._tables.limits.ports or domain.next_port >= 1 << 32:
            raise Refused(errno.ENOSPC)
        port = Port(domain.next_port, self, remote_domid, told)
        domain.next_port += 1
        domain.ports[port.number] = self.ports[port.number] = port
        return port

    def bind(self, remote_domid: int, remote_port: int) -> Port:
        domain = self._tables.domains.get(remote_domid)
        remote = domain.ports.get(remote_port) if domain is not None else None
        if remote is None:
            raise Refused(errno.ENOENT)
        if remote.peer is not None or remote.remote_domid != self.domain.domid:
            raise Refused(errno.EPERM)
        port = self.alloc_port(remote_domid)
        try:
            link = self._tables.link(self, remote.holder)
            port.index = remote.index = link.take()
        except Refused:
            self._remove(port)
            raise
        port.link = remote.link = link
        port.side = link.ends.index(self)
        remote.side = 1 - port.side
        port.peer, remote.peer = remote, port
        remote.holder.listener.port_changed(remote)
        return port

    def close_port(self, number: int) -> None:
        port = self.ports.get(number)
        if port is None:
            raise Refused(errno.ENOENT)
        self._unbind(port)
        self._remove(port)

    def _remove(self, port: Port) -> None:
        del self.ports[port.number]
        del self.domain.ports[port.number]

    def _unbind(self, port: Port) -> None:
        """event_channel.c: the other end is unbound again, for the same domain."""
        peer, link = port.peer, port.link
        if peer is None or link is None:
            return
        port.peer = port.link = peer.peer = peer.link = None
        link.give(port.index)
        peer.holder.listener.port_changed(peer)
        if not link.ports:
            self._tables.drop_link(link)

    def give_back(self) -> None:
        """Ports, mappings and grants, in that order; the domain keeps its counters."""
        for number in list(self.ports):
            self.close_port(number)
        for number in list(self.maps):
            self.unmap(number)
        for arena in list(self.arenas.values()):
            self._forget_arena(arena)


class Domain:
    """One domid. `holders[0]` is the primary handle's."""

    def __init__(self, domid: int, store_domid: int | None) -> None:
        self.domid = domid
        self.store_domid = store_domid
        self.holders: list[Holder] = []
        self.arenas: dict[int, Arena] = {}
        self.bases: list[int] = []
        self.ports: dict[int, Port] = {}
        self.next_ref = GNTTAB_NR_RESERVED_ENTRIES
        self.next_port = 1
        self.mapped_pages = 0
        self.store_port: Port | None = None

    def find(self, ref: int) -> Arena | None:
        at = bisect.bisect_right(self.bases, ref) - 1
        if at < 0:
            return None
        arena = self.arenas[self.bases[at]]
        return arena if ref < arena.base + arena.pages else None

    def held(self) -> Held:
        granted = sum(arena.granted.count(1) for arena in self.arenas.values())
        return Held(granted, self.mapped_pages, len(self.ports))


class Tables:
    """All domains of a broker, and the links between their handles."""

    def __init__(self, limits: Limits, max_arenas: int) -> None:
        self.limits = limits
        self.max_arenas = max_arenas
        self.domains: dict[int, Domain] = {}
        self._links: dict[tuple[Holder, Holder], Link] = {}
        self._number = 0
        # Descriptors of ours, those of dead arenas that still wait in a queue included.
        self.open_arenas = 0

    def number(self) -> int:
        """Names of arenas and links: never used twice."""
        self._number += 1
        return self._number

    def exists(self, domid: int) -> bool:
        return domid in self.domains

    def link(self, one: Holder, other: Holder) -> Link:
        found = self._links.get((one, other)) or self._links.get((other, one))
        if found is None:
            found = self._links[one, other] = Link(self.number(), (one, other))
        return found

    def drop_link(self, link: Link) -> None:
        """Told to the ends that have its descriptors: one that does not read hears of no link at all, however
        many come and go."""
        self._links.pop(link.ends, None)
        know = {end for side, end in enumerate(link.ends) if side not in link.unsent}
        link.close()
        for end in know:
            end.listener.link_gone(link)

    def build(self, domain: Domain) -> None:
        """What the domain builder leaves: grant 1, one page for the store's domain, and a port for it."""
        domain.store_port = None
        if domain.store_domid is None:
            return
        holder = domain.holders[0]
        fd = sealed_memfd("xenbus-store-ring", PAGE_SIZE)
        add_seals(fd, SIZE_SEALS)
        arena = holder.add_arena(domain.store_domid, 1, True, fd, base=1)
        arena.take(1)
        domain.store_port = holder.alloc_port(domain.store_domid, told=False)

    def shed_for(self, domid: int) -> None:
        """`domid` is gone: nobody needs to keep spare arenas for it."""
        for domain in self.domains.values():
            for holder in domain.holders:
                holder.shed_all(domid)
