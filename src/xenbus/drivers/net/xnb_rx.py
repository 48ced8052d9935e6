"""The receive ring of a guest, filled: packets from the port into the pages that the guest posted.

Knows a ring, its port, the guest's pages and its filter; knows no store and no states. Responses stand in the
slots of their requests, as Linux's netfront needs it (netif.h, "rx response").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from xenbus.drivers.net import netif
from xenbus.drivers.net.cable import Cable, unfit
from xenbus.drivers.net.netif import (
    EXTRA_SIZE,
    NETIF_RSP_ERROR,
    PAGE_SIZE,
    RX_CSUM_BLANK,
    RX_DATA_VALIDATED,
    RX_EXTRA_INFO,
    RX_MORE_DATA,
    RX_REQUEST,
    RX_RESPONSE,
    RX_SLOT_SIZE,
)
from xenbus.drivers.net.packet import ETH_HLEN, MAX_FRAME, Link, Packet
from xenbus.drivers.net.xnb_multicast import MulticastFilter
from xenbus.drivers.net.xnb_pages import BUFFER, Buffer, Pages, Piece, Posted
from xenbus.drivers.net.xnb_ring import GuestRing
from xenbus.errors import PeerError
from xenbus.ring.answers import AnswerRing

# For each slot its (id, flags, size); of extra info (-1, Gso, gso_size).
_Answer = tuple[tuple[int, int, int], ...]


class RxQueue(GuestRing):
    """A Lane.

    link: what the guest takes
    """

    def __init__(
        self,
        ring: AnswerRing,
        pages: Pages,
        cable: Cable,
        link: Link,
        multicast: MulticastFilter,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_fatal: Callable[[PeerError], None],
    ) -> None:
        super().__init__(ring, pages, cable, spawn=spawn, on_fatal=on_fatal)
        self._link = link
        self._longest = min(PAGE_SIZE, link.mtu + 18)
        self._multicast = multicast
        self._posted: deque[tuple[int, int]] = deque()  # (id, gref) of requests that may be used
        self._coming: Sequence[tuple[int, int]] = ()  # of those whose pages are being mapped
        self._short = 0  # slots that there was no room for

    @property
    def _mapping(self) -> bool:
        return bool(self._coming)

    # -- requests

    def kick(self) -> None:
        """The event channel's handler: there may be pages for what waits."""
        if not self._over and self._channel is not None and self._refill():
            self._relieve()

    def _relieve(self) -> None:
        while self._short:
            if len(self._posted) >= self._short:
                self._short = 0
                self._cable.room(self)
                return
            if self._coming or not self._more() or not self._refill():
                return

    def _refill(self) -> bool:
        """Take every request there is. False: the guest broke its ring."""
        if self._coming:
            return True
        try:
            slots = self._ring.take_request_slots()
        except PeerError as error:
            self._over = True
            self._on_fatal(error)
            return False
        if slots:
            requests = list(RX_REQUEST.iter_unpack(slots))
            missing = self._pages.missing([ref for _, ref in requests])
            if missing:
                self._await(requests, missing)
            else:
                self._posted.extend(requests)
        return True

    def _await(self, requests: Sequence[tuple[int, int]], missing: Sequence[int]) -> None:
        """Those before the first page that is missing may be used meanwhile: a guest that posts more pages
        than before is not to be held up by them. What comes behind waits: the order is the ring's."""
        posted = self._posted
        if self._pages.room_for(len(missing)):
            first = [ref for _, ref in requests].index(missing[0])
            posted.extend(requests[:first])
            self._coming = requests[first:]
        else:  # the known ones are let go of and mapped again, too
            self._coming = [*posted, *requests]
            posted.clear()
        self._spawn(self._bring(missing))

    async def _bring(self, refs: Sequence[int]) -> None:
        others = [ref for _, ref in (*self._posted, *self._coming)]
        try:
            await self._pages.bring(refs, others)
        finally:
            coming, self._coming = self._coming, ()
            self._rest()
        if not self._over:
            self._posted.extend(coming)
            if self._refill():  # those that came meanwhile
                self._relieve()

    def _room_for(self, slots: int) -> bool:
        """False: not now. Then `_relieve` is called once there is."""
        posted = self._posted
        while self._refill() and len(posted) < slots:
            if self._coming or not self._more():
                self._short = slots
                break
        return len(posted) >= slots

    def _more(self) -> bool:
        """Ask for a kick; True if there is no need to."""
        try:
            return self._ring.final_check_for_requests()
        except PeerError as error:
            self._over = True
            self._on_fatal(error)
            return False

    # -- packets

    def send(self, packets: Sequence[Packet]) -> int:
        counters, posted, longest = self._counters, self._posted, self._longest
        if self._over:
            counters.tx_dropped += len(packets)
            return len(packets)
        filters = self._multicast.on
        # A run of packets of one page each, or of longer ones: what is copied at once. One of both is empty.
        plain: list[Posted] = []
        long: list[tuple[Sequence[Piece], Buffer]] = []
        answers: list[_Answer] = []
        taken = room = 0
        for packet in packets:
            data = packet.data
            size = len(data)
            if filters and size >= ETH_HLEN and not self._multicast.wants(data):
                counters.multicast_filtered += 1
            elif ETH_HLEN <= size <= longest and not packet.gso:
                if not posted and not self._room_for(1):
                    break
                if long:
                    self._finish(long, answers)
                    long, answers, room = [], [], 0
                ident, ref = posted.popleft()
                flags = 3 if packet.csum_blank else RX_DATA_VALIDATED if packet.data_validated else 0
                plain.append((ref, ident, flags, size, data))
                room += size
                if room > BUFFER - PAGE_SIZE:
                    self._finish_plain(plain)
                    plain, room = [], 0
            elif why := unfit(packet, self._link):
                counters.bad_tx("length", why)
            else:
                slots = netif.data_slots(size) + bool(packet.gso)
                if not self._room_for(slots):
                    break
                if plain or room > BUFFER - MAX_FRAME:
                    self._finish_plain(plain)
                    self._finish(long, answers)
                    plain, long, answers, room = [], [], [], 0
                pieces, answer = self._long(packet, slots)
                long.append((pieces, data))
                answers.append(answer)
                room += size
            taken += 1
        self._finish_plain(plain)
        self._finish(long, answers)
        self._push()
        if taken < len(packets) and self._over:
            counters.tx_dropped += len(packets) - taken
            self._short = 0
            return len(packets)
        return taken

    def _long(self, packet: Packet, slots: int) -> tuple[list[Piece], _Answer]:
        """A packet of several slots: its pieces, and what to answer in each."""
        size, gso = len(packet.data), packet.gso
        flags = RX_CSUM_BLANK | RX_DATA_VALIDATED if packet.csum_blank else 0
        if packet.data_validated:
            flags |= RX_DATA_VALIDATED
        if gso:
            flags |= RX_EXTRA_INFO
        pieces: list[Piece] = []
        answer: list[tuple[int, int, int]] = []
        left = size
        for slot in range(slots):
            ident, ref = self._posted.popleft()
            if gso and slot == 1:
                answer.append((-1, gso, packet.gso_size))
                continue
            length = min(left, PAGE_SIZE)
            left -= length
            pieces.append((ref, 0, length))
            answer.append((ident, flags | (RX_MORE_DATA if left else 0), length))
            flags = 0
        return pieces, tuple(answer)

    def _finish(self, out: Sequence[tuple[Sequence[Piece], Buffer]], answers: Sequence[_Answer]) -> None:
        """Copy, answer."""
        if not out:
            return
        ring, counters, pack = self._ring, self._counters, RX_RESPONSE.pack_into
        slots, sent, octets = ring.answers, 0, 0
        for (_, data), done, answer in zip(out, self._pages.store(out), answers, strict=True):
            if done:
                sent += 1
                octets += len(data)
            else:
                counters.bad_tx("copy", "a page that the guest posted may not be written")
            at = ring.claim_answers(len(answer))
            for ident, flags, size in answer:
                if ident < 0:
                    slots[at : at + EXTRA_SIZE] = netif.gso_extra(flags, size)
                else:
                    pack(slots, at, ident, 0, flags, size if done else NETIF_RSP_ERROR)
                at += RX_SLOT_SIZE
        counters.tx_packets += sent
        counters.tx_bytes += octets

    def _finish_plain(self, packets: Sequence[Posted]) -> None:
        """The same for packets of one page each."""
        if not packets:
            return
        if not self._pages.store_plain(packets):
            self._finish(
                [(((ref, 0, size),), data) for ref, _, _, size, data in packets],
                [((ident, flags, size),) for _, ident, flags, size, _ in packets],
            )
            return
        ring, pack, octets = self._ring, RX_RESPONSE.pack_into, 0
        answers, at = ring.answers, ring.claim_answers(len(packets))
        for _, ident, flags, size, _ in packets:
            pack(answers, at, ident, 0, flags, size)
            at += RX_SLOT_SIZE
            octets += size
        self._counters.tx_packets += len(packets)
        self._counters.tx_bytes += octets

    def _push(self) -> None:
        if self._ring.push_responses() and self._channel is not None:
            self._channel.notify()
