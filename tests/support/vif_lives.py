"""A front that checks everything, and queues of xnb that are killed under it and followed by others.

Real rings, real queues, a real journal, in memory that is copied whenever something was stored to it: what a
kill at that moment leaves. Grant references are never used twice; ids are, out of order. No test here.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xenbus.drivers.net import netif, xnb_multicast, xnb_ring, xnb_rx, xnb_tx
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    PAGE_SIZE,
    RX_EXTRA_INFO,
    RX_MORE_DATA,
    RX_REQUEST,
    RX_RESPONSE,
    RX_SLOT_SIZE,
    TX_CSUM_BLANK,
    TX_DATA_VALIDATED,
    TX_EXTRA_INFO,
    TX_MORE_DATA,
    TX_REQUEST,
    TX_RESPONSE,
    TX_SLOT_SIZE,
)
from xenbus.drivers.net.packet import ALL, Gso, Link, Packet
from xenbus.drivers.net.xnb_journal import NetJournal
from xenbus.drivers.net.xnb_multicast import MulticastFilter
from xenbus.drivers.net.xnb_rx import RxQueue
from xenbus.drivers.net.xnb_tx import TxQueue
from xenbus.ring import answers, shared
from xenbus.ring.answers import AnswerRing
from xenbus.ring.shared import HEADER_SIZE, MASK, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, FrontRing

WHOSE = b"w" * 32
LINK = Link(ALL, 65521, None)
# Where anything of the answering path is stored.
_WATCHED = {module.__file__ for module in (xnb_tx, xnb_rx, xnb_ring, xnb_multicast, answers, shared)}


def frame(number: int, size: int) -> bytes:
    """Of that number; which of several queues it goes to depends on it."""
    head = bytes.fromhex("ffffffffffff00163e") + (number % 251).to_bytes(3) + b"\x88\xb5"
    return (head + random.Random(number).randbytes(64) * (size // 64 + 1))[:size]


@dataclass
class Asked:
    """A slot of the transmit ring. ident: None for extra info; data: of its page"""

    ident: int | None
    status: int
    gref: int = 0
    data: bytes = field(default=b"", repr=False)


@dataclass
class Lane:
    """What a front knows of one queue: what is on its rings, oldest first, and ids that are free."""

    asked: deque[Asked] = field(default_factory=deque)
    posted: deque[tuple[int, int]] = field(default_factory=deque)
    free: deque[int] = field(default_factory=deque)
    indices: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


@dataclass
class Told:
    """All that outlives a back end, but for the shared memory.

    sent, given: frames that a side gave away; heard, got: those that came out at the other, all by number
    pages: what posted pages hold, by grant reference
    """

    lanes: list[Lane]
    number: int = 0
    gref: int = 100
    sent: dict[bytes, int] = field(default_factory=dict)
    heard: list[int] = field(default_factory=list)
    given: dict[bytes, int] = field(default_factory=dict)
    got: list[int] = field(default_factory=list)
    pages: dict[int, bytearray] = field(default_factory=dict)
    groups: set[bytes] = field(default_factory=set)
    joins: dict[tuple[int, int], bytes] = field(default_factory=dict)
    writes: int = 0


class World:
    """Shared memory and the front. `fork` makes another one of what `look` saw."""

    def __init__(self, queues: int = 1, slots: int = 16, start: int = 0) -> None:
        sizes = (TX_SLOT_SIZE, RX_SLOT_SIZE)
        self.queues, self.slots = queues, slots
        self.memory = [[bytearray(HEADER_SIZE + slots * size) for size in sizes] for _ in range(queues)]
        self.journal = bytearray(NetJournal.layout(queues).size)
        self.told = Told([Lane(free=deque(range(slots))) for _ in range(queues)])
        self.seen: list[tuple[Any, ...]] | None = None
        self._front()
        for lane, rings in zip(self.told.lanes, self.rings, strict=True):
            lane.free.rotate(5)
            for ring in rings:
                ring.init()
                ring.words[REQ_PROD] = ring.words[RSP_PROD] = start
                ring.words[REQ_EVENT] = ring.words[RSP_EVENT] = start + 1 & MASK
                ring.req_prod_pvt = ring.rsp_cons = ring._published = start
        journal = NetJournal(memoryview(self.journal), queues)
        journal.begin(WHOSE)
        journal.release()

    def _front(self) -> None:
        self.rings = [
            (FrontRing(memoryview(tx), TX_SLOT_SIZE), FrontRing(memoryview(rx), RX_SLOT_SIZE))
            for tx, rx in self.memory
        ]

    # -- copies of it

    def _state(self) -> tuple[Any, ...]:
        told = self.told
        return ([bytes(m) for both in self.memory for m in both], bytes(self.journal), told.writes)

    def look(self) -> None:
        """Keep a copy, if anything is other than in the last one."""
        if self.seen is not None and (not self.seen or self._state() != self.seen[-1][:3]):
            for lane, rings in zip(self.told.lanes, self.rings, strict=True):
                lane.indices = tuple((r.req_prod_pvt, r.rsp_cons) for r in rings)  # type: ignore[assignment]
            self.seen.append((*self._state(), copy.deepcopy(self.told)))

    def act(self, doing: Callable[[], None]) -> None:
        """The back end does something. Looked at before any of its instructions, if somebody watches."""
        if self.seen is None:
            doing()
            return

        def local(frame: Any, event: str, _: Any) -> Any:
            if event == "opcode":
                self.look()
            return local

        def begin(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code.co_filename not in _WATCHED:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return local

        before = sys.gettrace()
        self.look()
        sys.settrace(begin)
        try:
            doing()
        finally:
            sys.settrace(before)
        self.look()

    def watch(self, doing: Callable[[], object]) -> list[tuple[Any, ...]]:
        """All that was there between any two stores of the back end, before the first and after the last."""
        self.seen = []
        doing()
        found, self.seen = self.seen, None
        return found

    def fork(self, seen: tuple[Any, ...], noise: random.Random | None = None) -> World:
        """noise: for what a store of many bytes may have left half done"""
        made = World.__new__(World)
        memory, journal, _, told = seen
        made.queues, made.slots = self.queues, self.slots
        made.memory = [[bytearray(m) for m in memory[2 * n : 2 * n + 2]] for n in range(self.queues)]
        made.journal = bytearray(journal)
        made.told = copy.deepcopy(told)
        made.seen = None
        made._front()
        for lane, rings in zip(made.told.lanes, made.rings, strict=True):
            for ring, (prod, cons) in zip(rings, lane.indices, strict=True):
                ring.req_prod_pvt = ring._published = prod
                ring.rsp_cons = cons
        if noise is not None:
            made._tear(noise)
        return made

    def _tear(self, noise: random.Random) -> None:
        journal = NetJournal(memoryview(self.journal), self.queues)
        for logs, rings in zip(journal.logs, self.rings, strict=True):
            for log, ring in zip(logs, rings, strict=True):
                start, end = log.span[0] >> 32, log.span[0] & MASK
                if ring.words[RSP_PROD] == end:  # answers were being made
                    log.answers[:] = noise.randbytes(len(log.answers))
                for index in range(start, start + (end - ring.words[RSP_PROD] & MASK)):  # or copied
                    at = (index & ring.slot_mask) * ring.slot_size
                    ring.slots[at : at + ring.slot_size] = noise.randbytes(ring.slot_size)
        journal.release()

    # -- the front: what it sends

    def _ask(self, queue: int, gref: int, flags: int, size: int, data: bytes, status: int) -> None:
        lane, ring = self.told.lanes[queue], self.rings[queue][0]
        ident = lane.free.popleft()
        ring.put_request(TX_REQUEST.pack(gref, 0, flags, ident, size))
        lane.asked.append(Asked(ident, status, gref, data))

    def _extra(self, queue: int, raw: bytes) -> None:
        self.rings[queue][0].put_request(raw)
        self.told.lanes[queue].asked.append(Asked(None, NETIF_RSP_NULL))

    def _gref(self) -> int:
        self.told.gref += 1
        return self.told.gref

    def send(self, queue: int, size: int, gso: bool = False) -> bool:
        """A packet; one of less than 14 bytes is none. False: no room."""
        pieces = [(at, min(PAGE_SIZE, size - at)) for at in range(0, size, PAGE_SIZE)]
        if self.rings[queue][0].free() < len(pieces) + gso:
            return False
        told = self.told
        told.number += 1
        data = frame(told.number, size)
        good = size >= 14
        if good:
            told.sent[data] = told.number
        said, flags = size, (TX_EXTRA_INFO | TX_CSUM_BLANK | TX_DATA_VALIDATED) if gso else 0
        for at, length in pieces:
            more = TX_MORE_DATA if at + length < size else 0
            status = NETIF_RSP_OKAY if good else NETIF_RSP_ERROR
            self._ask(
                queue,
                self._gref(),
                flags | more,
                said or length,
                data[at : at + length] if good else b"",
                status,
            )
            if not at and gso:
                self._extra(queue, netif.gso_extra(Gso.TCPV4, 1448))
            said = flags = 0
        self.rings[queue][0].push_requests()
        return True

    def join(self, queue: int, address: bytes, add: bool = True) -> bool:
        if self.rings[queue][0].free() < 2:
            return False
        told = self.told
        self._ask(queue, self._gref(), TX_EXTRA_INFO, 0, b"", NETIF_RSP_OKAY)
        self._extra(queue, netif.multicast_extra(address, add=add))
        self.rings[queue][0].push_requests()
        (told.groups.add if add else told.groups.discard)(address)
        return True

    def post(self, queue: int, count: int) -> None:
        lane, ring = self.told.lanes[queue], self.rings[queue][1]
        for _ in range(min(count, ring.free())):
            ident, gref = ring.req_prod_pvt & ring.slot_mask, self._gref()
            ring.put_request(RX_REQUEST.pack(ident, gref))
            lane.posted.append((ident, gref))
            self.told.pages[gref] = bytearray(PAGE_SIZE)
        ring.push_requests()

    # -- what it gets

    def collect(self) -> None:
        """Each answer is to the request that stood there, each packet one that was given, and whole."""
        for lane, (tx, rx) in zip(self.told.lanes, self.rings, strict=True):
            for raw in tx.take_responses():
                ident, status = TX_RESPONSE.unpack(raw)
                asked = lane.asked.popleft()
                assert status == asked.status, f"{asked} was answered {ident}, {status}"
                if asked.ident is not None:
                    assert ident == asked.ident, f"{asked} was answered {ident}"
                    lane.free.append(ident)
            self._receive(lane, rx.take_responses())

    def _receive(self, lane: Lane, responses: Sequence[bytes]) -> None:
        told, data, extra, more = self.told, b"", False, False
        for raw in responses:
            ident, gref = lane.posted.popleft()
            page = told.pages.pop(gref)
            if extra:
                assert netif.parse_extra(raw).gso is Gso.TCPV4
                extra = False
                continue
            answered, offset, flags, size = RX_RESPONSE.unpack(raw)
            assert answered == ident and size > 0 and not offset, f"{ident} was answered {raw.hex()}"
            data += page[:size]
            extra, more = bool(flags & RX_EXTRA_INFO), bool(flags & RX_MORE_DATA)
            if not more:
                # With one more slot to come for extra info: of a packet of one page.
                told.got.append(told.given[data])
                data = b""
        assert not data and not more, "a packet was published in parts"

    def may(self, queue: int, which: int) -> dict[int, bytes]:
        """Pages that the back end may use, with their bytes: what was answered is the front's again."""
        lane, ring = self.told.lanes[queue], self.rings[queue][which]
        answered = ring.words[RSP_PROD] - ring.rsp_cons & MASK
        if which:
            return {gref: b"" for _, gref in list(lane.posted)[answered:]}
        return {asked.gref: asked.data for asked in list(lane.asked)[answered:]}

    def check(self, lossless: bool = False) -> None:
        """At the end of a story: nothing came twice; if lossless, everything came."""
        told = self.told
        for came, gone in ((told.heard, told.sent), (told.got, told.given)):
            assert len(set(came)) == len(came), "a packet came twice"
            assert not lossless or sorted(came) == sorted(gone.values()), "a packet was lost"
        if self.queues == 1:
            assert told.heard == sorted(told.heard) and told.got == sorted(told.got), "out of order"


