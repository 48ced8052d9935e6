"""xbbd, the back half of a `vbd`: opens what `params` names, walks the handshake, connects its queues.

Knows its device and the peer's keys; a queue's ring and port are xbbd_queue's, requests xbbd_io's, pages
xbbd_grants', bytes the storage's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from xenbus.bus import XenbusDevice, XenbusDriver, XenbusState, back_driver
from xenbus.bus.journals import JournalBusy, identity
from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import Op
from xenbus.drivers.block.storage import Storage, open_storage
from xenbus.drivers.block.xbbd_grants import Grants
from xenbus.drivers.block.xbbd_io import MAX_INDIRECT_SEGMENTS, READ, WRITE, BackQueue
from xenbus.drivers.block.xbbd_journal import Journals
from xenbus.drivers.block.xbbd_queue import QueueKeys, QueueLink
from xenbus.drivers.block.xbbd_transfer import Counters
from xenbus.drivers.block.xbd import number
from xenbus.errors import DeadlineError, HypervisorError, NoEntry, PeerError, UsageError
from xenbus.newbus import NoMatch
from xenbus.ring.journal import JournalError
from xenbus.ring.shared import BackRing

# Seconds for the disk to end what it is at when the front goes, and for the front to go when we are detached:
# together less than the bus gives a detach.
DRAIN_TIMEOUT = 3.0
DETACH_TIMEOUT = 6.0
# Seconds for a process that we go on for to be gone: its journals unlocked, and then its ports unbound.
BUSY_TIMEOUT = 10.0
PORT_TIMEOUT = 1.0
T = TypeVar("T")

# Where a front that was connected may stand, with requests in its rings.
_HAS_RING = (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)


@dataclass(slots=True, frozen=True)
class Parameters:
    """A front's transport parameters: its queues, how it lays out slots, whether it uses its grants again."""

    queues: tuple[QueueKeys, ...]
    abi: blkif.Abi
    persistent: bool


