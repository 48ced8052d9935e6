"""The transmit ring of a guest, served: its packets off the ring, copied, answered, handed to the port.

Knows a ring, its port, the guest's pages and the cable; knows no store and no states. A guest is answered
once its packet was copied; while the port has no room nothing more is taken: the guest's ring is the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.checksum_fix import with_blank_checksum
from xenbus.drivers.net.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    PAGE_SIZE,
    TX_CSUM_BLANK,
    TX_DATA_VALIDATED,
    TX_REQUEST,
    TX_RESPONSE,
    TX_SLOT_SIZE,
    BadPacket,
)
from xenbus.drivers.net.packet import ETH_HLEN, Packet
from xenbus.drivers.net.xnb_chain import EXTRA, Chain, split
from xenbus.drivers.net.xnb_pages import Buffer, Pages
from xenbus.drivers.net.xnb_ring import GuestRing
from xenbus.errors import PeerError
from xenbus.ring.answers import AnswerRing
from xenbus.ring.lookout import Lookout
from xenbus.ring.shared import REQ_PROD

# Slots taken at a time, and served in one wake-up before the loop gets its turn: a flood starves nobody.
BATCH: Final = 64
WORK_PER_WAKEUP: Final = 256
# Of a transmit request, in 16 bits each: gref (2), offset, flags, id, size. Of a response: id, status.
_ID_COLUMN: Final = 4
_OKAY: Final = memoryview(bytes(2 * BATCH)).cast("H")


class TxQueue(GuestRing):
    """on_groups: a guest changes its multicast filter: (add, address) each; False if that cannot be
    on_error:  what was wrong with a packet
    """

    def __init__(
        self,
        ring: AnswerRing,
        pages: Pages,
        cable: Cable,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_groups: Callable[[Sequence[tuple[bool, bytes]]], bool],
        on_error: Callable[[str], None],
        on_fatal: Callable[[PeerError], None],
    ) -> None:
        super().__init__(ring, pages, cable, spawn=spawn, on_fatal=on_fatal)
        self._lookout = Lookout(ring.words, REQ_PROD)
        self._on_groups = on_groups
        self._on_error = on_error
        self._begun = b""  # of a chain whose end has not come
        self._bringing = False
        self._scheduled = False

    # -- its life

    @property
    def _mapping(self) -> bool:
        return self._bringing

    def hold(self) -> None:
        self._over = True

    def release(self) -> None:
        self._over = False
        self.kick()

    # -- taking requests

    def kick(self) -> None:
        """The event channel's handler, and whatever else may have made it possible to go on."""
        if self._over or self._scheduled or self._bringing or self._channel is None or self._cable.blocked:
            return
        try:
            self._work(WORK_PER_WAKEUP)
        except PeerError as error:
            self._over = True
            self._on_fatal(error)

    def _work(self, budget: int) -> None:
        ring = self._ring
        while True:
            slots = ring.take_request_slots(BATCH)
            if slots:
                if (self._begun or not self._plain(slots)) and not self._chains(self._begun + slots):
                    return
                if self._over or self._cable.blocked:
                    return
            # As the front: while we look we are not notified.
            more = slots and self._lookout.moved(ring.req_cons)
            if not more and not ring.final_check_for_requests():
                return
            budget -= max(1, len(slots) // ring.slot_size)
            if budget <= 0:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._again)
                return

    def _again(self) -> None:
        self._scheduled = False
        self.kick()

    def _plain(self, slots: bytes) -> bool:
        """Packets of one slot each, as most are, with pages that are known. False: nothing was done."""
        requests = list(TX_REQUEST.iter_unpack(slots))
        limit = min(PAGE_SIZE, self._cable.limit)
        for _, offset, flags, _, size in requests:
            if flags > 3 or not ETH_HLEN <= size <= limit or offset + size > PAGE_SIZE:
                return False
        fetched = self._pages.fetch_plain(requests)
        if fetched is None:
            return False
        packets: list[Packet] = []
        octets = 0
        for data, (_, _, flags, _, size) in zip(fetched, requests, strict=True):
            packets.append(
                Packet(data, flags & TX_CSUM_BLANK != 0, flags & TX_DATA_VALIDATED != 0)
                if flags
                else Packet(data)
            )
            octets += size
        self._counters.rx_packets += len(packets)
        self._counters.rx_bytes += octets
        self._answer_plain(slots)
        self._cable.deliver(packets)
        return True

    def _chains(self, slots: bytes) -> bool:
        """Packets of any kind. False: their pages are to be mapped first, and a task goes on from there."""
        chains, end = split(slots)
        self._begun = slots[end:]
        limit = self._cable.limit
        for chain in chains:
            if chain.size > limit and not chain.gso and chain.wrong is None:
                chain.wrong = BadPacket("length", f"a packet of {chain.size} bytes: {limit} it may have")
        good = [chain for chain in chains if chain.wrong is None and chain.pieces]
        missing = self._pages.missing([ref for chain in good for ref, _, _ in chain.pieces])
        if missing:
            self._bringing = True
            self._spawn(self._bring(missing, chains, good))
            return False
        self._finish(chains, good)
        return True

    async def _bring(self, refs: Sequence[int], chains: Sequence[Chain], good: Sequence[Chain]) -> None:
        others = [ref for chain in good for ref, _, _ in chain.pieces]
        try:
            await self._pages.bring(refs, others)
        finally:
            self._bringing = False
            self._rest()
        if not self._over:
            self._finish(chains, good)
            self.kick()

    def _finish(self, chains: Sequence[Chain], good: Sequence[Chain]) -> None:
        """Copy, answer, deliver."""
        packets: list[Packet] = []
        octets = 0
        fetched = self._pages.fetch([chain.pieces for chain in good]) if good else []
        for chain, data in zip(good, fetched, strict=True):
            if data is None:
                chain.wrong = BadPacket("copy", f"a page of a packet may not be read: {chain.pieces}")
                continue
            octets += chain.size
            packet = self._packet(chain, data)
            if packet is not None:
                packets.append(packet)
        self._counters.rx_packets += len(packets)
        self._counters.rx_bytes += octets
        self._answer(chains)
        if packets:
            self._cable.deliver(packets)

    def _packet(self, chain: Chain, data: Buffer) -> Packet | None:
        flags = chain.flags
        blank, validated = flags & TX_CSUM_BLANK != 0, flags & TX_DATA_VALIDATED != 0
        packet = Packet(data, blank, validated, chain.gso, chain.gso_size)
        return with_blank_checksum(packet, self._counters) if chain.gso and not blank else packet

    # -- answers

    def _answer_plain(self, slots: bytes) -> None:
        """All of them NETIF_RSP_OKAY: ids and zeros, a column each."""
        ring, columns = self._ring, TX_SLOT_SIZE >> 1
        count = len(slots) // TX_SLOT_SIZE
        begin = ring.claim_answers(count) >> 1
        end = begin + count * columns
        halves = ring.halves
        halves[begin:end:columns] = memoryview(slots).cast("H")[_ID_COLUMN::columns]
        halves[begin + 1 : end : columns] = _OKAY[:count]
        self._push()

    def _answer(self, chains: Sequence[Chain]) -> None:
        ring, pack = self._ring, TX_RESPONSE.pack_into
        for chain in chains:
            status = NETIF_RSP_OKAY
            if chain.wrong is not None:
                status = NETIF_RSP_ERROR
                self._counters.bad_rx(chain.wrong.kind, str(chain.wrong))
                self._on_error(str(chain.wrong))
            elif chain.groups and not self._on_groups(chain.groups):
                status = NETIF_RSP_ERROR  # as netback
            at = ring.claim_answers(len(chain.idents))
            for ident in chain.idents:
                if ident == EXTRA:
                    pack(ring.answers, at, 0, NETIF_RSP_NULL)
                else:
                    pack(ring.answers, at, ident, status)
                at += TX_SLOT_SIZE
        self._push()

    def _push(self) -> None:
        if self._ring.push_responses() and self._channel is not None:
            self._channel.notify()
