"""The receive ring of xn: empty pages onto it, packets off it. Synchronous.

Knows a ring, its port and a pool; knows no store and no states. Responses are told apart by their slots, not
by their ids: extra info lies where the id would be (netif.h, "rx response"). A page's bytes are copied before
they are looked at, since the back end can write to it for as long as the connection lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from xenbus.drivers.net import netif
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.checksum_fix import with_blank_checksum
from xenbus.drivers.net.netif import (
    PAGE_SIZE,
    RX_CSUM_BLANK,
    RX_DATA_VALIDATED,
    RX_EXTRA_INFO,
    RX_MORE_DATA,
    RX_REQUEST,
    RX_RESPONSE,
    RX_SLOT_SIZE,
    BadPacket,
)
from xenbus.drivers.net.packet import ETH_HLEN, MAX_FRAME, Gso, Packet
from xenbus.drivers.net.xn_pool import Page, Pool
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.lookout import Lookout
from xenbus.ring.shared import RSP_PROD, FrontRing

# Responses taken at a time, and in one wake-up before the loop gets its turn.
BATCH: Final = 64
# More than these in one packet are no mistake: fewer than the pages that there are at first.
FATAL_SLOTS: Final = 28
WORK_PER_WAKEUP: Final = 256


class _Chain:
    """A packet of which not all slots have come.

    pages:  of all its slots: they stay here until it is whole, so that its bytes are copied once
    pieces: (page, offset, length) of its data; size: bytes in all
    extra:  one comes next; wrong: why it will be dropped
    """

    __slots__ = ("extra", "extras", "flags", "gso", "gso_size", "pages", "pieces", "size", "slots", "wrong")

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.pages: list[Page] = []
        self.pieces: list[tuple[Page, int, int]] = []
        self.size = 0
        self.slots = 0
        self.extra = False
        self.extras = 0
        self.gso = Gso.NONE
        self.gso_size = 0
        self.wrong: BadPacket | None = None


class RxQueue:
    """Its owner feeds it kicks and grows its pool.

    cable:     takes the packets; while it is blocked nothing is taken off the ring
    grow:      starts `pool.grow` as a task, and calls `fill` when that is over
    on_broken: called once, with what the back end did; nothing more is read off the ring
    """

    def __init__(
        self,
        ring: FrontRing,
        channel: Channel,
        pool: Pool,
        cable: Cable,
        *,
        notifies: bool,
        grow: Callable[[Pool], None],
        on_broken: Callable[[PeerError], None],
    ) -> None:
        self._ring = ring
        self._lookout = Lookout(ring.words, RSP_PROD)
        self._channel = channel
        self._cable = cable
        self._counters = cable.counters
        self._notifies = notifies
        self._grow = grow
        self._on_broken = on_broken
        self._posted: list[Page | None] = [None] * ring.size
        self._chain: _Chain | None = None
        self._over = False
        self._held = False
        self._scheduled = False
        self.pool = pool

    def close(self) -> None:
        """Nothing more comes in. The ring is its owner's to release."""
        self._over = True
        self._chain = None

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self.kick()

    # -- requests

    def fill(self) -> None:
        """Every page that is free onto the ring."""
        if not self._over:
            free = self.pool.free
            while free and self._ring.free():
                self._post(free.pop())
            self._push()

    def _post(self, page: Page) -> None:
        ring = self._ring
        slot = ring.req_prod_pvt & ring.slot_mask
        self._posted[slot] = page
        RX_REQUEST.pack_into(ring.slots, ring.claim_request(), slot, page.ref)

    def _push(self) -> None:
        if self._ring.push_requests() and self._notifies:
            self._channel.notify()

    # -- responses

    def kick(self) -> None:
        """The event channel's handler, and whatever else may have made it possible to go on."""
        if self._over or self._held or self._scheduled or self._cable.blocked:
            return
        try:
            self._work(WORK_PER_WAKEUP)
        except PeerError as error:
            self._over = True
            self._on_broken(error)

    def _work(self, budget: int) -> None:
        ring = self._ring
        while True:
            slots = ring.take_response_slots(BATCH)
            count = len(slots) // RX_SLOT_SIZE
            if count:
                packets = self._take(slots, ring.rsp_cons - count)
                self._push()
                if packets:
                    self._cable.deliver(packets)
                if count * 2 > len(self.pool.pages) and self.pool.can_grow:
                    self._grow(self.pool)
                if self._over or self._cable.blocked:
                    return
            more = slots and self._lookout.moved(ring.rsp_cons)
            if not more and not ring.final_check_for_responses():
                return
            budget -= max(1, count)
            if budget <= 0:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._again)
                return

    def _again(self) -> None:
        self._scheduled = False
        self.kick()

    def _take(self, slots: bytes, at: int) -> list[Packet]:
        """The packets in these slots, the first of which has the index `at`; their pages are posted again."""
        mask, posted, limit = self._ring.slot_mask, self._posted, min(PAGE_SIZE, self._cable.limit)
        packets: list[Packet] = []
        octets = 0
        for n, (ident, offset, flags, size) in enumerate(RX_RESPONSE.iter_unpack(slots)):
            slot = (at + n) & mask
            page = posted[slot]
            if page is None:
                raise PeerError(f"a response in slot {slot}, where no request was")
            if (
                self._chain is None
                and flags <= RX_DATA_VALIDATED | RX_CSUM_BLANK
                and ETH_HLEN <= size <= limit
                and offset + size <= PAGE_SIZE
                and ident == slot
            ):
                data = bytes(page.view[offset : offset + size])
                packets.append(
                    Packet(data, flags > RX_DATA_VALIDATED, flags & RX_DATA_VALIDATED != 0)
                    if flags
                    else Packet(data)
                )
                octets += size
                posted[slot] = None
                self._post(page)
                continue
            posted[slot] = None
            chain = self._take_slot(slots[n * RX_SLOT_SIZE : (n + 1) * RX_SLOT_SIZE], slot, page)
            if chain is not None:
                packet = self._whole(chain)
                for page in chain.pages:
                    self._post(page)
                if packet is not None:
                    packets.append(packet)
                    octets += chain.size
        self._counters.rx_packets += len(packets)
        self._counters.rx_bytes += octets
        return packets

    def _take_slot(self, raw: bytes, slot: int, page: Page) -> _Chain | None:
        """One slot of a packet that is not plainly good. The chain, if it ends here. PeerError if it does not
        end: so many pages are not given away."""
        chain = self._chain
        if chain is not None and chain.extra:
            self._take_extra(chain, raw)
        else:
            ident, offset, flags, size = RX_RESPONSE.unpack(raw)
            if chain is None:
                chain = self._chain = _Chain(flags)
                chain.extra = bool(flags & RX_EXTRA_INFO)
            chain.slots += 1
            chain.flags = chain.flags & ~RX_MORE_DATA | flags & RX_MORE_DATA
            if chain.wrong is None:
                self._take_data(chain, page, ident == slot, offset, flags, size)
        chain.pages.append(page)
        if not chain.extra and not chain.flags & RX_MORE_DATA:
            self._chain = None
            return chain
        if len(chain.pages) > FATAL_SLOTS:
            raise PeerError(f"a packet that does not end within {FATAL_SLOTS} slots")
        return None

    def _take_data(
        self, chain: _Chain, page: Page, matches: bool, offset: int, flags: int, size: int
    ) -> None:
        if not matches:
            chain.wrong = BadPacket("frame", "a response with the id of another slot")
        elif size < 0:
            chain.wrong = BadPacket("copy", f"the back end answered {size}")
        elif offset + size > PAGE_SIZE:
            chain.wrong = BadPacket("frame", f"{size} bytes at {offset} of a page")
        elif flags >> 4:
            chain.wrong = BadPacket("frame", f"flags {flags:#x}")
        elif chain.size + size > MAX_FRAME or chain.slots > netif.NR_SLOTS_MIN:
            chain.wrong = BadPacket(
                "length", f"a packet of more than {MAX_FRAME} bytes or {netif.NR_SLOTS_MIN} slots"
            )
        else:
            chain.pieces.append((page, offset, size))
            chain.size += size

    def _take_extra(self, chain: _Chain, raw: bytes) -> None:
        chain.extra = netif.extra_more(raw)
        chain.extras += 1
        try:
            extra = netif.parse_extra(raw)
        except BadPacket as error:
            chain.wrong = chain.wrong or error
            return
        if extra.kind != netif.EXTRA_TYPE_GSO or chain.gso:
            chain.wrong = chain.wrong or BadPacket("frame", f"extra info of type {extra.kind}")
        chain.gso, chain.gso_size = extra.gso, extra.gso_size

    def _whole(self, chain: _Chain) -> Packet | None:
        limit = MAX_FRAME if chain.gso else self._cable.limit
        if chain.wrong is None and not ETH_HLEN <= chain.size <= limit:
            chain.wrong = BadPacket("length", f"a packet of {chain.size} bytes: {ETH_HLEN} to {limit}")
        if chain.wrong is not None:
            self._counters.bad_rx(chain.wrong.kind, str(chain.wrong))
            return None
        blank, validated = bool(chain.flags & RX_CSUM_BLANK), bool(chain.flags & RX_DATA_VALIDATED)
        data = b"".join([page.view[offset : offset + size] for page, offset, size in chain.pieces])
        packet = Packet(data, blank, validated, chain.gso, chain.gso_size)
        return with_blank_checksum(packet, self._counters) if chain.gso and not blank else packet
