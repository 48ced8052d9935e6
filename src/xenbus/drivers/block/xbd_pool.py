"""The pages that xbd lends its back end for data: runs of a few lengths, granted once and used again.

Knows grants and segment words; knows no ring and no request. Grants stay for the life of a connection
whether or not both ends persist them (blkif.h, note 7: the persistent protocol is compatible with the other).
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Final

from xenbus.drivers.block.blkif import BLKIF_MAX_SEGMENTS_PER_REQUEST, PAGE_SIZE, segment_word
from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import GrantedPages

Alloc = Callable[[int], Awaitable[GrantedPages]]
Revoke = Callable[[GrantedPages], Awaitable[None]]

# Most segments in a request of ours: 1 MiB, and one page of descriptors has room for 512.
MAX_SEGMENTS: Final = 256


class Buffer:
    """A run of granted pages, in a row on this side; where it may, with a page of descriptors behind it.

    view:        the data pages
    words:       one segment word a page; packed: the same as bytes, for a descriptor page
    descriptors: the descriptor page; None on a run that fits into a plain request
    """

    __slots__ = ("bin", "descriptor_gref", "descriptors", "packed", "view", "words")

    def __init__(self, bin_: Bin, view: memoryview, refs: tuple[int, ...]) -> None:
        self.bin = bin_
        size = bin_.pages * PAGE_SIZE
        self.view = view[:size]
        self.words = tuple(segment_word(ref) for ref in refs[: bin_.pages])
        self.packed = struct.pack(f"<{bin_.pages}Q", *self.words)
        self.descriptors: memoryview | None = None
        self.descriptor_gref = 0
        if bin_.indirect:
            self.descriptors = view[size : size + PAGE_SIZE]
            self.descriptor_gref = refs[bin_.pages]

    def release(self) -> None:
        self.view.release()
        if self.descriptors is not None:
            self.descriptors.release()


class Bin:
    """All buffers of one length. The last one given back is the next one taken (blkif.h: a LIFO suits the
    back end's LRU)."""

    __slots__ = ("count", "free", "indirect", "limit", "pages", "step")

    def __init__(self, pages: int, limit: int, step: int) -> None:
        self.pages = pages
        self.limit = limit
        self.step = step
        self.indirect = pages > BLKIF_MAX_SEGMENTS_PER_REQUEST
        self.count = 0
        self.free: list[Buffer] = []

    def growth(self) -> int:
        """How many buffers to add next: few at first, then as many as there are, at most `step`."""
        first = 4 if self.pages == 1 else 1
        return min(self.limit - self.count, self.step, max(first, self.count))


class Pool:
    """Buffers by length. Empty at first: a device that is never read costs no page.

    slots:        how many requests the ring holds; more buffers than that are of no use
    max_segments: what one request may carry, 1 to MAX_SEGMENTS
    """

    def __init__(self, alloc: Alloc, revoke: Revoke, slots: int, max_segments: int) -> None:
        self._alloc = alloc
        self._revoke = revoke
        self._chunks: list[GrantedPages] = []
        self._buffers: list[Buffer] = []
        direct = min(max_segments, BLKIF_MAX_SEGMENTS_PER_REQUEST)
        bins = [Bin(1, slots, 32)]
        if direct > 1:
            bins.append(Bin(direct, min(slots, 32), 4))
        if max_segments > direct:
            if max_segments > 64:
                bins.append(Bin(64, min(slots, 16), 2))
            bins.append(Bin(max_segments, min(slots, 8), 1))
        self._bins = bins
        self.single = bins[0]
        self._closed = False

    @property
    def pages(self) -> int:
        """Pages granted now, descriptors included."""
        return sum(len(chunk.refs) for chunk in self._chunks)

    def bin_for(self, pages: int) -> Bin:
        """The shortest that holds `pages`, or the longest there is."""
        found = self._bins[0]
        for candidate in self._bins:
            if candidate.limit:
                found = candidate
                if found.pages >= pages:
                    break
        return found

    async def grow(self, wanted: Bin) -> None:
        """Add buffers to a bin. HypervisorError when there are no pages for even one of the shortest."""
        count = wanted.growth()
        if count <= 0:
            return
        each = wanted.pages + wanted.indirect
        try:
            chunk = await self._alloc(count * each)
        except HypervisorError:
            # No more of these: what there is must do, and if there is none, shorter ones.
            wanted.limit = wanted.count
            if not any(found.limit for found in self._bins):
                raise
            return
        if self._closed:
            await self._revoke(chunk)
            return
        self._chunks.append(chunk)
        for n in range(count):
            start = n * each
            view = chunk.view[start * PAGE_SIZE : (start + each) * PAGE_SIZE]
            buffer = Buffer(wanted, view, chunk.refs[start : start + each])
            view.release()
            self._buffers.append(buffer)
            wanted.free.append(buffer)
        wanted.count += count

    def release(self) -> None:
        """Let go of every view; nothing may be taken any more."""
        self._closed = True
        for found in self._bins:
            found.free.clear()
            found.count = found.limit = 0
        for buffer in self._buffers:
            buffer.release()
        self._buffers.clear()

    async def close(self) -> None:
        """Give the pages back. Idempotent."""
        self.release()
        while self._chunks:
            await self._revoke(self._chunks.pop())
