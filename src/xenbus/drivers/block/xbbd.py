"""xbbd, the back half of a `vbd`: opens what `params` names, walks the handshake, connects a queue.

Knows its device and the peer's keys; requests are xbbd_io's, pages xbbd_grants', bytes the storage's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from xenbus.bus import XenbusDevice, XenbusDriver, XenbusState, back_driver
from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import Op
from xenbus.drivers.block.storage import Storage, open_storage
from xenbus.drivers.block.xbbd_copy import copies_for
from xenbus.drivers.block.xbbd_grants import Grants
from xenbus.drivers.block.xbbd_io import MAX_INDIRECT_SEGMENTS, READ, WRITE, BackQueue
from xenbus.drivers.block.xbbd_transfer import Counters
from xenbus.drivers.block.xbd import number
from xenbus.errors import DeadlineError, NoEntry, PeerError, UsageError
from xenbus.hypervisor.interface import Channel
from xenbus.hypervisor.interface import Mapping as GrantMapping
from xenbus.ring.shared import BackRing

# Seconds for the disk to end what it is at when the front goes, and for the front to go when we are detached:
# together less than the bus gives a detach.
DRAIN_TIMEOUT = 3.0
DETACH_TIMEOUT = 6.0


@dataclass(slots=True, frozen=True)
class Parameters:
    """A front's transport parameters: ring refs in order, port, layout, whether it uses its grants again."""

    refs: tuple[int, ...]
    port: int
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
        self._mapping: GrantMapping | None = None
        self._channel: Channel | None = None
        self._queue: BackQueue | None = None
        self._parameters: Parameters | None = None
        self._grants: Grants | None = None
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
            self._discard = storage.discards and not storage.readonly
            if self._discard and await self.dev.read_opt("discard-enable") == "0":
                self._discard = False
            await self.dev.set_state(XenbusState.INIT_WAIT, self._features(storage))
        except BaseException:
            await self._close_storage()  # a device that was not attached is not detached
            raise

    async def otherend_changed(self, state: XenbusState) -> None:
        act = self._states.get(state)
        if act is not None:
            await act()

    async def suspend(self) -> None:
        """A driver domain of its own is suspended: what runs is let end."""
        async with self._busy:
            if self._queue is not None:
                await self._queue.pause(DRAIN_TIMEOUT)

    async def resume(self, cancelled: bool) -> None:
        async with self._busy:
            if cancelled:
                if self._queue is not None:
                    self._queue.unpause()
                return
            if self._queue is not None:
                await self._queue.stop(0)
            self._queue = self._grants = self._channel = self._mapping = None
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
            "ring_pages": lambda: len(self._mapping.refs) if self._mapping is not None else 0,
            "persistent_grants": lambda: self._grants.pages if self._grants is not None else 0,
            "inflight": lambda: self._queue.inflight if self._queue is not None else 0,
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
            if self._queue is not None and dev.otherend_state is not XenbusState.INITIALISED:
                return  # Connected, as we are
            parameters = await self._front_parameters()
            if self._queue is not None:
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
            if connected and self._queue is not None and self._channel is not None:
                self._queue.start(self._channel)

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
        return Parameters(tuple(refs[key] for key in keys), port, abi, bool(said["feature-persistent"]))

    async def _build(self, storage: Storage, front: Parameters) -> None:
        dev, abi = self.dev, front.abi
        self._mapping = await dev.map_ring(front.refs)
        ring = BackRing(self._mapping.view, abi.request_size)
        kept = self.max_persistent_grants if front.persistent else 0
        copies = None if kept else copies_for(dev.hv.gntdev, dev.otherend_id)
        self._grants = Grants(dev.map_ring, dev.unmap, kept, copies)
        self._queue = BackQueue(
            ring,
            abi,
            storage,
            self._grants,
            self.counters,
            readonly=storage.readonly,
            discard=self._discard,
            max_indirect=self.max_indirect_segments,
            spawn=dev.spawn,
            on_fatal=self._broken,
        )
        ring.unconsumed_requests()  # RingError now rather than in the first kick
        self._channel = await dev.bind_evtchn(front.port, self._queue.kick)

    @staticmethod
    def _properties(storage: Storage) -> dict[str, object]:
        """`sectors` in 512 bytes whatever the sector size (blkif.h, "Backend Device Properties")."""
        return {
            "sectors": storage.size >> blkif.SECTOR_SHIFT,
            "sector-size": storage.sector_size,
            "physical-sector-size": storage.sector_size,
            "info": blkif.VDISK_READONLY if storage.readonly else 0,
        }

    async def _front_restarted(self) -> None:
        """It begins anew without having closed (a guest that was reset): the old ring is nobody's."""
        if self._queue is not None:
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

    async def _give_back(self) -> None:
        dev = self.dev
        queue, self._queue = self._queue, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.mask()
        if queue is not None and not await queue.stop(DRAIN_TIMEOUT):
            dev.log.warning("%d requests did not end within %g s", queue.inflight, DRAIN_TIMEOUT)
        if channel is not None:
            await dev.close_evtchn(channel)
        grants, self._grants = self._grants, None
        if grants is not None:
            await grants.close()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            await dev.unmap(mapping)

    def _broken(self, error: PeerError) -> None:
        """The front broke its ring: this device is over, the others go on."""
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: PeerError) -> None:
        await self.dev.fatal(error)
        await self._disconnect()
