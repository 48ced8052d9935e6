"""A front end and a back end of a `vif` that put on their rings what a test wants. No test here."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

from tests.support.until import until
from tests.support.vif import frame, rig
from xenbus.bus import XenbusDriver, XenbusState
from xenbus.drivers.net import Xn, netif
from xenbus.drivers.net.netif import RX_REQUEST, RX_RESPONSE, TX_REQUEST, TX_RESPONSE
from xenbus.ring.shared import BackRing, FrontRing, RingError

DATA_PAGES = 32


class RawFront(XenbusDriver):
    """lies: what it writes instead of its true parameters (None: the key is left out)

    answers: (id, status) of the transmit ring, in order of arrival; received: (id, offset, flags, status)
    """

    name = "raw"
    description = "Raw front end"
    lies: ClassVar[dict[str, object]] = {}
    closes = True

    def __init__(self, dev: Any) -> None:
        super().__init__(dev)
        self.answers: list[tuple[int, int]] = []
        self.received: list[tuple[int, int, int, int]] = []
        self.tx: Any = None

    async def otherend_changed(self, state: XenbusState) -> None:
        if state is XenbusState.INIT_WAIT and self.dev.state is XenbusState.INITIALISING:
            await self.initialise()
        elif state in (XenbusState.CLOSING, XenbusState.CLOSED) and self.closes:
            await self.dev.set_state(XenbusState.CLOSED)

    async def initialise(self) -> None:
        dev = self.dev
        self.pages = await dev.grant_ring(2)
        self.data = await dev.grant_ring(DATA_PAGES)
        self.tx = FrontRing(self.pages.view[:4096], netif.TX_SLOT_SIZE)
        self.rx = FrontRing(self.pages.view[4096:], netif.RX_SLOT_SIZE)
        for ring in (self.tx, self.rx):
            ring.init()
        self.channel = await dev.alloc_evtchn(self.kicked)
        values: dict[str, object] = {
            "tx-ring-ref": self.pages.refs[0],
            "rx-ring-ref": self.pages.refs[1],
            "event-channel": self.channel.port,
            "request-rx-copy": 1,
            "feature-rx-notify": 1,
            "feature-sg": 1,
            "feature-gso-tcpv4": 1,
            "feature-gso-tcpv6": 1,
            "feature-ipv6-csum-offload": 1,
        }
        # A lie that is one of ours is said by its name: "the other ring's ref".
        values |= {key: values.get(str(value), value) for key, value in self.lies.items()}
        await dev.set_state(
            XenbusState.CONNECTED, {key: value for key, value in values.items() if value is not None}
        )

    async def detach(self) -> None:
        if self.tx is not None:
            self.tx.release()
            self.rx.release()

    def kicked(self) -> None:
        with contextlib.suppress(RingError):  # after what it had written there itself
            self.answers += [TX_RESPONSE.unpack(raw) for raw in self.tx.take_responses()]
            self.tx.final_check_for_responses()
            self.received += [RX_RESPONSE.unpack(raw) for raw in self.rx.take_responses()]
            self.rx.final_check_for_responses()

    def put(
        self,
        size: int = 60,
        *,
        page: int = 0,
        ref: int | None = None,
        offset: int = 0,
        flags: int = 0,
        ident: int = 0,
    ) -> None:
        """A transmit request; ref: instead of that of the data page"""
        gref = self.data.refs[page] if ref is None else ref
        self.tx.put_request(TX_REQUEST.pack(gref, offset, flags, ident, size))

    def put_extra(self, raw: bytes) -> None:
        self.tx.put_request(raw)

    def post(self, page: int, *, ref: int | None = None, ident: int | None = None) -> None:
        """A receive request. `ident` as netfronts have it: the slot's number."""
        slot = self.rx.req_prod_pvt & self.rx.slot_mask
        gref = self.data.refs[page] if ref is None else ref
        self.rx.put_request(RX_REQUEST.pack(slot if ident is None else ident, gref))

    def push(self) -> None:
        self.tx.push_requests()
        self.rx.push_requests()
        self.channel.notify()

    async def answered(self, count: int) -> list[tuple[int, int]]:
        """Until there are so many answers in all."""
        await until(lambda: len(self.answers) >= count)
        return self.answers


