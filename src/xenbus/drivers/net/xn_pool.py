"""The pages that xn lends its back end: granted once, used again for each packet, more as they are needed.

Knows grants; knows no ring and no packet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from xenbus.drivers.net.netif import PAGE_SIZE
from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import GrantedPages

Alloc = Callable[[int], Awaitable[GrantedPages]]
Revoke = Callable[[GrantedPages], Awaitable[None]]

# How many there are at first; then twice as many as there were.
FIRST: Final = 32


class Page:
    """ident: its number in the pool; busy: the back end has it; head: a packet begins here"""

    __slots__ = ("busy", "head", "ident", "ref", "view")

    def __init__(self, ident: int, ref: int, view: memoryview) -> None:
        self.ident = ident
        self.ref = ref
        self.view = view
        self.busy = False
        self.head = False


class Pool:
    """pages: all of them, by number; free: those that may be used, the last one given back first.

    limit: as many as the ring has slots: more are of no use
    """

    def __init__(self, alloc: Alloc, revoke: Revoke, limit: int) -> None:
        self._alloc = alloc
        self._revoke = revoke
        self._chunks: list[GrantedPages] = []
        self._closed = False
        self.limit = limit
        self.growing = False
        self.pages: list[Page] = []
        self.free: list[Page] = []

    @property
    def can_grow(self) -> bool:
        return len(self.pages) < self.limit

    async def grow(self) -> None:
        """By as many pages as there are, at least FIRST. Where there are fewer to be had it takes those, and
        that was the last time; HypervisorError if there is not one in the pool."""
        count = min(self.limit - len(self.pages), max(FIRST, len(self.pages)))
        if count <= 0:
            return
        chunk = await self._chunk(count)
        if chunk is None:
            return
        if self._closed:
            await self._revoke(chunk)
            return
        self._chunks.append(chunk)
        for n, ref in enumerate(chunk.refs):
            page = Page(len(self.pages), ref, chunk.view[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])
            self.pages.append(page)
            self.free.append(page)

    async def _chunk(self, count: int) -> GrantedPages | None:
        """So many pages, or half of them, or a quarter..."""
        wanted = count
        while True:
            try:
                chunk = await self._alloc(count)
            except HypervisorError:
                count >>= 1
                if count:
                    continue
                self.limit = len(self.pages)
                if not self.pages:
                    raise
                return None
            if count < wanted:
                self.limit = len(self.pages) + count
            return chunk

    def release(self) -> None:
        """Let go of every view; nothing may be taken any more."""
        self._closed = True
        for page in self.pages:
            page.view.release()
        self.pages.clear()
        self.free.clear()
        self.limit = 0

    async def close(self) -> None:
        """Give the pages back. Idempotent."""
        self.release()
        while self._chunks:
            await self._revoke(self._chunks.pop())
