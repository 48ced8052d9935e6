"""xbd, the front half of a `vbd`: the handshake of blkif.h, and the disk that comes of it.

Knows its device, its peer's keys and the rings that it connects; a ring and its port are xbd_queue's,
requests xbd_io's, pages xbd_pool's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from xenbus.bus import Feature, Merge, XenbusDevice, XenbusState, front_driver, negotiate
from xenbus.bus.operations import Operation
from xenbus.drivers.block import blkif
from xenbus.drivers.block.disk import Disk, Geometry
from xenbus.drivers.block.diskio import FLUSH, OP_NAMES, WRITE_BARRIER
from xenbus.drivers.block.operations import DiskOperations
from xenbus.drivers.block.xbd_io import Connection, Queue
from xenbus.drivers.block.xbd_pool import MAX_SEGMENTS, Bin
from xenbus.drivers.block.xbd_queue import TRANSPORT_KEY, FrontLink
from xenbus.drivers.halves import FrontEnd
from xenbus.drivers.nodes import number
from xenbus.errors import LinkDown, PeerError, UsageError, XenbusError

# Seconds for the back end to answer what is in flight when either side closes, or when we are suspended.
DRAIN_TIMEOUT = 5.0

RING_ORDER = Feature("ring-page-order", Merge.LEAST, key="ring-page-order", peer_key="max-ring-page-order")
QUEUES = Feature("queues", Merge.LEAST, default=1, peer_key="multi-queue-max-queues", least=1)
FEATURES = (
    RING_ORDER,
    QUEUES,
    Feature("persistent", Merge.BOTH, peer_key="feature-persistent"),
    Feature("indirect-segments", Merge.LEAST, peer_key="feature-max-indirect-segments"),
    Feature("flush", Merge.BOTH, peer_key="feature-flush-cache"),
    Feature("barrier", Merge.BOTH, peer_key="feature-barrier"),
    Feature("discard", Merge.BOTH, peer_key="feature-discard"),
)


@front_driver("vbd")
class Xbd(FrontEnd):
    """Its `disk` is there from the start; I/O on it waits for the connection.

    The class attributes from abi to discard are what this front makes use of, as far as the back end has it.
    num_queues: one suffices: all queues are served by one loop; more are for back ends that gain by them
    """

    name = "xbd"
    description = "Virtual Block Device"
    deadline = 60.0

    abi: ClassVar[blkif.Abi] = blkif.NATIVE
    num_queues: ClassVar[int] = 1
    ring_page_order: ClassVar[int] = 1
    persistent: ClassVar[bool] = True
    indirect_segments: ClassVar[int] = MAX_SEGMENTS
    flush: ClassVar[bool] = True
    barrier: ClassVar[bool] = True
    discard: ClassVar[bool] = True

    @classmethod
    def unit(cls, dev: XenbusDevice) -> int | None:
        """The disk's number for an xvd*, as FreeBSD's xbd; others take what is free."""
        try:
            prefix, disk, _ = blkif.vdev_parts(int(dev.id))
        except (UsageError, ValueError):
            return None
        return disk if prefix == "xvd" else None

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.queue = Queue(self._broken, self._grow, lambda io, seconds: self.disk.overdue(io, seconds))
        self.disk = Disk(dev.nameunit, self.queue, lambda: dev.otherend)
        self._handle = 0
        self._links: list[FrontLink] = []
        self._operations: DiskOperations | None = None
        self._states = {
            XenbusState.INIT_WAIT: self._initialise,
            XenbusState.INITIALISED: self._initialise,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._closing,
            XenbusState.CLOSED: self._closed,
        }

    @property
    def _granted(self) -> bool:
        return bool(self._links)

    # -- callbacks of the bus

    async def attach(self) -> None:
        self._handle = (await self.dev.gather({"virtual-device": number}))["virtual-device"]

    async def suspend(self) -> None:
        """Nothing new goes out; what is in flight is waited for, since a back end that is slow to die could
        otherwise still write it after the next one has. What does not come goes out again after a resume."""
        self.queue.held = True
        await self._drain(DRAIN_TIMEOUT)

    async def resume(self, cancelled: bool) -> None:
        if not cancelled:
            self.queue.disconnect()
            links, self._links = self._links, []
            for link in links:
                link.abandon()
        self.queue.held = False
        self.queue.pump()

    async def detach(self) -> None:
        dev = self.dev
        try:
            if self._operations is not None:
                await self._operations.close()
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                await self._close(LinkDown(f"{dev.nameunit} is being detached"), DRAIN_TIMEOUT)
                await self._unmapped()
        finally:
            # Also when the deadline of a detach ended it: no caller is left waiting for a disk that is gone.
            await self._tear_down(LinkDown(f"{dev.nameunit} is gone"))

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        queue = self.queue
        leaves: dict[str, Callable[[], object]] = {
            "queues": lambda: len(self._links),
            "ring_pages": lambda: sum(link.ring_pages for link in self._links),
            "data_pages": lambda: sum(connection.pool.pages for connection in queue.connections),
            "inflight": lambda: queue.inflight,
            "waiting": lambda: queue.waiting,
            "errors": lambda: queue.errors,
        }
        for op, name in OP_NAMES.items():
            leaves[f"requests_{name.replace(' ', '_')}"] = lambda op=op: queue.requests[op]  # type: ignore[misc]
        return leaves

    def operations(self) -> Mapping[str, Operation]:
        """See xenbus.bus.operations."""
        if self._operations is None:
            self._operations = DiskOperations(self.disk)
        return self._operations.table()

    # -- the handshake

    async def _initialise(self) -> None:
        """The back end's limits are known: make the rings and publish them."""
        dev = self.dev
        if dev.state is not XenbusState.INITIALISING or self._links:
            return
        shape = (RING_ORDER, QUEUES)
        agreed = negotiate(shape, self._ours(), await self._said(feature.peer_key for feature in shape))
        order, count = agreed.number(RING_ORDER.name), agreed.number(QUEUES.name)
        self._links = [FrontLink(dev, self.queue.kick) for _ in range(count)]
        for link in self._links:
            await link.build(order, self.abi)
        values: dict[str, object] = {"protocol": self.abi.name, "feature-persistent": self.persistent}
        if order:  # with one page it is left out: where it is 0, Linux's blkback asks for `ring-ref0`
            values["ring-page-order"] = order
            values["num-ring-pages"] = 1 << order  # the same in the older scheme (blkif.h, note 3)
        if count > 1:
            values["multi-queue-num-queues"] = count
        for n, link in enumerate(self._links):
            values |= link.nodes(f"queue-{n}/" if count > 1 else "")
        await self._clear(values, TRANSPORT_KEY)
        await dev.set_state(XenbusState.INITIALISED, values)

    async def _connect(self) -> None:
        """The back end serves our ring: learn the disk. When connected already: it may have a new size."""
        dev = self.dev
        await self._initialise()  # a back end may skip InitWait (blkif.h, state diagrams)
        if dev.state is XenbusState.CONNECTED:
            self.disk.now_connected(await self._geometry())
            return
        if dev.state is not XenbusState.INITIALISED or not self._links:
            return
        geometry = await self._geometry()
        agreed = dev.features
        assert agreed is not None
        segments = max(agreed.number("indirect-segments"), blkif.BLKIF_MAX_SEGMENTS_PER_REQUEST)
        segments = min(segments, MAX_SEGMENTS)
        self.queue.flush_op = WRITE_BARRIER if geometry.barrier and not geometry.flush else FLUSH
        if await dev.set_state(XenbusState.CONNECTED):
            self.disk.now_connected(geometry)
            self.queue.connect([link.connect(self.abi, segments, self._handle) for link in self._links])

    def _ours(self) -> dict[str, int]:
        """By the names of FEATURES."""
        return {
            "ring-page-order": self.ring_page_order,
            "queues": self.num_queues,
            "persistent": int(self.persistent),
            "indirect-segments": self.indirect_segments,
            "flush": int(self.flush),
            "barrier": int(self.barrier),
            "discard": int(self.discard),
        }

    async def _geometry(self) -> Geometry:
        """The peer's word on the disk, checked. PeerError."""
        said = await self._said(feature.peer_key for feature in FEATURES)
        agreed = negotiate(FEATURES, self._ours(), said)
        self.dev.features = agreed
        wanted = ("sectors", "sector-size", "info", "physical-sector-size")
        grain = ("discard-granularity", "discard-alignment")
        said = await self.dev.otherend_gather(
            dict.fromkeys((*wanted, *grain), number),
            {
                "sector-size": blkif.SECTOR_SIZE,
                "info": 0,
                "physical-sector-size": 0,
                **dict.fromkeys(grain, 0),
            },
        )
        sector = said["sector-size"]
        if sector < blkif.SECTOR_SIZE or sector > blkif.PAGE_SIZE or sector & (sector - 1):
            raise PeerError(f"sector-size {sector}: not a power of two from 512 to {blkif.PAGE_SIZE}")
        size = said["sectors"] << blkif.SECTOR_SHIFT  # in 512 bytes, whatever sector-size says
        if size >> 63:
            raise PeerError(f"sectors {said['sectors']}: more bytes than an offset (off_t, NBD) can name")
        geometry = Geometry(
            size // sector * sector, sector, readonly=bool(said["info"] & blkif.VDISK_READONLY)
        )
        geometry.physical_sector_size = said["physical-sector-size"] or sector
        geometry.flush = bool(agreed["flush"])
        geometry.barrier = bool(agreed["barrier"])
        # Linux's blkback offers it for read-only disks, too.
        geometry.discard = bool(agreed["discard"]) and not geometry.readonly
        granularity = said["discard-granularity"] or sector
        if granularity % sector or said["discard-alignment"] % sector:
            geometry.discard = False  # no whole granule has whole sectors
        else:
            geometry.discard_granularity = granularity
            geometry.discard_alignment = said["discard-alignment"] % granularity
        return geometry

    async def _closing(self) -> None:
        await self._close(
            LinkDown(f"{self.dev.nameunit}: the back end ({self.dev.otherend}) closed it"), DRAIN_TIMEOUT
        )

    async def _closed(self) -> None:
        """Closed, or its node is gone: nobody will answer any more, and nobody has our pages."""
        if self.dev.state is not XenbusState.INITIALISING:
            gone = LinkDown(f"{self.dev.nameunit}: the back end ({self.dev.otherend}) is gone")
            await self._close(gone, 0)
            await self._tear_down(gone)

    # -- the end

    async def _close(self, why: XenbusError, drain: float) -> None:
        dev = self.dev
        if dev.state is XenbusState.CLOSED:
            return
        await dev.set_state(XenbusState.CLOSING)
        self.queue.held = True
        if drain:
            await self._drain(drain)
        await self._stop(why)
        await dev.set_state(XenbusState.CLOSED)

    async def _drain(self, seconds: float) -> None:
        """Until nothing is on the ring, or the time is over."""
        queue = self.queue
        if not queue.inflight:
            return
        idle = asyncio.get_running_loop().create_future()

        def on_idle() -> None:
            if not idle.done():
                idle.set_result(None)

        queue.on_idle = on_idle
        try:
            await asyncio.wait([idle], timeout=seconds)
        finally:
            queue.on_idle = None

    async def _stop(self, why: XenbusError) -> None:
        """Every caller is told, nothing more goes out or comes in. The pages stay granted. Idempotent."""
        self.disk.now_gone(why)
        self.queue.disconnect()
        for link in self._links:
            await link.close_port()

    async def _tear_down(self, why: XenbusError) -> None:
        """The same, and every page is given back. Idempotent."""
        await self._stop(why)
        links, self._links = self._links, []
        for link in links:
            await link.give_back()

    # -- what the queue asks for

    def _broken(self, error: PeerError) -> None:
        """The back end put nonsense on the ring: nothing it says there is believed any more."""
        self.disk.now_gone(error)
        connections = self.queue.disconnect()
        self.dev.spawn(self._give_up(error, connections), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: PeerError, connections: Iterable[Connection]) -> None:
        await self.dev.fatal(error)
        for connection in connections:
            await connection.pool.close()

    def _grow(self, connection: Connection, wanted: Bin) -> None:
        self.dev.spawn(self._grow_pool(connection, wanted), name=f"{self.dev.nameunit} grows its pool")

    async def _grow_pool(self, connection: Connection, wanted: Bin) -> None:
        error: XenbusError | None = None
        try:
            await connection.pool.grow(wanted)
        except XenbusError as raised:
            error = raised
        self.queue.grown(connection, error)