@back_driver("vbd")
class Xbbd(XenbusDriver):
    """max_ring_page_order, max_persistent_grants, max_indirect_segments: what a front may have of it; 0 for
    the last two is not to offer it."""

    name = "xbbd"
    description = "Backend Virtual Block Device"
    deadline = 60.0

    max_ring_page_order: ClassVar[int] = 4
    max_persistent_grants: ClassVar[int] = 4096
    max_indirect_segments: ClassVar[int] = MAX_INDIRECT_SEGMENTS

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.counters = Counters()
        self._storage: Storage | None = None
        self._discard = False
        self._links: list[QueueLink] = []  # not empty: a front is connected, or about to be
        self._parameters: Parameters | None = None
        self._grants: Grants | None = None
        self._journals = Journals(dev)
        self._again = 0
        self._busy = asyncio.Lock()  # connecting and disconnecting: detach may run beside otherend_changed
        self._states: dict[XenbusState, Callable[[], Awaitable[None]]] = {
            XenbusState.INITIALISING: self._front_restarted,
            XenbusState.INITIALISED: self._connect,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._front_closing,
            XenbusState.CLOSED: self._front_closed,
        }

    # -- callbacks of the bus

    async def attach(self) -> None:
        storage = await self._open()
        try:
            self._discard = await self._may_discard(storage)
            await self.dev.set_state(XenbusState.INIT_WAIT, self._features(storage))
        except BaseException:
            await self._close_storage()  # a device that was not attached is not detached
            raise

    async def recover(self) -> None:
        """Goes on with the rings, and the requests in them, of a process that was killed."""
        dev, peer = self.dev, self.dev.otherend_state
        if dev.state is XenbusState.CONNECTED and peer is XenbusState.INITIALISING:
            await self.attach()  # it began anew, and waits for us to do so
        elif dev.state is not XenbusState.CLOSED and peer in _HAS_RING:
            try:
                await self._resume_rings()
            except JournalBusy as busy:
                self.dev.log.error("left alone: %s", busy)
                raise NoMatch(str(busy)) from None
            except JournalError:
                if peer is not XenbusState.INITIALISED:
                    raise
                await self._connect()  # it has asked for nothing yet
        elif peer is XenbusState.UNKNOWN:
            raise PeerError(f"{dev.otherend}: its state cannot be read")

    async def release(self) -> None:
        """Another process goes on: what runs ends, and the journals stay."""
        try:
            async with self._busy:
                left = await self._give_back(keep=True)
        finally:
            await self._close_storage()
        if left:
            raise DeadlineError("requests in flight to end", self.dev.nameunit, DRAIN_TIMEOUT)

    async def otherend_changed(self, state: XenbusState) -> None:
        act = self._states.get(state)
        if act is not None:
            await act()

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
        storage = self._storage
        if storage is not None:
            await self.dev.set_state(XenbusState.INIT_WAIT, self._features(storage))

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                try:
                    await dev.set_state(XenbusState.CLOSING)
                    await dev.wait_otherend(XenbusState.CLOSED, timeout=DETACH_TIMEOUT)
                except DeadlineError as error:
                    dev.log.warning("detached by force: %s", error)
        finally:
            # Also when the bus's deadline ended it: the file must not stay open.
            try:
                await self._disconnect()
            finally:
                await self._close_storage()
        if not dev.gone:
            await dev.set_state(XenbusState.CLOSED)

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        counters = self.counters
        leaves: dict[str, Callable[[], object]] = {
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

    async def _may_discard(self, storage: Storage) -> bool:
        if not storage.discards or storage.readonly:
            return False
        return await self.dev.read_opt("discard-enable") != "0"

    async def _close_storage(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None:
            await storage.close()

    def _features(self, storage: Storage) -> dict[str, object]:
        """What blkif.h calls features and transport parameters; both schemes of ring sizes (note 3)."""
        values: dict[str, object] = {
            "feature-barrier": 1,
            "feature-flush-cache": 1,
            "feature-persistent": int(self.max_persistent_grants > 0),
            "max-ring-page-order": self.max_ring_page_order,
            "max-ring-pages": 1 << self.max_ring_page_order,
        }
        if self.max_indirect_segments:
            values["feature-max-indirect-segments"] = self.max_indirect_segments
        if self._discard:
            values["feature-discard"] = 1
            values["discard-granularity"] = storage.sector_size
            values["discard-alignment"] = 0
            values["discard-secure"] = 0
        return values

    # -- the handshake

    async def _connect(self) -> None:
        dev = self.dev
        async with self._busy:
            if dev.state in (XenbusState.CLOSING, XenbusState.CLOSED):
                return
            if self._links and dev.otherend_state is not XenbusState.INITIALISED:
                return  # Connected, as we are
            parameters = await self._front_parameters()
            if self._links:
                if parameters == self._parameters:
                    return
                await self._give_back()  # it began anew, so fast that its Initialising was never seen
            storage = await self._open()
            self._parameters = parameters
            try:
                await self._build(storage, parameters)
            except BaseException:
                await self._give_back()
                raise
            connected = await dev.set_state(XenbusState.CONNECTED, self._properties(storage))
            if connected:
                for link in self._links:
                    link.start()

    async def _resume_rings(self) -> None:
        """From `recover`. Raises what makes it impossible, a journal that does not fit above all."""
        dev = self.dev
        async with self._busy:
            parameters = await self._front_parameters()
            storage = await self._open()
            self._parameters = parameters
            try:
                await self._check_same_disk(storage)
                await self._take_over(storage, parameters)
            except BaseException:
                await self._give_back()
                await self._close_storage()
                raise
            again = sum(link.again for link in self._links)
            self._again += again
            dev.log.info("goes on for a process that ended: %d requests are done again", again)
            for link in self._links:
                link.start()
                link.kick_front()

    async def _take_over(self, storage: Storage, front: Parameters) -> None:
        """The kernel may still be at the former process's end: its threads in system calls, its ports."""
        now = asyncio.get_running_loop().time
        began = now()
        while True:
            try:
                await self._build(storage, front, resumes=True)
                return
            except (JournalBusy, HypervisorError) as error:
                limit = BUSY_TIMEOUT if isinstance(error, JournalBusy) else PORT_TIMEOUT
                if now() - began >= limit:
                    raise
            await self._give_back(keep=True)
            await asyncio.sleep(0.05)

    async def _check_same_disk(self, storage: Storage) -> None:
        """UsageError if the front was told of another disk than this one."""
        now = self._properties(storage)
        told = await self.dev.gather(dict.fromkeys(now, int))
        if told["sectors"] > now["sectors"] or any(told[key] != now[key] for key in ("sector-size", "info")):
            raise UsageError(f"{storage.target}: it is {now}, and its guest was told {told}")

    async def _front_parameters(self) -> Parameters:
        """What the front published, or PeerError that names what is wrong with it."""
        dev = self.dev
        said = await dev.otherend_gather(
            {
                "ring-page-order": number,
                "event-channel": number,
                "protocol": bytes.decode,
                "feature-persistent": number,
            },
            {"ring-page-order": 0, "event-channel": -1, "protocol": "", "feature-persistent": 0},
        )
        order, port = said["ring-page-order"], said["event-channel"]
        if order > self.max_ring_page_order:
            raise PeerError(
                f"{dev.otherend_path}/ring-page-order: {order}, at most {self.max_ring_page_order}"
            )
        if port < 0:
            raise PeerError(f"{dev.otherend_path}/event-channel is missing")
        keys = [f"ring-ref{n}" for n in range(1 << order)] if order else ["ring-ref"]
        try:
            refs = await dev.otherend_gather(dict.fromkeys(keys, number))
        except NoEntry as missing:
            raise PeerError(f"{missing.path or keys[0]} is missing") from missing
        for key, ref in refs.items():
            if ref > 0xFFFFFFFF:
                raise PeerError(f"{dev.otherend_path}/{key}: {ref} is no grant reference")
        abi = blkif.abi_of(said["protocol"])
        queue = QueueKeys(tuple(refs[key] for key in keys), port)
        return Parameters((queue,), abi, bool(said["feature-persistent"]))

    async def _build(self, storage: Storage, front: Parameters, *, resumes: bool = False) -> None:
        dev = self.dev
        self._discard = await self._may_discard(storage)
        grants = Grants(dev.map_ring, dev.unmap, self.max_persistent_grants if front.persistent else 0)
        self._grants = grants

        def serve(ring: BackRing) -> BackQueue:
            return BackQueue(
                ring,
                front.abi,
                storage,
                grants,
                self.counters,
                readonly=storage.readonly,
                discard=self._discard,
                max_indirect=self.max_indirect_segments,
                spawn=dev.spawn,
                on_fatal=self._broken,
            )

        self._links = [QueueLink(dev, keys) for keys in front.queues]
        for n, link in enumerate(self._links):
            whose = identity(
                dev.node,
                dev.otherend_id,
                dev.otherend_path,
                n,
                len(self._links),
                front.abi.name,
                *link.keys.refs,
                link.keys.port,
            )
            size = front.abi.request_size
            open_journal = self._journals.opener(storage, n, whose, size, resumes=resumes)
            await link.build(front.abi, serve, open_journal)

    @staticmethod
    def _properties(storage: Storage) -> dict[str, int]:
        """`sectors` in 512 bytes whatever the sector size (blkif.h, "Backend Device Properties")."""
        return {
            "sectors": storage.size >> blkif.SECTOR_SHIFT,
            "sector-size": storage.sector_size,
            "physical-sector-size": storage.sector_size,
            "info": blkif.VDISK_READONLY if storage.readonly else 0,
        }

    async def _front_restarted(self) -> None:
        """It begins anew without having closed (a guest that was reset): the old ring is nobody's."""
        if self._links:
            await self._disconnect()
            if self.dev.state is XenbusState.CONNECTED:
                await self.dev.set_state(XenbusState.INIT_WAIT)

    async def _front_closing(self) -> None:
        """It may still have requests in flight: they are served until it is Closed."""
        if self.dev.state is not XenbusState.CLOSED:
            await self.dev.set_state(XenbusState.CLOSING)

    async def _front_closed(self) -> None:
        """Closed, or its node is gone. The storage is opened again when a front comes back."""
        await self._disconnect()
        await self._close_storage()
        await self.dev.set_state(XenbusState.CLOSED)

    # -- the end

    async def _disconnect(self) -> None:
        """Let what runs end, then give back ring, channel and pages. Idempotent."""
        async with self._busy:
            await self._give_back()

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

    def _broken(self, error: PeerError) -> None:
        """The front broke its ring: this device is over, the others go on."""
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: PeerError) -> None:
        await self.dev.fatal(error)
        await self._disconnect()


async def _all(doing: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Side by side: the deadlines of several queues do not add up. The first error, once all ended."""
    results = await asyncio.gather(*doing, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
