"""The serving side of a disk: requests off a ring, checked, done on a storage, answered. No states, no store.

What a cache can answer or take at once is done in the event channel's handler itself; what must wait (for
pages to be mapped, for a disk) is a task. Nothing that a guest writes is believed: `_check` sees it first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Final

from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    SECTOR_SHIFT,
    SECTORS_PER_PAGE,
    SEGMENT_WORD_MASK,
    Abi,
    Op,
)
from xenbus.drivers.block.storage import Storage, StorageError
from xenbus.drivers.block.xbbd_grants import Grants, Run, grefs_of, whole_run
from xenbus.drivers.block.xbbd_order import WriteOrder
from xenbus.drivers.block.xbbd_transfer import BadRequest, Counters, Transfer
from xenbus.errors import HypervisorError, PeerError, XenbusError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.lookout import Lookout
from xenbus.ring.shared import REQ_PROD, BackRing

READ: Final = int(Op.READ)
WRITE: Final = int(Op.WRITE)
WRITE_BARRIER: Final = int(Op.WRITE_BARRIER)
FLUSH: Final = int(Op.FLUSH_DISKCACHE)
DISCARD: Final = int(Op.DISCARD)
INDIRECT: Final = int(Op.INDIRECT)

# Requests taken at a time, and served before the loop gets its turn: a busy guest must not starve the others.
BATCH: Final = 16
WORK_PER_WAKEUP: Final = 64
# So many sectors, moved at once, weigh as much as a request, and are answered before the rest of the batch.
SECTORS_PER_WORK: Final = 256
# So many segments are left for tasks, and perhaps mapped, before more requests are taken: a guest's ring has
# room for far more than a domain wants to map for it at a time. (One batch may come on top.)
SEGMENTS_MAX: Final = 8192


class BackQueue:
    """Requests of one connection.

    offered:      the operations that a request may ask for; max_indirect: segments of an indirect one
    spawn:        starts a task of the device
    on_fatal:     called once, with what the guest did to its ring; nothing more is read off it
    on_error:     called for each request that is answered with an error, with what it was and why
    """

    def __init__(
        self,
        ring: BackRing,
        abi: Abi,
        storage: Storage,
        grants: Grants,
        counters: Counters,
        *,
        readonly: bool,
        offered: Collection[int],
        max_indirect: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_fatal: Callable[[PeerError], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._ring = ring
        self._lookout = Lookout(ring.words, REQ_PROD)
        self._abi = abi
        self._storage = storage
        self._grants = grants
        self._counters = counters
        self._readonly = readonly
        self._max_indirect = max_indirect
        self._spawn = spawn
        self._on_fatal = on_fatal
        self._on_error = on_error
        self._channel: Channel | None = None
        self._sectors = storage.size >> SECTOR_SHIFT
        self._sector_mask = (storage.sector_size >> SECTOR_SHIFT) - 1
        self._backlog = b""  # whole slots that wait for a barrier
        self._deferred: list[Transfer] = []
        self._order = WriteOrder()
        self._barrier = False
        self._stopped = False
        self._released = False
        self._fatal = False
        self._in_kick = False
        self._scheduled = False
        self._push_scheduled = False
        self._done_sectors = 0
        self._idle: asyncio.Future[None] | None = None
        handlers: dict[int, Callable[[bytes], None]] = {
            READ: self._take_rw,
            WRITE: self._take_rw,
            WRITE_BARRIER: self._take_rw,
            INDIRECT: self._take_indirect,
            FLUSH: self._take_flush,
            DISCARD: self._take_discard,
        }
        self._handlers = {op: handler for op, handler in handlers.items() if op in offered}
        self.inflight = 0
        self._segments = 0

    # -- its life

    def start(self, channel: Channel) -> None:
        """Serve from now on; what is on the ring already is served at once."""
        self._channel = channel
        self.kick()

    async def pause(self, seconds: float) -> bool:
        """Take nothing more and let what runs end. False if something still ran after that time."""
        self._stopped = True
        if self.inflight and seconds:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=seconds)
        return not self.inflight

    def unpause(self) -> None:
        """Take again, also what came meanwhile."""
        self._stopped = False
        self.kick()

    async def stop(self, seconds: float) -> bool:
        """`pause`, and let go of the ring for good."""
        done = await self.pause(seconds)
        self._released = True
        self._ring.release()
        return done

    # -- taking requests

    def kick(self) -> None:
        """The event channel's handler."""
        if self._stopped or self._barrier or self._scheduled or self._channel is None or self._full:
            return
        self._in_kick = True
        try:
            self._work(WORK_PER_WAKEUP)
        except PeerError as error:
            self._broken(error)
        finally:
            self._in_kick = False

    def _broken(self, error: PeerError) -> None:
        self._stopped = True
        if not self._fatal:
            self._fatal = True
            self._on_fatal(error)

    def _work(self, budget: int) -> None:
        ring = self._ring
        while True:
            self._done_sectors = 0
            slots, self._backlog = self._backlog or ring.take_request_slots(BATCH), b""
            self._serve(slots)
            if self._deferred:
                self._begin_deferred()
            self._push()
            if self._barrier or self._stopped or self._full:
                return
            # As the front: while we look we are not notified. A task of ours would wait for us meanwhile.
            more = slots and not self.inflight and self._lookout.moved(ring.req_cons)
            if not more and not ring.final_check_for_requests():
                return
            budget -= max(1, len(slots) // ring.slot_size + self._done_sectors // SECTORS_PER_WORK)
            if budget <= 0:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._again)
                return

    @property
    def _full(self) -> bool:
        """`_finish` kicks again."""
        return self._segments >= SEGMENTS_MAX

    def _again(self) -> None:
        self._scheduled = False
        self.kick()

    def _serve(self, slots: bytes) -> None:
        """Requests, whole slots in a row. Those of one page, cached, cost no more than this loop."""
        pages, read, size = self._grants.whole, self._storage.try_read_into, self._ring.slot_size
        last, mask = self._sectors - SECTORS_PER_PAGE, self._sector_mask
        done = 0
        for n, (op, count, _, ident, sector, word) in enumerate(self._abi.request_slots.iter_unpack(slots)):
            if op == READ and count == 1 and sector <= last and not sector & mask:
                view = pages.get(word & SEGMENT_WORD_MASK)
                try:
                    if view is not None and read(sector << SECTOR_SHIFT, view):
                        done += 1
                        self._answer(READ, ident, BLKIF_RSP_OKAY)
                        continue
                except StorageError as error:
                    self._failed(READ, ident, BLKIF_RSP_ERROR, str(error))
                    continue
            self._take(slots[n * size : (n + 1) * size])
            if self._barrier:
                self._backlog = slots[(n + 1) * size :]  # these wait for it
                break
        if done:
            self._counters.requests[READ] += done
            self._counters.sectors[READ] += done * SECTORS_PER_PAGE

    def _take(self, raw: bytes) -> None:
        """One request of any kind."""
        handler = self._handlers.get(raw[0])
        try:
            if handler is None:
                known = raw[0] in self._counters.requests
                what = f"{Op(raw[0]).name}, which was not offered" if known else f"unknown operation {raw[0]}"
                self._failed(raw[0], self._abi.head.unpack_from(raw)[2], BLKIF_RSP_EOPNOTSUPP, what)
            else:
                handler(raw)
        except BadRequest as error:
            self._failed(raw[0], self._abi.head.unpack_from(raw)[2], BLKIF_RSP_ERROR, str(error))

    def _take_rw(self, raw: bytes) -> None:
        abi = self._abi
        op, count, _, ident, sector = abi.rw.unpack_from(raw)
        if op == WRITE_BARRIER and not count:
            self._take_empty_barrier(ident)
            return
        if not 1 <= count <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            raise BadRequest(f"{count} segments: 1 to {BLKIF_MAX_SEGMENTS_PER_REQUEST} it can be")
        self._rw(Transfer(op, ident, sector, abi.words[count].unpack_from(raw, abi.segments_at)))

    def _take_indirect(self, raw: bytes) -> None:
        _, op, count, ident, sector, _, *grefs = self._abi.indirect.unpack_from(raw)
        if op not in (READ, WRITE):
            raise BadRequest(f"operation {op} in an indirect request: read or write it can be")
        if not 1 <= count <= self._max_indirect:
            raise BadRequest(f"{count} indirect segments: 1 to {self._max_indirect} they can be")
        self._counters.requests[INDIRECT] += 1
        transfer = Transfer(op, ident, sector, ())
        transfer.count = count
        transfer.descriptors = tuple(grefs[: blkif.indirect_pages(count)])
        asked = [blkif.segment_word(gref) for gref in transfer.descriptors]
        pages = [self._grants.whole.get(word) or self._grants.exact((word,)) for word in asked]
        if None in pages:
            pages = [self._grants.copied(asked)]
        if None in pages:
            if op == WRITE:
                self._order.enter(transfer)
            self._deferred.append(transfer)
            return
        try:
            self._read_descriptors(transfer, [page for page in pages if page is not None])
            self._rw(transfer)
        except BadRequest as error:
            self._failed(op, ident, BLKIF_RSP_ERROR, str(error))

    @staticmethod
    def _read_descriptors(transfer: Transfer, pages: Sequence[memoryview]) -> None:
        """The guest can change its pages under us: one private copy, and only that is looked at."""
        size = transfer.count * blkif.SEGMENT_SIZE
        raw = b"".join(pages)[:size] if len(pages) > 1 else bytes(pages[0][:size])
        transfer.words = memoryview(raw).cast("Q").tolist()

    def _check(self, transfer: Transfer) -> list[memoryview] | None:
        """BadRequest, or `total` and `whole` are known. Every number that the guest wrote is looked at.

        Answers `Grants.whole_pages`: in whole pages, as in a run of them, there is no more to look at.
        """
        words, mask = transfer.words, self._sector_mask
        transfer.whole = whole_run(words)
        pages = None if transfer.whole else self._grants.whole_pages(words)
        total = len(words) * SECTORS_PER_PAGE
        if not transfer.whole and pages is None:
            total = 0
            for word in words:
                first, last = word >> 32 & 0xFF, word >> 40 & 0xFF
                if first > last or last >= SECTORS_PER_PAGE:
                    raise BadRequest(f"sectors {first} to {last} of a page of {SECTORS_PER_PAGE}")
                if (first | last + 1) & mask:
                    raise BadRequest(f"sectors {first} to {last} of a page: no whole sectors of this disk")
                total += last - first + 1
        if transfer.sector & mask:
            raise BadRequest(f"sector {transfer.sector}: no whole sector of this disk")
        if transfer.sector + total > self._sectors:
            raise BadRequest(f"{total} sectors at {transfer.sector}: the disk has {self._sectors}")
        if transfer.op != READ and self._readonly:
            raise BadRequest("a write to a read-only disk")
        transfer.total = total
        return pages

    def _rw(self, transfer: Transfer) -> None:
        """A transfer whose segments are known: done now if it need not wait, left for a task otherwise."""
        pages = self._check(transfer)
        op = transfer.op
        if op == WRITE_BARRIER:
            self._barrier = True
            self._segments += transfer.count
            self._begin(self._do_barrier(transfer, set(self._order.writes)))
            return
        try:
            done = self._now(transfer, pages)
        except StorageError as error:
            self._failed(op, transfer.ident, _status(error), str(error))
            return
        if done:
            self._done_sectors += transfer.total
            self._ok(transfer)
            if self._done_sectors >= SECTORS_PER_WORK:
                self._push()
            return
        if op == WRITE:
            self._order.enter(transfer)
        self._deferred.append(transfer)

    def _now(self, transfer: Transfer, pages: list[memoryview] | None) -> bool:
        """False: something would have to wait."""
        storage, words, offset = self._storage, transfer.words, transfer.sector << SECTOR_SHIFT
        move = storage.try_readv if transfer.op == READ else storage.try_writev
        if pages is not None:
            return move(offset, pages)
        if transfer.whole and (view := self._grants.exact(words)) is not None:
            return storage.try_read_into(offset, view) if transfer.op == READ else move(offset, (view,))
        if (copies := self._grants.copies) is not None:
            return copies.move(storage, transfer.op == READ, offset, words, transfer.total)
        if self._grants.missing(grefs_of(words)):
            return False
        views, _ = self._grants.views(words)
        try:
            return move(offset, views)
        finally:
            for view in views:
                view.release()

    def _take_flush(self, raw: bytes) -> None:
        op, _, ident = self._abi.head.unpack_from(raw)
        self._begin(self._do_flush(op, ident, set(self._order.writes)))

    def _take_empty_barrier(self, ident: int) -> None:
        """A barrier without data: how blkfronts flush where there is a barrier and no flush."""
        self._barrier = True
        self._begin(self._do_barrier(Transfer(WRITE_BARRIER, ident, 0, ()), set(self._order.writes)))

    def _take_discard(self, raw: bytes) -> None:
        # BLKIF_DISCARD_SECURE, the flag, is ignored where discard-secure is 0 (blkif.h).
        _, _, _, ident, sector, count = self._abi.discard.unpack_from(raw)
        if self._readonly:
            raise BadRequest("a discard on a read-only disk")
        if not count or sector + count > self._sectors or (sector | count) & self._sector_mask:
            raise BadRequest(f"discard of {count} sectors at {sector}: the disk has {self._sectors}")
        transfer = Transfer(DISCARD, ident, sector, ())
        transfer.total = count
        self._order.enter(transfer)
        self._begin(self._do_discard(transfer))

    # -- tasks

    def _begin(self, work: Coroutine[Any, Any, None], count: int = 1) -> None:
        self.inflight += count
        self._spawn(work)

    def _begin_deferred(self) -> None:
        """What is mapped goes on by itself; for all the rest of this wake-up there is one mapping."""
        batch, self._deferred = self._deferred, []
        self._segments += sum(transfer.count for transfer in batch)
        unmapped = []
        for transfer in batch:
            if transfer.words and not self._grants.missing(grefs_of(transfer.words)):
                self._begin(self._do(transfer, None))
            else:
                unmapped.append(transfer)
        if unmapped:
            self._begin(self._map_and_do(unmapped), len(unmapped))

    async def _map_and_do(self, batch: Sequence[Transfer]) -> None:
        indirect = [transfer for transfer in batch if not transfer.words]
        plain = [transfer for transfer in batch if transfer.words]
        if indirect:
            plain += await self._fetch_descriptors(indirect)
        for transfers, run in await self._map(plain):
            if run is not None:
                run.users += len(transfers)
            for transfer in transfers:
                self._spawn(self._do(transfer, run))

    async def _fetch_descriptors(self, batch: Sequence[Transfer]) -> list[Transfer]:
        """Those of them whose segments could be read and are good; the others are answered."""
        good = []
        for transfer in batch:
            try:
                run = await self._mapped(transfer.descriptors, writable=False)
                words = [blkif.segment_word(gref) for gref in transfer.descriptors]
                try:
                    views, _ = self._grants.views(words, run)
                except KeyError:  # as in `_transfer`
                    run = await self._grants.once(transfer.descriptors, writable=False)
                    views, _ = self._grants.views(words, run)
                try:
                    self._read_descriptors(transfer, views)
                finally:
                    for view in views:
                        view.release()
                    if run is not None:
                        await self._grants.done(run)
                self._check(transfer)
            except (HypervisorError, BadRequest) as error:
                self._finish(transfer, BLKIF_RSP_ERROR, f"descriptors: {error}")
            else:
                good.append(transfer)
        return good

    async def _mapped(self, grefs: Sequence[int], *, writable: bool) -> Run | None:
        """These pages are mapped from here on: for good (None), or in a run for once. HypervisorError."""
        missing = self._grants.missing(grefs)
        if not missing or await self._grants.keep(missing):
            return None
        return await self._grants.once(tuple(dict.fromkeys(grefs)), writable=writable)

    async def _map(self, batch: list[Transfer]) -> list[tuple[Sequence[Transfer], Run | None]]:
        """The pages of a batch. Kept ones request by request, so that each stays a run; others all in one."""
        mapped: list[tuple[Sequence[Transfer], Run | None]] = []
        if not self._grants.limit:
            # Pages to read from are asked for read-only: more than that a front need not have granted.
            reads = [transfer for transfer in batch if transfer.op == READ]
            writes = [transfer for transfer in batch if transfer.op != READ]
            batch = []
            for part in filter(None, (reads, writes)):
                grefs = dict.fromkeys(gref for transfer in part for gref in grefs_of(transfer.words))
                try:
                    mapped.append((part, await self._grants.once(tuple(grefs), writable=part is reads)))
                except HypervisorError:
                    batch += part  # one bad gref must not fail the others: one by one
        for transfer in batch:
            try:
                run = await self._mapped(grefs_of(transfer.words), writable=transfer.op == READ)
            except HypervisorError as error:
                self._finish(transfer, BLKIF_RSP_ERROR, str(error))
            else:
                mapped.append(((transfer,), run))
        return mapped

    async def _do(self, transfer: Transfer, extra: Run | None) -> None:
        """A mapped transfer, to its answer."""
        status, why = await self._transfer(transfer, extra)
        if extra is not None:
            extra.users -= 1
            if not extra.users:
                await self._grants.done(extra)
        self._finish(transfer, status, why)

    async def _transfer(self, transfer: Transfer, extra: Run | None) -> tuple[int, str]:
        grants = self._grants
        try:
            views, runs = grants.views(transfer.words, extra, whole=transfer.whole)
        except KeyError:
            # Kept, and thrown out again for another request before this one had its turn: map it for once.
            return await self._transfer_once(transfer)
        grants.hold(runs)
        try:
            await self._move(transfer, views)
        except (XenbusError, OSError) as error:
            return _status(error), str(error)
        finally:
            for view in views:
                view.release()
            grants.let_go(runs)
        return BLKIF_RSP_OKAY, ""

    async def _transfer_once(self, transfer: Transfer) -> tuple[int, str]:
        grefs = tuple(dict.fromkeys(grefs_of(transfer.words)))
        try:
            run = await self._grants.once(grefs, writable=transfer.op == READ)
        except HypervisorError as error:
            return BLKIF_RSP_ERROR, str(error)
        try:
            return await self._transfer(transfer, run)
        finally:
            await self._grants.done(run)

    async def _move(self, transfer: Transfer, views: list[memoryview]) -> None:
        storage, offset = self._storage, transfer.sector << SECTOR_SHIFT
        if transfer.op != READ:
            await storage.writev(offset, views)
        elif not storage.try_readv(offset, views):
            await storage.readv(offset, views)

    async def _do_barrier(self, transfer: Transfer, writes: set[int]) -> None:
        """Everything before it, then itself, then a flush; only then what comes after it."""
        await self._order.drained(writes)
        status, why = BLKIF_RSP_OKAY, ""
        if transfer.words:
            status, why = BLKIF_RSP_ERROR, "its pages cannot be mapped"
            try:
                extra = await self._mapped(grefs_of(transfer.words), writable=False)
            except HypervisorError as error:
                why = str(error)
            else:
                status, why = await self._transfer(transfer, extra)
                if extra is not None:
                    await self._grants.done(extra)
        if status == BLKIF_RSP_OKAY:
            status, why = await self._settled(self._storage.flush())
        self._finish(transfer, status, why)
        self._barrier = False
        asyncio.get_running_loop().call_soon(self.kick)  # not now: an eager task is within a kick itself

    async def _do_flush(self, op: int, ident: int, writes: set[int]) -> None:
        """Covers the writes that were taken before it, answered or not; later ones need not wait."""
        await self._order.drained(writes)
        status, why = await self._settled(self._storage.flush())
        self._finish(Transfer(op, ident, 0, ()), status, why)

    async def _do_discard(self, transfer: Transfer) -> None:
        discard = self._storage.discard(transfer.sector << SECTOR_SHIFT, transfer.total << SECTOR_SHIFT)
        status, why = await self._settled(discard)
        self._finish(transfer, status, why)

    @staticmethod
    async def _settled(work: Coroutine[Any, Any, object]) -> tuple[int, str]:
        try:
            await work
        except (XenbusError, OSError) as error:
            return _status(error), str(error)
        return BLKIF_RSP_OKAY, ""

    # -- answers

    def _finish(self, transfer: Transfer, status: int, why: str = "") -> None:
        """The end of what was left for a task."""
        self.inflight -= 1
        full = self._full
        self._segments -= transfer.count
        if full and not self._full:
            asyncio.get_running_loop().call_soon(self.kick)
        if transfer.serial:
            self._order.leave(transfer.serial)
        if not self._released:
            if status == BLKIF_RSP_OKAY:
                self._ok(transfer)
            else:
                self._failed(transfer.op, transfer.ident, status, why)
            if not self._in_kick and not self._push_scheduled:
                self._push_scheduled = True
                asyncio.get_running_loop().call_soon(self._push)
        if not self.inflight and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _ok(self, transfer: Transfer) -> None:
        op = transfer.op
        counters = self._counters
        counters.requests[op] += 1
        if op <= WRITE_BARRIER:
            counters.sectors[op and WRITE] += transfer.total
        self._answer(op, transfer.ident, BLKIF_RSP_OKAY)

    def _failed(self, op: int, ident: int, status: int, why: str) -> None:
        self._counters.errors += 1
        self._counters.last_error = why
        self._on_error(f"request {ident}, {_name(op)}: {why}")
        self._answer(op, ident, status)

    def _answer(self, op: int, ident: int, status: int) -> None:
        ring = self._ring
        self._abi.response.pack_into(ring.slots, ring.response_offset(), ident, op, status)
        ring.commit_response()

    def _push(self) -> None:
        self._push_scheduled = False
        if self._released:
            return
        try:
            pushed = self._ring.push_responses()
        except PeerError as error:  # of a ring with a journal
            self._broken(error)
            return
        if pushed and self._channel is not None:
            self._channel.notify()


def _name(op: int) -> str:
    return Op(op).name if op in Op.__members__.values() else f"operation {op}"


def _status(error: Exception) -> int:
    unsupported = isinstance(error, StorageError) and error.name == "EOPNOTSUPP"
    return BLKIF_RSP_EOPNOTSUPP if unsupported else BLKIF_RSP_ERROR