class GuestPages:
    """As xnb's queues have them, and strict: a page that is not theirs is a failure, not an error to count.

    mapped: each is to be brought first
    """

    def __init__(self, world: World, queue: int, which: int, mapped: bool) -> None:
        self._world, self._queue, self._which = world, queue, which
        self._mapped = mapped
        self._known: set[int] = set()

    def missing(self, refs: Any) -> list[int]:
        return [ref for ref in dict.fromkeys(refs) if self._mapped and ref not in self._known]

    def room_for(self, count: int) -> bool:
        return True

    async def bring(self, refs: Any, others: Any = ()) -> None:
        assert set(refs) <= set(self._may()), "it maps what it may not"
        self._known.update(refs)

    def _may(self) -> dict[int, bytes]:
        return self._world.may(self._queue, self._which)

    def fetch(self, packets: Any) -> list[Any]:
        may = self._may()
        found = []
        for pieces in packets:
            assert all(ref in may and not offset and size == len(may[ref]) for ref, offset, size in pieces), (
                pieces
            )
            found.append(b"".join([may[ref] for ref, _, _ in pieces]))
        return found

    def fetch_plain(self, requests: Any) -> list[Any] | None:
        if self.missing([request[0] for request in requests]):
            return None
        return self.fetch([[(ref, offset, size)] for ref, offset, _, _, size in requests])

    def store(self, packets: Any) -> list[bool]:
        may, world = self._may(), self._world
        for pieces, data in packets:
            at = 0
            for ref, offset, size in pieces:
                assert ref in may and ref in world.told.pages, f"it writes to page {ref}"
                world.told.pages[ref][offset : offset + size] = data[at : at + size]
                world.told.writes += 1
                world.look()
                at += size
        return [True] * len(packets)

    def store_plain(self, packets: Any) -> bool:
        if self.missing([packet[0] for packet in packets]):
            return False
        return all(self.store([([(ref, 0, size)], data) for ref, _, _, size, data in packets]))

    async def close(self) -> None:
        pass


