"""What a domain asks of its hypervisor: grants, event channels, its own life. Protocols only.

Shaped after what Linux gives user space (gntalloc, gntdev, evtchn), so that the embedded
implementations and the real one look alike. Knows nothing of the store, rings or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from xenbus.hypervisor.memory import Region

PAGE_SIZE = 4096
# xen/include/public/xen.h: ids from here up are not domains.
DOMID_FIRST_RESERVED = 0x7FF0
# xen/include/public/grant_table.h: refs that the domain builder sets aside.
GNTTAB_RESERVED_CONSOLE = 0
GNTTAB_RESERVED_XENSTORE = 1
GNTTAB_NR_RESERVED_ENTRIES = 8

# xen/include/public/grant_table.h, status of one grant-copy segment.
GNTST_okay = 0
GNTST_general_error = -1
GNTST_bad_domain = -2
GNTST_bad_gntref = -3
GNTST_permission_denied = -8
GNTST_bad_copy_arg = -10


class GrantedPages(Protocol):
    """Pages of ours that one other domain may map. `view` is all of them in a row, len(refs) * PAGE_SIZE."""

    @property
    def domid(self) -> int: ...
    @property
    def refs(self) -> tuple[int, ...]: ...
    @property
    def writable(self) -> bool: ...
    @property
    def view(self) -> memoryview: ...


class Mapping(Protocol):
    """Pages of another domain in our address space, contiguous, in the order of `refs`.

    `view` is read-only unless mapped writable. Slices of it must be released before `unmap`.
    """

    @property
    def domid(self) -> int: ...
    @property
    def refs(self) -> tuple[int, ...]: ...
    @property
    def writable(self) -> bool: ...
    @property
    def view(self) -> memoryview: ...


@dataclass(slots=True, frozen=True)
class CopyOp:
    """One segment of a grant copy: `length` bytes between a granted page and local memory.

    offset:   within the granted page; offset + length <= PAGE_SIZE
    local:    bytes-like of at least `length`; written to unless `to_remote`
    """

    domid: int
    ref: int
    offset: int
    length: int
    local: memoryview
    to_remote: bool


def check_copy(op: CopyOp) -> bool:
    """Whether the bounds of `op` make sense and its local memory can take part."""
    local = op.local
    return (
        op.offset >= 0
        and op.length >= 0
        and op.offset + op.length <= PAGE_SIZE
        and local.format == "B"
        and local.ndim == 1
        and local.contiguous
        and op.length <= local.nbytes
        and (op.to_remote or not local.readonly)
    )


class GrantAlloc(Protocol):
    """Our pages for others (gntalloc). Refs are chosen by the implementation."""

    async def alloc(self, domid: int, count: int, *, writable: bool = True) -> GrantedPages:
        """`count` zeroed pages, granted to `domid`. HypervisorError ENOSPC when the limit is passed."""
        ...

    async def revoke(self, pages: GrantedPages) -> None:
        """No new maps from now on; a page the peer still maps is reused after its last unmap. Idempotent."""
        ...


class GrantMap(Protocol):
    """Others' pages for us (gntdev)."""

    async def map(self, domid: int, refs: Sequence[int], *, writable: bool = True) -> Mapping:
        """All or nothing. HypervisorError EPERM for a ref not granted to us (or not writable), ENOENT for
        a ref or domain that is not there."""
        ...

    async def unmap(self, mapping: Mapping) -> None:
        """Idempotent."""
        ...

    async def copy(self, ops: Sequence[CopyOp]) -> list[int]:
        """A status (GNTST_*) per segment; one that fails does not stop the others."""
        ...


@runtime_checkable
class PageCopier(Protocol):
    """What a GrantMap may have besides: copies at once, and cheaper than a mapping that is used once."""

    def copy_run(
        self, domid: int, pieces: Sequence[tuple[int, int, int]], region: Region, *, to_remote: bool
    ) -> bool:
        """Pieces of granted pages, (ref, offset, length) each and within its page, to or from the beginning
        of `region`, one after the other. False: not all of it was copied."""
        ...


class Channel(Protocol):
    """One bound (or not yet bound) event channel of ours.

    Events are levels, not counts: any number of notifications before the handler runs are one call.
    The handler is synchronous and runs in the event loop. A masked channel stays pending and calls its
    handler once on unmask.
    """

    @property
    def port(self) -> int: ...
    @property
    def remote_domid(self) -> int: ...
    def notify(self) -> None:
        """Kick the other end. If there is none (unbound, or closed) the next one to bind may hear of it."""
        ...

    def mask(self) -> None: ...
    def unmask(self) -> None: ...
    async def close(self) -> None:
        """Idempotent; the handler never runs after this was called."""
        ...


class EventChannels(Protocol):
    async def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> Channel:
        """A port that `remote_domid`, and nobody else, may bind."""
        ...

    async def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> Channel:
        """HypervisorError ENOENT, EPERM (bound already, or not meant for us). A fresh binding fires once."""
        ...


@dataclass(slots=True, frozen=True)
class Held:
    """What a domain holds of the hypervisor right now: tests count it."""

    granted_pages: int
    mapped_pages: int
    ports: int


@dataclass(slots=True, frozen=True)
class StartInfo:
    """What the domain builder left for a guest: its store ring page and the channel that goes with it."""

    store_page: memoryview
    store_channel: Channel


@dataclass(slots=True, frozen=True)
class SuspendResult:
    """How a suspend ended. Cancelled: nothing changed. Otherwise every grant, mapping and port is gone,
    and `domid` is the new one."""

    cancelled: bool
    domid: int


class Hypervisor(Protocol):
    """One domain's handle."""

    @property
    def domid(self) -> int: ...
    @property
    def grants(self) -> GrantAlloc: ...
    @property
    def gntdev(self) -> GrantMap: ...
    @property
    def evtchn(self) -> EventChannels: ...
    def held(self) -> Held: ...
    async def close(self) -> None:
        """Everything that this handle holds is given back. Idempotent."""
        ...


class GuestLife(Protocol):
    """What only a guest (not a process in a real dom0) has: start info, and HYPERVISOR_suspend."""

    async def start_info(self, store_handler: Callable[[], None]) -> StartInfo: ...
    async def suspend(self) -> SuspendResult:
        """Parks this domain until the toolstack resumes it, as itself or under a new domid."""
        ...


class DomainEvents(Protocol):
    """What an embedded handle is told from outside. Callbacks are synchronous and run in the event loop."""

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        """Another domain is gone (VIRQ_DOM_EXC), its grants and ports with it. Privileged handles only."""
        ...

    def on_lost(self, callback: Callable[[], None]) -> None:
        """This handle is gone: nothing that it held exists any more, and the domain should exit."""
        ...
