"""A guest's data pages in xbbd's address space: kept mapped (persistent grants), or for one batch.

Knows grants and segment words; knows no ring and no storage. Bounded: at most `limit` pages stay mapped, and
the run that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from xenbus.drivers.block.blkif import (
    PAGE_SIZE,
    SECTOR_SHIFT,
    SECTORS_PER_PAGE,
    SEGMENT_WORD_MASK,
    WHOLE_PAGE,
    segment_word,
)
from xenbus.drivers.block.xbbd_copy import Copies
from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import Mapping

Map = Callable[[tuple[int, ...], bool], Awaitable[Mapping]]
Unmap = Callable[[Mapping], Awaitable[None]]

GREF_MASK = 0xFFFFFFFF
# Exact runs that are remembered; a guest that makes up more has them looked up page by page again.
MAX_RUNS = 4096


class Run:
    """One mapping and who uses it now."""

    __slots__ = ("_where", "mapping", "users", "view")

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.view = mapping.view
        self.users = 0
        self._where: dict[int, int] | None = None

    @property
    def where(self) -> dict[int, int]:
        """gref -> which page of the mapping."""
        if self._where is None:
            self._where = {gref: n for n, gref in enumerate(self.mapping.refs)}
        return self._where


def grefs_of(words: Sequence[int]) -> tuple[int, ...]:
    return tuple([word & GREF_MASK for word in words])


def whole_run(words: Sequence[int]) -> bool:
    """Whether these are whole pages with consecutive grefs: what a front with a pool of runs sends."""
    first = words[0]
    if first & SEGMENT_WORD_MASK & ~GREF_MASK != WHOLE_PAGE:
        return False
    count = len(words)
    return count == 1 or (
        words[-1] == first + count - 1 and tuple(words) == tuple(range(first, first + count))
    )


class Grants:
    """The pages of one connection.

    map, unmap: the device's own. limit: pages that stay mapped; 0 when the front has no persistent grants
    copies:     for what is not kept mapped, where there is such a thing; closed with this
    """

    def __init__(self, map_: Map, unmap: Unmap, limit: int, copies: Copies | None = None) -> None:
        self._map = map_
        self._unmap = unmap
        self.limit = limit
        self.copies = copies
        self.pages = 0
        self._runs: OrderedDict[Run, None] = OrderedDict()
        self._where: dict[int, tuple[Run, int]] = {}
        self._exact: dict[tuple[int, int], tuple[Run, memoryview]] = {}
        # Segment word of a whole page -> that page, for as long as there is room to spare and nobody needs to
        # know who used what when. Not to be kept beyond the call that looked it up.
        self.whole: dict[int, memoryview] = {}
        self._temporary: set[Run] = set()

    @property
    def temporary(self) -> int:
        """Mappings that go when their requests are answered."""
        return len(self._temporary)

    # -- synchronous: what is mapped already

    def exact(self, words: Sequence[int]) -> memoryview | None:
        """One view of a `whole_run`, if it lies in a row in one kept mapping."""
        gref, count = words[0] & GREF_MASK, len(words)
        found = self._exact.get((gref, count))
        if found is None:
            found = self._look_up(gref, count)
            if found is None:
                return None
        self._runs.move_to_end(found[0])
        return found[1]

    def _look_up(self, gref: int, count: int) -> tuple[Run, memoryview] | None:
        run, start = self._where.get(gref, (None, 0))
        if run is None or not self._in_a_row(run, start, gref, count):
            return None
        if len(self._exact) >= MAX_RUNS:
            self._forget_exact(list(self._exact))
        found = run, run.view[start * PAGE_SIZE : (start + count) * PAGE_SIZE]
        self._exact[gref, count] = found
        return found

    @staticmethod
    def _in_a_row(run: Run, start: int, gref: int, count: int) -> bool:
        return run.mapping.refs[start : start + count] == tuple(range(gref, gref + count))

    def whole_pages(self, words: Sequence[int]) -> list[memoryview] | None:
        """A page for each word, if each is a whole page that `whole` knows: long transfers of Linux's fronts,
        whose grefs are in no order. For use at once, as no run is held."""
        try:
            return list(map(self.whole.__getitem__, words))
        except KeyError:
            return None

    def copied(self, words: Sequence[int]) -> memoryview | None:
        """These whole pages in a row, by `copies`; None if that cannot be. For use at once."""
        return self.copies.fetch(words, len(words) * SECTORS_PER_PAGE) if self.copies is not None else None

    def missing(self, grefs: Sequence[int]) -> list[int]:
        """Those of them that are not kept mapped, each once, in order."""
        where = self._where
        return [gref for gref in dict.fromkeys(grefs) if gref not in where]

    def views(
        self, words: Sequence[int], extra: Run | None = None, *, whole: bool = False
    ) -> tuple[list[memoryview], list[Run]]:
        """The segments as views, neighbours joined, and the runs they lie in (to `hold` while they are used).

        Every gref must be kept mapped, or be in `extra`; KeyError otherwise. The caller releases the views.
        whole: these are a `whole_run`, so that mostly one look will do
        """
        if whole and extra is None:
            run, start = self._where[words[0] & GREF_MASK]
            if self._in_a_row(run, start, words[0] & GREF_MASK, len(words)):
                self._runs.move_to_end(run)
                return [run.view[start * PAGE_SIZE : (start + len(words)) * PAGE_SIZE]], [run]
        views: list[memoryview] = []
        runs: list[Run] = []
        there = extra.where if extra is not None else {}
        current: Run | None = None
        start = end = -1
        for word in words:
            gref = word & GREF_MASK
            if extra is not None and gref in there:
                run, index = extra, there[gref]
            else:
                run, index = self._where[gref]
            first = index * PAGE_SIZE + ((word >> 32 & 0xFF) << SECTOR_SHIFT)
            last = index * PAGE_SIZE + ((word >> 40 & 0xFF) + 1 << SECTOR_SHIFT)
            if run is current and first == end:
                end = last
                continue
            if current is not None:
                views.append(current.view[start:end])
            if run is not current:
                current = run
                runs.append(run)
                if run is not extra:
                    self._runs.move_to_end(run)
            start, end = first, last
        if current is not None:
            views.append(current.view[start:end])
        return views, runs

    @staticmethod
    def hold(runs: Sequence[Run]) -> None:
        for run in runs:
            run.users += 1

    @staticmethod
    def let_go(runs: Sequence[Run]) -> None:
        for run in runs:
            run.users -= 1

    # -- asynchronous: mapping

    async def keep(self, grefs: Sequence[int]) -> bool:
        """Map these for good, writable (blkif.h, note 8). False: there is no room, map them for once.

        HypervisorError if the guest granted one of them not, or not so.
        """
        if len(grefs) > self.limit:
            return False
        while self.pages + len(grefs) > self.limit:
            idle = next((run for run in self._runs if not run.users), None)
            if idle is None:
                return False
            await self._drop(idle)
        self.pages += len(grefs)
        if self.pages * 2 > self.limit:
            self.whole.clear()
        try:
            run = Run(await self._map(tuple(grefs), True))
        except BaseException:
            self.pages -= len(grefs)
            raise
        if any(gref in self._where for gref in grefs):
            # Another request brought some of them while we waited; what it did not bring is mapped for once.
            self.pages -= len(grefs)
            await self._unmap_run(run)
            return True
        self._runs[run] = None
        for index, gref in enumerate(grefs):
            self._where[gref] = run, index
        if self.pages * 2 <= self.limit:
            for index, gref in enumerate(grefs):
                self.whole[segment_word(gref)] = run.view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
        return True

    async def once(self, grefs: tuple[int, ...], *, writable: bool) -> Run:
        """Map these until `done`. HypervisorError."""
        run = Run(await self._map(grefs, writable))
        self._temporary.add(run)
        return run

    async def done(self, run: Run) -> None:
        self._temporary.discard(run)
        await self._unmap_run(run)

    async def _drop(self, run: Run) -> None:
        del self._runs[run]
        self.pages -= len(run.mapping.refs)
        for gref in run.mapping.refs:
            del self._where[gref]
            self.whole.pop(segment_word(gref), None)
        self._forget_exact([key for key, (found, _) in self._exact.items() if found is run])
        await self._unmap_run(run)

    def _forget_exact(self, keys: Sequence[tuple[int, int]]) -> None:
        for key in keys:
            self._exact.pop(key)[1].release()

    async def _unmap_run(self, run: Run) -> None:
        try:
            await self._unmap(run.mapping)
        except HypervisorError:
            pass  # the domain it belonged to is dead: its pages went with it

    async def close(self) -> None:
        """Unmap everything. Nobody may use a view any more. Idempotent."""
        for run in list(self._runs):
            await self._drop(run)
        for run in list(self._temporary):
            await self.done(run)
        if self.copies is not None:
            self.copies.close()
