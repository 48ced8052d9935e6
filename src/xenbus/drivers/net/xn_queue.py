"""One queue of xn: both rings granted, ports allocated, and what goes between them once there is a back end.

Knows a device as what grants and allocates, and the names of what a front publishes of one queue; knows no
states, and nothing of what is sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from xenbus.bus import XenbusDevice
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.netif import RX_SLOT_SIZE, TX_SLOT_SIZE
from xenbus.drivers.net.packet import Link
from xenbus.drivers.net.xn_pool import Pool
from xenbus.drivers.net.xn_rx import RxQueue
from xenbus.drivers.net.xn_tx import TxQueue
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel, GrantedPages
from xenbus.ring.shared import FrontRing

# Every node that says where rings are. A back end believes those of an earlier connection, too.
TRANSPORT_KEY: Final = re.compile(
    r"queue-[0-9]+|(tx|rx)-ring-ref|event-channel(-tx|-rx)?|multi-queue-num-queues"
)


class FrontLink:
    """The front's end of one queue: `build`, `connect`, and `give_back` whatever came of those two.

    grow: grows a pool in a task of the device, and calls what it is given when that is over
    """

    def __init__(self, dev: XenbusDevice, grow: Callable[[Pool, Callable[[], None]], None]) -> None:
        self._dev = dev
        self._grow = grow
        self._pages: list[GrantedPages] = []
        self._rings: list[FrontRing] = []
        self._channels: list[Channel] = []
        self._pools: list[Pool] = []
        self.tx: TxQueue | None = None
        self.rx: RxQueue | None = None

    @property
    def data_pages(self) -> int:
        return sum(len(pool.pages) for pool in self._pools)

    async def build(self, *, split: bool) -> None:
        """Grant two rings of a page, allocate one port or two. HypervisorError; `give_back` all the same."""
        dev = self._dev
        for size in (TX_SLOT_SIZE, RX_SLOT_SIZE):
            pages = await dev.grant_ring(1)
            self._pages.append(pages)
            ring = FrontRing(pages.view, size)
            ring.init()
            self._rings.append(ring)
        tx, rx = self._rings
        # What the back end only reads it need not be able to write.
        self._pools = [
            Pool(lambda count: dev.grant_ring(count, writable=False), dev.revoke, tx.size),
            Pool(dev.grant_ring, dev.revoke, rx.size),
        ]
        if split:
            self._channels = [await dev.alloc_evtchn(self._tx_kicked)]
            self._channels.append(await dev.alloc_evtchn(self._rx_kicked))
        else:
            self._channels = [await dev.alloc_evtchn(self._kicked)]

    def nodes(self, folder: str) -> dict[str, object]:
        """What to publish of it. folder: "" or "queue-N/"."""
        values: dict[str, object] = {
            f"{folder}tx-ring-ref": self._pages[0].refs[0],
            f"{folder}rx-ring-ref": self._pages[1].refs[0],
        }
        names = ["event-channel-tx", "event-channel-rx"] if len(self._channels) > 1 else ["event-channel"]
        for name, channel in zip(names, self._channels, strict=True):
            values[folder + name] = channel.port
        return values

    async def connect(
        self, cable: Cable, link: Link, *, notifies: bool, on_broken: Callable[[PeerError], None]
    ) -> TxQueue:
        """Pages for both directions, those to receive into on their ring. HypervisorError."""
        (tx_ring, rx_ring), (tx_pool, rx_pool) = self._rings, self._pools
        for pool in self._pools:
            await pool.grow()
        tx = TxQueue(
            tx_ring,
            self._channels[0],
            tx_pool,
            link,
            cable.counters,
            grow=lambda pool: self._grow(pool, tx.grown),
            room=cable.room,
            on_broken=on_broken,
        )
        rx = RxQueue(
            rx_ring,
            self._channels[-1],
            rx_pool,
            cable,
            notifies=notifies,
            grow=lambda pool: self._grow(pool, rx.fill),
            on_broken=on_broken,
        )
        self.tx, self.rx = tx, rx
        rx.fill()
        return tx

    def _tx_kicked(self) -> None:
        if self.tx is not None:
            self.tx.kick()

    def _rx_kicked(self) -> None:
        if self.rx is not None:
            self.rx.kick()

    def _kicked(self) -> None:
        self._tx_kicked()
        self._rx_kicked()

    def stop(self) -> None:
        """Nothing goes out or comes in any more. The pages stay granted. Idempotent."""
        tx, rx = self.tx, self.rx
        self.tx = self.rx = None
        if tx is not None:
            tx.close()
        if rx is not None:
            rx.close()

    def abandon(self) -> None:
        """After a real suspend: pages and ports went with the old life of this domain."""
        self.stop()
        for pool in self._pools:
            pool.release()
        for ring in self._rings:
            ring.release()

    async def give_back(self) -> None:
        """Ports, data pages and rings. Idempotent."""
        dev = self._dev
        self.stop()
        channels, self._channels = self._channels, []
        for channel in channels:
            await dev.close_evtchn(channel)
        pools, self._pools = self._pools, []
        for pool in pools:
            await pool.close()
        rings, self._rings = self._rings, []
        for ring in rings:
            ring.release()
        pages, self._pages = self._pages, []
        for granted in pages:
            await dev.revoke(granted)
