"""The transmit ring of xn: packets into pages, requests onto the ring, responses off it. Synchronous.

Knows a ring, its port and a pool; knows no store and no states. Copies each packet once, into a page that the
back end may read for as long as the connection lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xenbus.drivers.net import netif
from xenbus.drivers.net.cable import unfit
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.netif import (
    EXTRA_SIZE,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    PAGE_SIZE,
    TX_CSUM_BLANK,
    TX_DATA_VALIDATED,
    TX_EXTRA_INFO,
    TX_MORE_DATA,
    TX_REQUEST,
    TX_RESPONSE,
)
from xenbus.drivers.net.packet import ETH_HLEN, Link, Packet
from xenbus.drivers.net.xn_pool import Pool
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.shared import FrontRing


class TxQueue:
    """A Lane. Its owner feeds it kicks and grows its pool.

    link:      what the back end takes
    grow:      starts `pool.grow` as a task, and calls `grown` when that is over
    room:      called when there is room again, after `send` took fewer than it was given
    on_broken: called once, with what the back end did; nothing more is read off the ring
    """

    def __init__(
        self,
        ring: FrontRing,
        channel: Channel,
        pool: Pool,
        link: Link,
        counters: Counters,
        *,
        grow: Callable[[Pool], None],
        room: Callable[[TxQueue], None],
        on_broken: Callable[[PeerError], None],
    ) -> None:
        self._ring = ring
        self._channel = channel
        self._link = link
        self._counters = counters
        self._grow = grow
        self._room = room
        self._on_broken = on_broken
        self._short: tuple[int, int] | None = None  # slots and pages that there was no room for
        self._over = False
        self._longest = min(PAGE_SIZE, link.mtu + 18)
        self.pool = pool

    @property
    def inflight(self) -> int:
        """Slots that the back end has not answered, as far as we looked."""
        return self._ring.size - self._ring.free() if not self._over else 0

    def close(self) -> None:
        """Nothing more goes out or comes in. The ring is its owner's to release."""
        self._over = True

    # -- requests

    def send(self, packets: Sequence[Packet]) -> int:
        if self._over:
            self._counters.tx_dropped += len(packets)
            return len(packets)
        ring, free, counters = self._ring, self.pool.free, self._counters
        if len(free) < self.pool.limit >> 1 and not self._reap():
            return len(packets)
        slots, pack, longest = ring.slots, TX_REQUEST.pack_into, self._longest
        room = min(len(free), ring.free())
        taken = octets = sent = 0
        for packet in packets:
            data = packet.data
            size = len(data)
            if ETH_HLEN <= size <= longest and not packet.gso:
                if not room:
                    room = self._make_room(1)
                    if not room:
                        break
                room -= 1
                page = free.pop()
                page.view[:size] = data
                page.busy = page.head = True
                flags = 3 if packet.csum_blank else TX_DATA_VALIDATED if packet.data_validated else 0
                pack(slots, ring.claim_request(), page.ref, 0, flags, page.ident, size)
            elif (why := unfit(packet, self._link)) or self._never(packet):
                counters.bad_tx("length" if why else "", why or f"{size} bytes: no pages for so many")
                taken += 1
                continue
            else:
                if not self._put(packet):
                    break
                room = min(len(free), ring.free())
            taken += 1
            sent += 1
            octets += size
        counters.tx_packets += sent
        counters.tx_bytes += octets
        self._push()
        return taken

    def send_extra(self, extra: bytes) -> bool:
        """A dummy request that carries nothing but extra info: multicast control. False: no room."""
        if self._over or not (self._free(2, 1) or self._make_room(2)):
            return False
        ring, page = self._ring, self.pool.free.pop()
        page.busy = page.head = True
        # Linux's netback looks at the extra info before it looks at the size.
        TX_REQUEST.pack_into(ring.slots, ring.claim_request(), page.ref, 0, TX_EXTRA_INFO, page.ident, 0)
        self._put_extra(extra)
        self._push()
        return True

    def _never(self, packet: Packet) -> bool:
        """More slots than the ring or the pool will ever have."""
        pages = netif.data_slots(len(packet.data))
        return pages > self.pool.limit or pages + bool(packet.gso) > self._ring.size

    def _free(self, slots: int, pages: int) -> bool:
        return self._ring.free() >= slots and len(self.pool.free) >= pages

    def _put(self, packet: Packet) -> bool:
        """A packet of several slots. False: no room."""
        data, gso = packet.data, packet.gso
        size = len(data)
        pages = netif.data_slots(size)
        slots = pages + bool(gso)
        if not self._free(slots, pages) and not self._make_room(slots, pages):
            return False
        ring, free = self._ring, self.pool.free
        flags = TX_CSUM_BLANK | TX_DATA_VALIDATED if packet.csum_blank else 0
        if packet.data_validated:
            flags |= TX_DATA_VALIDATED
        if gso:
            flags |= TX_EXTRA_INFO
        said = size  # the first request has the size of the whole
        view = memoryview(data)
        for start in range(0, size, PAGE_SIZE):
            piece = view[start : start + PAGE_SIZE]
            page = free.pop()
            page.view[: len(piece)] = piece
            page.busy, page.head = True, not start
            if start + PAGE_SIZE < size:
                flags |= TX_MORE_DATA
            length = said or len(piece)
            TX_REQUEST.pack_into(ring.slots, ring.claim_request(), page.ref, 0, flags, page.ident, length)
            if not start and gso:
                self._put_extra(netif.gso_extra(gso, packet.gso_size))
            said = flags = 0
        return True

    def _put_extra(self, extra: bytes) -> None:
        at = self._ring.claim_request()
        self._ring.slots[at : at + EXTRA_SIZE] = extra

    def _push(self) -> None:
        if self._ring.push_requests():
            self._channel.notify()

    def _make_room(self, slots: int, pages: int = 1) -> int:
        """How many requests of one page there is room for now; 0: not for these. Then `_room` is called
        later: when responses come, or when the pool has grown."""
        self._push()
        ring, pool = self._ring, self.pool
        while True:
            if not self._reap():
                return 0
            if self._free(slots, pages):
                self._short = None
                return min(len(pool.free), ring.free())
            self._short = slots, pages
            if len(pool.free) < pages and pool.can_grow:
                self._grow(pool)
            if ring.free() == ring.size or not ring.final_check_for_responses(self._after):
                return 0

    def grown(self) -> None:
        """The pool has more pages than before, or will have no more."""
        self._relieve()

    # -- responses

    def kick(self) -> None:
        """The event channel's handler."""
        if not self._over and self._reap():
            self._relieve()

    def _relieve(self) -> None:
        if self._short is None or self._over:
            return
        idle = self._ring.free() == self._ring.size
        if self._free(*self._short) or (idle and not self.pool.growing):
            self._short = None
            self._room(self)
        elif not idle:
            try:
                more = self._ring.final_check_for_responses(self._after)
            except PeerError as error:
                self._broken(error)
                return
            if more:
                self.kick()

    @property
    def _after(self) -> int:
        """Half of what is under way, so that one wake-up makes room for many."""
        return max(1, (self._ring.size - self._ring.free()) >> 1)

    def _reap(self) -> bool:
        """Take every response there is. False: the back end broke its ring."""
        pages, free, counters = self.pool.pages, self.pool.free, self._counters
        try:
            slots = self._ring.take_response_slots()
            for ident, status in TX_RESPONSE.iter_unpack(slots):
                if status == NETIF_RSP_NULL:
                    continue
                if ident >= len(pages) or not pages[ident].busy:
                    raise PeerError(f"a response for transmit request {ident}, which is not in flight")
                page = pages[ident]
                page.busy = False
                free.append(page)
                if status != NETIF_RSP_OKAY and page.head:
                    counters.bad_tx("", f"the back end answered {status} to a request")
        except PeerError as error:
            self._broken(error)
            return False
        return True

    def _broken(self, error: PeerError) -> None:
        if not self._over:
            self._over = True
            self._on_broken(error)
