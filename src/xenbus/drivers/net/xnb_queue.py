"""One queue of xnb: both rings mapped, ports bound, TxQueue and RxQueue on them; and all of it given back.

Knows a device as what maps and binds, and what a front published of one queue; knows no store and no states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from xenbus.bus import XenbusDevice
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.netif import RX_SLOT_SIZE, TX_SLOT_SIZE
from xenbus.drivers.net.packet import Link
from xenbus.drivers.net.xnb_front import QueueKeys
from xenbus.drivers.net.xnb_multicast import MulticastFilter
from xenbus.drivers.net.xnb_pages import Pages, pages_for
from xenbus.drivers.net.xnb_rx import RxQueue
from xenbus.drivers.net.xnb_tx import TxQueue
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel, Mapping
from xenbus.ring.answers import AnswerLog, AnswerRing


class QueueLink:
    """The connection to one queue of a front: `build`, `start`, and `give_back` whatever came of them.

    logs: for the answers on its transmit and its receive ring; not to be released before `give_back`
    """

    def __init__(self, dev: XenbusDevice, keys: QueueKeys, logs: tuple[AnswerLog, AnswerLog]) -> None:
        self._dev = dev
        self._keys = keys
        self._logs = logs
        self._mappings: list[Mapping] = []
        self._rings: list[AnswerRing] = []
        self._pages: list[Pages] = []
        self._channels: list[Channel] = []
        self.tx: TxQueue | None = None
        self.rx: RxQueue | None = None

    async def build(
        self,
        cable: Cable,
        link: Link,
        multicast: MulticastFilter,
        *,
        resumes: bool,
        on_groups: Callable[[Sequence[tuple[bool, bytes]]], bool],
        on_error: Callable[[str], None],
        on_fatal: Callable[[PeerError], None],
    ) -> RxQueue:
        """HypervisorError, RingError, JournalError; `give_back` all the same.

        link: what the guest takes; resumes: what the logs say of these rings goes on
        """
        dev, keys = self._dev, self._keys
        slots = ((keys.tx_ref, TX_SLOT_SIZE), (keys.rx_ref, RX_SLOT_SIZE))
        for (ref, size), log in zip(slots, self._logs, strict=True):
            mapping = await dev.map_ring((ref,))
            self._mappings.append(mapping)
            ring = AnswerRing(mapping.view, size, log, resumes=resumes)
            self._rings.append(ring)
            ring.unconsumed_requests()  # RingError now rather than in the first kick
        for writable in (False, True):
            gntdev, domid = dev.hv.gntdev, dev.otherend_id
            self._pages.append(pages_for(gntdev, domid, dev.map_ring, dev.unmap, writable=writable))
        self.tx = TxQueue(
            self._rings[0],
            self._pages[0],
            cable,
            spawn=dev.spawn,
            on_groups=on_groups,
            on_error=on_error,
            on_fatal=on_fatal,
        )
        self.rx = RxQueue(
            self._rings[1],
            self._pages[1],
            cable,
            link,
            multicast,
            spawn=dev.spawn,
            on_fatal=on_fatal,
        )
        handlers = (self.tx.kick, self.rx.kick) if len(keys.ports) > 1 else (self._kicked,)
        for port, handler in zip(keys.ports, handlers, strict=True):
            self._channels.append(await dev.bind_evtchn(port, handler))
        return self.rx

    def _kicked(self) -> None:
        if self.tx is not None and self.rx is not None:
            self.tx.kick()
            self.rx.kick()

    def start(self) -> None:
        """Serve from now on; what is on the rings already is served at once."""
        if self.tx is not None and self.rx is not None:
            self.rx.start(self._channels[-1])
            self.tx.start(self._channels[0])

    def kick_front(self) -> None:
        """A former process may have published responses and not have come to say so."""
        for channel in self._channels:
            channel.notify()

    async def abandon(self) -> None:
        """After a real suspend: rings and ports went with the old life of this domain."""
        if self.tx is not None and self.rx is not None:
            await asyncio.gather(self.tx.stop(0), self.rx.stop(0))
        self._channels.clear()
        self._mappings.clear()
        for ring in self._rings:
            ring.release()

    async def give_back(self, seconds: float) -> None:
        """Let mappings under way end, then give back ports, pages and rings. Idempotent."""
        dev = self._dev
        for channel in self._channels:
            channel.mask()
        if self.tx is not None and self.rx is not None:
            await asyncio.gather(self.tx.stop(seconds), self.rx.stop(seconds))
        channels, self._channels = self._channels, []
        for channel in channels:
            await dev.close_evtchn(channel)
        pages, self._pages = self._pages, []
        for kept in pages:
            await kept.close()
        rings, self._rings = self._rings, []
        for ring in rings:
            ring.release()
        mappings, self._mappings = self._mappings, []
        for mapping in mappings:
            await dev.unmap(mapping)
