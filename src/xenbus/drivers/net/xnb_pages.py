"""A guest's pages, read and written: by the hypervisor's grant copy, or through mappings that are kept.

Knows grants and pieces of pages; knows no ring and no packet. On real Xen one system call copies a whole
batch, and nothing is ever mapped. Where there is no copying at once (embedded) a page is mapped when it is
first named, and stays so: a front uses the same ones again and again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Protocol

from xenbus.drivers.net.netif import PAGE_SIZE
from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import GrantMap, Mapping, PageCopier
from xenbus.hypervisor.memory import Region

Buffer = bytes | bytearray | memoryview
# gref, offset, length: within one page, which the caller has checked.
Piece = tuple[int, int, int]
# A whole transmit request: gref, offset, flags, id, size.
Request = tuple[int, int, int, int, int]
# A packet for one posted page: gref, id, flags, size, bytes.
Posted = tuple[int, int, int, int, Buffer]
# Bytes of one batch; the caller's to keep to.
BUFFER: Final = 512 << 10
# Pages that stay mapped in one direction of a queue: two rings' worth.
KEPT: Final = 512


class Pages(Protocol):
    """Of one direction of one queue."""

    def missing(self, refs: Iterable[int]) -> list[int]:
        """Those that `bring` has to see first, in this order."""
        ...

    def room_for(self, count: int) -> bool:
        """Whether `bring` can see so many more and let go of no others meanwhile."""
        ...

    async def bring(self, refs: Sequence[int], others: Sequence[int] = ()) -> None:
        """From now on `fetch` and `store` can say of these what they are; `others` are still needed, too."""
        ...

    def fetch(self, packets: Sequence[Sequence[Piece]]) -> list[Buffer | None]:
        """The bytes of each packet, as they were at one moment; None where a page may not be read. They are
        good until the next call."""
        ...

    def fetch_plain(self, requests: Sequence[Request]) -> list[Buffer] | None:
        """The same for packets of one piece each. None: `missing` and `fetch` have to see them."""
        ...

    def store(self, packets: Sequence[tuple[Sequence[Piece], Buffer]]) -> list[bool]:
        """Each packet's bytes into its pieces. False where a page may not be written."""
        ...

    def store_plain(self, packets: Sequence[Posted]) -> bool:
        """The same for packets of one piece each. False: not all of them; `store` says which."""
        ...

    async def close(self) -> None: ...


class CopiedPages:
    """By grant copy. copier: its `copy_run`; domid: the guest's"""

    __slots__ = ("_copier", "_domid", "_region")

    def __init__(self, copier: PageCopier, domid: int) -> None:
        self._copier = copier
        self._domid = domid
        self._region = Region(BUFFER, shared=False)

    def missing(self, refs: Iterable[int]) -> list[int]:
        return []

    def room_for(self, count: int) -> bool:
        return True

    async def bring(self, refs: Sequence[int], others: Sequence[int] = ()) -> None:
        pass

    def fetch(self, packets: Sequence[Sequence[Piece]]) -> list[Buffer | None]:
        pieces = [piece for packet in packets for piece in packet]
        view, region = self._region.view, self._region
        if self._copier.copy_run(self._domid, pieces, region, to_remote=False):
            found: list[Buffer | None] = []
            at = 0
            for packet in packets:
                end = at + sum([length for _, _, length in packet])
                found.append(view[at:end])
                at = end
            return found
        # One of them has a page that is none: who that is, packet by packet.
        found = []
        for packet in packets:
            done = self._copier.copy_run(self._domid, packet, region, to_remote=False)
            size = sum([length for _, _, length in packet])
            found.append(bytes(view[:size]) if done else None)
        return found

    def fetch_plain(self, requests: Sequence[Request]) -> list[Buffer] | None:
        pieces = [(ref, offset, size) for ref, offset, _, _, size in requests]
        if not self._copier.copy_run(self._domid, pieces, self._region, to_remote=False):
            return None
        view, at = self._region.view, 0
        found: list[Buffer] = []
        for _, _, size in pieces:
            found.append(view[at : at + size])
            at += size
        return found

    def store(self, packets: Sequence[tuple[Sequence[Piece], Buffer]]) -> list[bool]:
        if self._store(packets):
            return [True] * len(packets)
        return [self._store((packet,)) for packet in packets]

    def store_plain(self, packets: Sequence[Posted]) -> bool:
        view, at = self._region.view, 0
        pieces: list[Piece] = []
        for ref, _, _, size, data in packets:
            view[at : at + size] = data
            at += size
            pieces.append((ref, 0, size))
        return self._copier.copy_run(self._domid, pieces, self._region, to_remote=True)

    def _store(self, packets: Sequence[tuple[Sequence[Piece], Buffer]]) -> bool:
        view, at = self._region.view, 0
        pieces: list[Piece] = []
        for packet, data in packets:
            end = at + len(data)
            view[at:end] = data
            at = end
            pieces += packet
        return self._copier.copy_run(self._domid, pieces, self._region, to_remote=True)

    async def close(self) -> None:
        self._region.close()