async def still_serves(r: Any, front: RawFront) -> None:
    """A good packet each way."""
    before = len(front.answers)
    front.data.view[:60] = frame(60, 9)
    front.put(60, ident=9)
    front.push()
    assert (await r.far.get(5)).data == frame(60, 9)
    assert (await front.answered(before + 1))[-1] == (9, netif.NETIF_RSP_OKAY)
    front.post(31)
    front.push()
    got = len(front.received)
    await until(lambda: r.back._links[0].rx._posted)
    await r.far.put(frame(70, 8))
    await until(lambda: len(front.received) > got)
    assert front.received[-1][1:] == (0, 0, 70)
    assert bytes(front.data.view[31 * 4096 : 31 * 4096 + 70]) == frame(70, 8)


class RawBack(XenbusDriver):
    """A back end that answers whatever a test wants. offers: what it writes with InitWait"""

    name = "rawb"
    description = "Raw back end"
    offers: ClassVar[dict[str, object]] = {"feature-rx-copy": 1, "feature-sg": 1, "feature-gso-tcpv4": 1}

    def __init__(self, dev: Any) -> None:
        super().__init__(dev)
        self.tx: Any = None
        self.requests: list[tuple[int, int, int, int, int]] = []
        self.posted: list[tuple[int, int]] = []

    async def attach(self) -> None:
        await self.dev.set_state(XenbusState.INIT_WAIT, self.offers)

    async def otherend_changed(self, state: XenbusState) -> None:
        dev = self.dev
        if state is XenbusState.CONNECTED and self.tx is None:
            wanted = ("tx-ring-ref", "rx-ring-ref", "event-channel")
            said = await dev.otherend_gather(dict.fromkeys(wanted, int))
            self.mappings = [await dev.map_ring([said[key]]) for key in wanted[:2]]
            self.tx = BackRing(self.mappings[0].view, netif.TX_SLOT_SIZE)
            self.rx = BackRing(self.mappings[1].view, netif.RX_SLOT_SIZE)
            self.channel = await dev.bind_evtchn(said["event-channel"], self.kicked)
            await dev.set_state(XenbusState.CONNECTED)
        elif state is XenbusState.CLOSING:
            await dev.set_state(XenbusState.CLOSING)
        elif state is XenbusState.CLOSED and dev.state is not XenbusState.CLOSED:
            await self.detach()
            await dev.set_state(XenbusState.CLOSED)

    async def detach(self) -> None:
        if self.tx is not None:
            for ring in (self.tx, self.rx):
                ring.release()
            self.tx = None
            await self.dev.close_evtchn(self.channel)
            for mapping in self.mappings:
                await self.dev.unmap(mapping)

    def kicked(self) -> None:
        if self.tx is not None:
            self.requests += [TX_REQUEST.unpack(raw) for raw in self.tx.take_requests()]
            self.tx.final_check_for_requests()
            self.posted += [RX_REQUEST.unpack(raw) for raw in self.rx.take_requests()]
            self.rx.final_check_for_requests()

    def answer(self, ident: int, status: int) -> None:
        self.tx.put_response(TX_RESPONSE.pack(ident, status))

    async def give(self, *responses: tuple[int, int, int, int] | bytes) -> None:
        """Receive responses (id, offset, flags, status), or raw extra info, in the next slots."""
        await until(lambda: len(self.posted) >= len(responses))
        for response in responses:
            self.rx.put_response(response if isinstance(response, bytes) else RX_RESPONSE.pack(*response))
        self.push()

    async def fill(self, slot: int, data: bytes) -> None:
        """Write into the page that was posted in this slot."""
        await until(lambda: len(self.posted) > slot)
        mapping = await self.dev.map_ring([self.posted[slot][1]])
        mapping.view[: len(data)] = data
        await self.dev.unmap(mapping)

    def push(self) -> None:
        self.tx.push_responses()
        self.rx.push_responses()
        self.channel.notify()


def lying(**attributes: Any) -> Any:
    return type("RawFront", (RawFront,), attributes)


def with_raw_front(check: Any, *, front: Any = RawFront, **keys: str) -> None:
    """Runs `check(rig, front)` with both Connected; afterwards nothing may be held."""

    async def run() -> None:
        async with rig(front=front) as r:
            await r.plug(**keys)
            await r.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
            await r.far.linked(5)
            await check(r, r.front)
            await r.gone()

    asyncio.run(run())


def with_raw_back(check: Any, *, front: Any = Xn, back: Any = RawBack) -> None:
    """Runs `check(rig, back)` with both Connected; afterwards nothing may be held."""

    async def run() -> None:
        async with rig(front, back) as r:
            await r.plug()
            await r.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
            await until(lambda: r.front.cable.connected)
            await check(r, r.back)
            await r.gone()

    asyncio.run(run())
