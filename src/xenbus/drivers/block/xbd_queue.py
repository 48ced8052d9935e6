"""One queue of xbd: its ring granted, its port allocated, its Connection while the back end serves it.

Knows a device as what grants and allocates, and the names of what a front publishes of one queue; knows no
states, and nothing of what is sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from xenbus.bus import XenbusDevice
from xenbus.drivers.block import blkif
from xenbus.drivers.block.xbd_io import Connection
from xenbus.drivers.block.xbd_pool import Pool
from xenbus.hypervisor.interface import Channel, GrantedPages
from xenbus.ring.shared import FrontRing

# Every node that says where rings are. A back end believes those of an earlier connection, too.
TRANSPORT_KEY: Final = re.compile(
    r"(ring-ref|queue-)[0-9]+|ring-ref|event-channel|ring-page-order|num-ring-pages|multi-queue-num-queues"
)


class FrontLink:
    """The front's end of one queue: `build`, `connect`, and `give_back` whatever came of those two.

    kick: what to do with a notification, once there is a connection
    """

    __slots__ = ("_channel", "_dev", "_kick", "_pages", "_ring", "connection")

    def __init__(self, dev: XenbusDevice, kick: Callable[[Connection], None]) -> None:
        self._dev = dev
        self._kick = kick
        self._pages: GrantedPages | None = None
        self._ring: FrontRing | None = None
        self._channel: Channel | None = None
        self.connection: Connection | None = None

    @property
    def ring_pages(self) -> int:
        return len(self._pages.refs) if self._pages is not None else 0

    async def build(self, order: int, abi: blkif.Abi) -> None:
        """Grant a ring of 1 << order pages, allocate a port. HypervisorError; `give_back` all the same."""
        self._pages = await self._dev.grant_ring(1 << order)
        self._ring = FrontRing(self._pages.view, abi.request_size, abi.response_size)
        self._ring.init()
        self._channel = await self._dev.alloc_evtchn(self._kicked)

    def nodes(self, folder: str) -> dict[str, object]:
        """What to publish of it. folder: "" or "queue-N/"."""
        assert self._pages is not None and self._channel is not None
        refs = self._pages.refs
        names = [f"ring-ref{n}" for n in range(len(refs))] if len(refs) > 1 else ["ring-ref"]
        return {
            f"{folder}event-channel": self._channel.port,
            **{folder + name: ref for name, ref in zip(names, refs, strict=True)},
        }

    def connect(self, abi: blkif.Abi, max_segments: int, handle: int) -> Connection:
        """The back end serves the ring. max_segments: of one request"""
        dev, ring, channel = self._dev, self._ring, self._channel
        assert ring is not None and channel is not None
        pool = Pool(dev.grant_ring, dev.revoke, ring.size, max_segments)
        self.connection = Connection(ring, channel, abi, pool, max_segments, handle)
        return self.connection

    def _kicked(self) -> None:
        if self.connection is not None:
            self._kick(self.connection)

    def abandon(self) -> None:
        """After a real suspend: pages and port went with the old life of this domain."""
        self.connection = None
        if self._ring is not None:
            self._ring.release()

    async def close_port(self) -> None:
        """The queue has let go of the connection: no kick of it any more. Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._dev.close_evtchn(channel)

    async def give_back(self) -> None:
        """Port, data pages and ring. Idempotent."""
        dev = self._dev
        await self.close_port()
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.pool.close()
        ring, pages = self._ring, self._pages
        self._ring = self._pages = None
        if ring is not None:
            ring.release()
        if pages is not None:
            await dev.revoke(pages)