class MappedPages:
    """map_pages, unmap: as XenbusDevice's map_ring and unmap; writable: to store to them"""

    __slots__ = ("_closed", "_map", "_mappings", "_unmap", "_where", "_writable")

    def __init__(
        self,
        map_pages: Callable[[tuple[int, ...], bool], Awaitable[Mapping]],
        unmap: Callable[[Mapping], Awaitable[None]],
        *,
        writable: bool,
    ) -> None:
        self._map = map_pages
        self._unmap = unmap
        self._writable = writable
        self._mappings: list[Mapping] = []
        self._where: dict[int, memoryview | None] = {}  # None: it is not ours to use
        self._closed = False

    def missing(self, refs: Iterable[int]) -> list[int]:
        where = self._where
        return [ref for ref in dict.fromkeys(refs) if ref not in where]

    def room_for(self, count: int) -> bool:
        return len(self._where) + count <= KEPT

    async def bring(self, refs: Sequence[int], others: Sequence[int] = ()) -> None:
        if not self.room_for(len(refs)):
            # A front that names ever new pages gets no more of us than this.
            await self._drop()
            refs = [*dict.fromkeys((*refs, *others))]
        refs = self.missing(refs)
        if refs and not await self._add(refs):
            for ref in refs:
                if not await self._add([ref]):
                    self._where[ref] = None

    async def _add(self, refs: Sequence[int]) -> bool:
        try:
            mapping = await self._map(tuple(refs), self._writable)
        except HypervisorError:
            return False
        if self._closed:
            await self._unmap(mapping)
            return True
        self._mappings.append(mapping)
        for n, ref in enumerate(refs):
            self._where[ref] = mapping.view[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]
        return True

    def forget_refused(self) -> None:
        """What the guest had not granted it may have granted by now."""
        for ref in [ref for ref, view in self._where.items() if view is None]:
            del self._where[ref]

    def fetch(self, packets: Sequence[Sequence[Piece]]) -> list[Buffer | None]:
        where = self._where
        found: list[Buffer | None] = []
        refused = False
        for packet in packets:
            if len(packet) == 1:
                ref, offset, length = packet[0]
                page = where.get(ref)
                refused = refused or page is None
                found.append(None if page is None else bytes(page[offset : offset + length]))
                continue
            views = [(where.get(ref), offset, length) for ref, offset, length in packet]
            if any(page is None for page, _, _ in views):
                refused = True
                found.append(None)
            else:
                parts = [page[offset : offset + n] for page, offset, n in views if page is not None]
                found.append(b"".join(parts))
        if refused:
            self.forget_refused()
        return found

    def fetch_plain(self, requests: Sequence[Request]) -> list[Buffer] | None:
        where = self._where
        try:
            # Of a page that was refused, which is None, there is no slice.
            return [bytes(where[ref][at : at + size]) for ref, at, _, _, size in requests]  # type: ignore[index]
        except (KeyError, TypeError):
            return None

    def store(self, packets: Sequence[tuple[Sequence[Piece], Buffer]]) -> list[bool]:
        where, done, refused = self._where, [], False
        for packet, data in packets:
            if len(packet) == 1:
                ref, offset, length = packet[0]
                page = where.get(ref)
                if page is not None:
                    page[offset : offset + length] = data
                refused = refused or page is None
                done.append(page is not None)
                continue
            pages = [where.get(ref) for ref, _, _ in packet]
            if None in pages:
                refused = True
                done.append(False)
                continue
            at, view = 0, memoryview(data)
            for page, (_, offset, length) in zip(pages, packet, strict=True):
                assert page is not None
                page[offset : offset + length] = view[at : at + length]
                at += length
            done.append(True)
        if refused:
            self.forget_refused()
        return done

    def store_plain(self, packets: Sequence[Posted]) -> bool:
        where = self._where
        try:
            for ref, _, _, size, data in packets:
                where[ref][:size] = data  # type: ignore[index]
        except (KeyError, TypeError):
            return False
        return True

    async def _drop(self) -> None:
        for view in self._where.values():
            if view is not None:
                view.release()
        self._where.clear()
        while self._mappings:
            await self._unmap_one(self._mappings.pop())

    async def _unmap_one(self, mapping: Mapping) -> None:
        try:
            await self._unmap(mapping)
        except HypervisorError:
            pass  # the domain it belonged to is dead: its pages went with it

    async def close(self) -> None:
        """Unmap everything. Idempotent."""
        self._closed = True
        await self._drop()


def pages_for(
    gntdev: GrantMap,
    domid: int,
    map_pages: Callable[[tuple[int, ...], bool], Awaitable[Mapping]],
    unmap: Callable[[Mapping], Awaitable[None]],
    *,
    writable: bool,
) -> Pages:
    """Copies where the hypervisor copies at once."""
    if isinstance(gntdev, PageCopier):
        return CopiedPages(gntdev, domid)
    return MappedPages(map_pages, unmap, writable=writable)
