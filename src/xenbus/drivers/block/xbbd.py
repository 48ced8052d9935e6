"""xbbd, the back half of a `vbd`: opens what `params` names, walks the handshake, connects its queues.

Knows its device and the peer's keys; a queue's ring and port are xbbd_queue's, requests xbbd_io's, pages
xbbd_grants', bytes the storage's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from xenbus.bus import XenbusDevice, XenbusState, back_driver
from xenbus.bus.journals import JournalFile, Layout, identity
from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import Op
from xenbus.drivers.block.storage import Storage, open_storage
from xenbus.drivers.block.xbbd_copy import copies_for
from xenbus.drivers.block.xbbd_front import HEAD, Parameters, Shape
from xenbus.drivers.block.xbbd_grants import Grants
from xenbus.drivers.block.xbbd_io import READ, WRITE, BackQueue
from xenbus.drivers.block.xbbd_options import (
    MAX_INDIRECT_SEGMENTS,
    MAX_RING_PAGE_ORDER,
    OPTIONS,
    Options,
)
from xenbus.drivers.block.xbbd_queue import OpenJournal, QueueLink
from xenbus.drivers.block.xbbd_transfer import Counters
from xenbus.drivers.halves import BackEnd
from xenbus.drivers.journals import Journals
from xenbus.drivers.nodes import number
from xenbus.errors import DeadlineError, UsageError
from xenbus.ring.journal import Journal, JournalError, journal_size
from xenbus.ring.shared import BackRing

# Seconds for the disk to end what it is at when the front goes.
DRAIN_TIMEOUT = 3.0
# Where Linux's xen-blkback is loaded every `backend/vbd` is its own; xbbd beside it serves `backend/xbbd`.
OWN_TYPE = "xbbd"
T = TypeVar("T")

# Where a front that was connected may stand, with requests in its rings.
_HAS_RING = (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)


@back_driver("vbd", OWN_TYPE)
class Xbbd(BackEnd[Parameters]):
    """The class attributes from max_queues to discard are what a front may have where the device's nodes do
    not say otherwise: see Options."""

    name = "xbbd"
    description = "Backend Virtual Block Device"
    deadline = 60.0

    max_queues: ClassVar[int] = 4
    max_ring_page_order: ClassVar[int] = MAX_RING_PAGE_ORDER
    max_persistent_grants: ClassVar[int] = 4096
    max_indirect_segments: ClassVar[int] = MAX_INDIRECT_SEGMENTS
    flush: ClassVar[bool] = True
    barrier: ClassVar[bool] = True
    discard: ClassVar[bool] = True

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.counters = Counters()
        self._storage: Storage | None = None
        self._options = Options.of(type(self), dev.node, dict.fromkeys(o.key for o in OPTIONS))
        self._links: list[QueueLink] = []  # not empty: a front is connected, or about to be
        self._grants: Grants | None = None
        self._journals = Journals(dev)
        self._again = 0

    @property
    def _linked(self) -> bool:
        return bool(self._links)

    # -- callbacks of the bus

    @property
    def _left_linked(self) -> bool:
        return self.dev.state is not XenbusState.CLOSED and self.dev.otherend_state in _HAS_RING

    async def _resume(self) -> None:
        """A journal that does not fit makes it impossible, above all."""
        try:
            await super()._resume()
        except JournalError:
            if self.dev.otherend_state is not XenbusState.INITIALISED:
                raise
            await self._connect()  # it has asked for nothing yet

    async def release(self) -> None:
        """Another process goes on: what runs ends, and the journals stay."""
        try:
            async with self._busy:
                left = await self._give_back(keep=True)
        finally:
            await self._close_far_side()
        if left:
            raise DeadlineError("requests in flight to end", self.dev.nameunit, DRAIN_TIMEOUT)

    async def suspend(self) -> None:
        """A driver domain of its own is suspended: what runs is let end."""
        async with self._busy:
            await _all(link.pause(DRAIN_TIMEOUT) for link in self._links)

    async def resume(self, cancelled: bool) -> None:
        async with self._busy:
            if cancelled:
                for link in self._links:
                    link.unpause()
                return
            links, self._links, self._grants = self._links, [], None
            await _all(link.abandon() for link in links)
        if self._storage is not None:
            await self.dev.set_state(XenbusState.INIT_WAIT, self._offer())

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        counters = self.counters
        leaves: dict[str, Callable[[], object]] = {
            "queues": lambda: len(self._links),
            "ring_pages": lambda: sum(link.ring_pages for link in self._links),
            "persistent_grants": lambda: self._grants.pages if self._grants is not None else 0,
            "inflight": lambda: sum(link.inflight for link in self._links),
            "journal": lambda: self._journals.state,
            "requests_again": lambda: self._again,
            "errors": lambda: counters.errors,
            "last_error": lambda: counters.last_error,
            "sectors_read": lambda: counters.sectors[READ],
            "sectors_written": lambda: counters.sectors[WRITE],
            "target": lambda: self._storage.target if self._storage is not None else "",
        }
        for op in Op:
            leaves[f"requests_{op.name.lower()}"] = lambda op=op: counters.requests[op]  # type: ignore[misc]
        return leaves

    # -- the storage

    async def _open(self) -> Storage:
        """Open what the toolstack's nodes name, once. UsageError for what makes no sense, StorageError."""
        if self._storage is not None:
            return self._storage
        said = await self.dev.gather(
            {"params": bytes.decode, "mode": bytes.decode, "sector-size-wanted": number},
            {"params": "", "mode": "w", "sector-size-wanted": 0},
        )
        if not said["params"]:
            raise UsageError(f"{self.dev.node}/params: no target to open")
        if said["mode"] not in ("r", "w"):
            raise UsageError(f"{self.dev.node}/mode: {said['mode']!r} is neither r nor w")
        storage = await open_storage(
            said["params"], readonly=said["mode"] == "r", sector_size=said["sector-size-wanted"] or None
        )
        wrong = ""
        if storage.sector_size > blkif.PAGE_SIZE:
            wrong = f"sectors of {storage.sector_size} bytes are longer than a page"
        elif not storage.size:
            wrong = f"it has not one sector of {storage.sector_size} bytes"
        if wrong:
            await storage.close()
            raise UsageError(f"{storage.target}: {wrong}")
        self._storage = storage
        return storage

    async def _read_options(self) -> None:
        keys = [option.key for option in OPTIONS]
        said = await self.dev.gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys))
        self._options = Options.of(type(self), self.dev.node, said)

    async def _close_far_side(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None:
            await storage.close()

    def _offer(self) -> dict[str, object]:
        storage = self._storage
        assert storage is not None
        return self._options.nodes(discards=_discards(storage), sector_size=storage.sector_size)

    # -- the handshake

    async def _built(self) -> None:
        assert self._storage is not None
        if await self.dev.set_state(XenbusState.CONNECTED, self._properties(self._storage)):
            for link in self._links:
                link.start()

    async def _take_over(self, parameters: Parameters) -> None:
        await self._check_same_disk(await self._open())
        await super()._take_over(parameters)

    async def _resumed(self) -> None:
        again = sum(link.again for link in self._links)
        self._again += again
        self.dev.log.info("%d requests are done again", again)
        for link in self._links:
            link.start()
            link.kick_front()

    async def _check_same_disk(self, storage: Storage) -> None:
        """UsageError if the front was told of another disk than this one."""
        now = self._properties(storage)
        told = await self.dev.gather(dict.fromkeys(now, int))
        if told["sectors"] > now["sectors"] or any(told[key] != now[key] for key in ("sector-size", "info")):
            raise UsageError(f"{storage.target}: it is {now}, and its guest was told {told}")

    async def _front_parameters(self) -> Parameters:
        dev, options = self.dev, self._options
        said = await dev.otherend_gather(dict.fromkeys(HEAD, bytes), dict.fromkeys(HEAD))
        shape = Shape.of(dev.otherend_path, said, options.max_queues, options.max_ring_page_order)
        keys = shape.keys()
        return shape.parameters(await dev.otherend_gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys)))

    async def _build(self, front: Parameters, *, resumes: bool = False) -> None:
        dev, options, storage = self.dev, self._options, self._storage
        assert storage is not None
        # One for all queues, so that what a guest can have mapped is bounded by device (Linux: by queue).
        kept = options.max_persistent_grants if front.persistent else 0
        copies = None if kept else copies_for(dev.hv.gntdev, dev.otherend_id)
        grants = Grants(dev.map_ring, dev.unmap, kept, copies)
        self._grants = grants

        def serve(ring: BackRing) -> BackQueue:
            return BackQueue(
                ring,
                front.abi,
                storage,
                grants,
                self.counters,
                readonly=storage.readonly,
                offered=options.operations(discards=_discards(storage)),
                max_indirect=options.max_indirect_segments,
                spawn=dev.spawn,
                on_fatal=self._broken,
                on_error=self._refused,
            )

        self._links = [QueueLink(dev, keys) for keys in front.queues]
        for n, link in enumerate(self._links):
            await link.build(front.abi, serve, self._opener(storage, front, n, resumes=resumes))

    def _opener(self, storage: Storage, front: Parameters, queue: int, *, resumes: bool) -> OpenJournal:
        """How that queue gets its journal."""
        dev, keys, size = self.dev, front.queues[queue], front.abi.request_size
        where = (dev.node, dev.otherend_id, dev.otherend_path, queue, len(front.queues))
        whose = identity(*where, front.abi.name, *keys.refs, keys.port)
        why_not = "" if storage.outlives else f"{storage.target} does not outlive this process"

        def open_journal(entries: int, index: int) -> JournalFile[Journal] | None:
            return self._journals.open(
                f"q{queue}",
                Layout(journal_size(entries, size), lambda view: Journal(view, entries, size)),
                whose,
                lambda journal: journal.begin(whose, index),
                resumes=resumes,
                why_not=why_not,
            )

        return open_journal

    @staticmethod
    def _properties(storage: Storage) -> dict[str, int]:
        """`sectors` in 512 bytes whatever the sector size (blkif.h, "Backend Device Properties")."""
        return {
            "sectors": storage.size >> blkif.SECTOR_SHIFT,
            "sector-size": storage.sector_size,
            "physical-sector-size": storage.sector_size,
            "info": blkif.VDISK_READONLY if storage.readonly else 0,
        }

    async def _front_closed(self) -> None:
        """The storage is opened again when a front comes back."""
        await self._disconnect()
        await self._close_far_side()
        await super()._front_closed()

    # -- the end

    async def _give_back(self, *, keep: bool = False) -> int:
        """Returns how many requests did not end. keep: another process goes on with the rings."""
        links, self._links = self._links, []
        grants, self._grants = self._grants, None
        left = sum(await _all(link.give_back(DRAIN_TIMEOUT, keep=keep) for link in links))
        if left:
            self.dev.log.warning("%d requests did not end within %g s", left, DRAIN_TIMEOUT)
        if grants is not None:
            await grants.close()
        if not keep:
            self._journals.discard()
        return left

    def _refused(self, what: str) -> None:
        """A request was answered with an error: its guest's doing, or its disk's; people want to know."""
        self.dev.log.warning("%s", what)


def _discards(storage: Storage) -> bool:
    return storage.discards and not storage.readonly


async def _all(doing: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Side by side: the deadlines of several queues do not add up. The first error, once all ended."""
    results = await asyncio.gather(*doing, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