class Life:
    """A process of xnb: its queues. It may stop anywhere: nothing of it is asked to end."""

    name = "lives"
    peer = LINK

    def __init__(self, world: World, *, resumes: bool, mapped: bool = False) -> None:
        self.world, self._mapped = world, mapped
        self._tasks: list[Any] = []
        self.broken: list[Exception] = []
        world.act(lambda: self._begin(resumes))

    def _begin(self, resumes: bool) -> None:
        world = self.world
        self.multicast = MulticastFilter()
        self.cable = Cable(Counters(), self._resume, lambda up: None, lambda text: None)
        self.cable.plug(self)  # type: ignore[arg-type]
        self.cable.link(LINK)
        self.journal = NetJournal(memoryview(world.journal), world.queues)
        if resumes:
            self.journal.check(WHOSE)
        self.multicast.keep(self.journal.groups)
        self.queues = [self._queue(n, resumes) for n in range(world.queues)]
        for tx, rx in self.queues:
            rx.start(self)  # type: ignore[arg-type]
            tx.start(self)  # type: ignore[arg-type]
        self.cable.up([rx for _, rx in self.queues], LINK)
        self._run()

    def _queue(self, n: int, resumes: bool) -> tuple[TxQueue, RxQueue]:
        rings = [
            AnswerRing(memoryview(memory), size, log, resumes=resumes)
            for memory, size, log in zip(
                self.world.memory[n], (TX_SLOT_SIZE, RX_SLOT_SIZE), self.journal.logs[n], strict=True
            )
        ]
        pages: list[Any] = [GuestPages(self.world, n, which, self._mapped) for which in (0, 1)]
        common: dict[str, Any] = {"spawn": self._tasks.append, "on_fatal": self.broken.append}
        return (
            TxQueue(
                rings[0], pages[0], self.cable, on_groups=self._groups, on_error=lambda what: None, **common
            ),
            RxQueue(rings[1], pages[1], self.cable, LINK, self.multicast, **common),
        )

    def _run(self) -> None:
        """Tasks of the device, to their end: none of them waits for anybody."""
        while self._tasks:
            try:
                self._tasks.pop(0).send(None)
            except StopIteration:
                continue
        assert not self.broken, self.broken

    def kick(self) -> None:
        self.world.act(self._kick)

    def _kick(self) -> None:
        for tx, rx in self.queues:
            tx.kick()
            rx.kick()
        self._run()

    def give(self, sizes: Sequence[tuple[int, bool]]) -> None:
        """Packets for the guest: (size, to be segmented). Those there is no room for were never given."""
        told, packets = self.world.told, []
        for size, gso in sizes:
            told.number += 1
            data = frame(told.number, size)
            told.given[data] = told.number
            packets.append(Packet(data, gso, gso, Gso.TCPV4 if gso else Gso.NONE, 1448 if gso else 0))
        self.world.act(lambda: self._send(packets))

    def _send(self, packets: Sequence[Packet]) -> None:
        taken = self.cable.send(packets)
        for packet in packets[taken:]:
            del self.world.told.given[bytes(packet.data)]
        self._run()

    def _groups(self, changes: Sequence[tuple[bool, bytes]]) -> bool:
        return all(self.multicast.change(add, address) for add, address in changes)

    def _resume(self) -> None:
        for tx, _ in self.queues:
            tx.kick()

    # -- its channel, and its port

    def notify(self) -> None:
        pass

    def start(self, driver: Any) -> None:
        pass

    def link(self, link: Link | None) -> None:
        pass

    def ready(self) -> None:
        pass

    def send(self, packets: Sequence[Packet]) -> int:
        """The port: these are out in the world."""
        told = self.world.told
        for packet in packets:
            told.heard.append(told.sent[bytes(packet.data)])
            told.writes += 1
            self.world.look()
        return len(packets)


def finish(world: World, life: Life | None = None, *, mapped: bool = False) -> None:
    """Another process (or `life`), to the end: all that was asked is answered, and all works as ever."""
    life = life or Life(world, resumes=True, mapped=mapped)
    for _ in range(2):
        world.collect()
        for queue in range(world.queues):
            world.send(queue, 60)
            world.post(queue, world.slots)
        life.kick()
        life.give([(60, False)])
    world.collect()
    assert not any(lane.asked for lane in world.told.lanes), "requests were not answered"
    assert life.multicast.groups == world.told.groups
    world.check()
