"""A front end and a back end of a `vbd` that put on their rings what a test wants. No test here."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from tests.support.until import until
from xenbus.bus import XenbusDriver, XenbusState
from xenbus.drivers.block import blkif
from xenbus.ring.shared import BackRing, FrontRing


class RawFront(XenbusDriver):
    """A front end that puts on the ring whatever a test wants, and reads raw answers.

    lies: what it writes instead of its true parameters (None: the key is left out)
    """

    name = "raw"
    description = "Raw front end"
    lies: ClassVar[dict[str, object]] = {}
    abi = blkif.X86_64
    order = 0

    def __init__(self, dev: Any) -> None:
        super().__init__(dev)
        self.answers: list[tuple[int, int, int]] = []
        self.woken = asyncio.Event()
        self.ring: Any = None

    async def otherend_changed(self, state: XenbusState) -> None:
        if state is XenbusState.INIT_WAIT and self.dev.state is XenbusState.INITIALISING:
            await self.initialise()
        elif state is XenbusState.CONNECTED and self.dev.state is XenbusState.INITIALISED:
            await self.dev.set_state(XenbusState.CONNECTED)
        elif state in (XenbusState.CLOSING, XenbusState.CLOSED) and self.closes:
            await self.dev.set_state(XenbusState.CLOSED)

    closes = True

    async def initialise(self) -> None:
        self.pages = await self.dev.grant_ring(1 << self.order)
        self.data = await self.dev.grant_ring(16)
        self.ring = FrontRing(self.pages.view, self.abi.request_size, self.abi.response_size)
        self.ring.init()
        self.channel = await self.dev.alloc_evtchn(self.kicked)
        refs = self.pages.refs
        values: dict[str, object] = {
            "event-channel": self.channel.port,
            "protocol": self.abi.name,
            "feature-persistent": 0,
            **({f"ring-ref{n}": ref for n, ref in enumerate(refs)} if self.order else {"ring-ref": refs[0]}),
            **({"ring-page-order": self.order} if self.order else {}),
            **self.lies,
        }
        await self.dev.set_state(
            XenbusState.INITIALISED, {key: value for key, value in values.items() if value is not None}
        )

    async def detach(self) -> None:
        if self.ring is not None:
            self.ring.release()

    def kicked(self) -> None:
        for raw in self.ring.take_responses():
            self.answers.append(self.abi.response.unpack(raw))
        self.ring.final_check_for_responses()
        self.woken.set()

    def put(self, op: int, ident: int, sector: int, *words: int, count: int | None = None) -> None:
        """A read or write request; `count` lies about the number of segments."""
        abi, at = self.abi, self.ring.request_offset()
        abi.rw.pack_into(self.ring.slots, at, op, len(words) if count is None else count, 0, ident, sector)
        abi.words[len(words)].pack_into(self.ring.slots, at + abi.segments_at, *words)
        self.ring.commit_request()

    def put_raw(self, data: bytes) -> None:
        self.ring.put_request(data)

    def push(self) -> None:
        self.ring.push_requests()
        self.channel.notify()

    async def answered(self, count: int) -> list[tuple[int, int, int]]:
        """Until there are so many answers in all: (id, operation, status), in order of their arrival."""
        await until(lambda: len(self.answers) >= count)
        return self.answers

    def word(self, page: int, first: int = 0, last: int = 7) -> int:
        """A segment in the data page of that number."""
        return blkif.segment_word(self.data.refs[page], first, last)


class RawQueues(RawFront):
    """The same with several rings. `ring` and `channel` are those that `use` chose; answers come from all."""

    queues = 2

    async def initialise(self) -> None:
        dev = self.dev
        self.data = await dev.grant_ring(16)
        self.pages = [await dev.grant_ring(1 << self.order) for _ in range(self.queues)]
        self.rings = [FrontRing(p.view, self.abi.request_size, self.abi.response_size) for p in self.pages]
        self.channels = []
        for ring in self.rings:
            ring.init()
            self.channels.append(await dev.alloc_evtchn(self.kicked))
        self.use(0)
        values: dict[str, object] = {
            "multi-queue-num-queues": self.queues,
            "protocol": self.abi.name,
            "feature-persistent": 0,
            **({"ring-page-order": self.order} if self.order else {}),
        }
        for n, (pages, channel) in enumerate(zip(self.pages, self.channels, strict=True)):
            values[f"queue-{n}/event-channel"] = channel.port
            names = [f"ring-ref{k}" for k in range(1 << self.order)] if self.order else ["ring-ref"]
            values |= {f"queue-{n}/{key}": ref for key, ref in zip(names, pages.refs, strict=True)}
        values |= self.lies
        # A lie that is one of ours is said by its name: "the port of queue-0".
        said = {key: values.get(str(value), value) for key, value in values.items() if value is not None}
        await dev.set_state(XenbusState.INITIALISED, said)

    def use(self, queue: int) -> None:
        self.ring, self.channel = self.rings[queue], self.channels[queue]

    async def detach(self) -> None:
        for ring in self.rings:
            ring.release()

    def kicked(self) -> None:
        for ring in self.rings:
            for raw in ring.take_responses():
                self.answers.append(self.abi.response.unpack(raw))
            ring.final_check_for_responses()
        self.woken.set()


class RawBack(XenbusDriver):
    """A back end that answers whatever a test wants.

    offers: what it writes with InitWait; properties: with Connected
    """

    name = "rawb"
    description = "Raw back end"
    offers: ClassVar[dict[str, object]] = {"feature-flush-cache": 1, "feature-persistent": 1}
    properties: ClassVar[dict[str, object]] = {"sectors": 2048, "sector-size": 512, "info": 0}
    connects = True

    def __init__(self, dev: Any) -> None:
        super().__init__(dev)
        self.ring: Any = None
        self.mapping: Any = None
        self.requests: list[bytes] = []

    async def attach(self) -> None:
        await self.dev.set_state(XenbusState.INIT_WAIT, self.offers)

    async def otherend_changed(self, state: XenbusState) -> None:
        if state is XenbusState.INITIALISED and self.mapping is None and self.connects:
            said = await self.dev.otherend_gather(
                {"event-channel": int, "ring-page-order": int, "protocol": bytes.decode},
                {"ring-page-order": 0},
            )
            order = said["ring-page-order"]
            keys = [f"ring-ref{n}" for n in range(1 << order)] if order else ["ring-ref"]
            refs = await self.dev.otherend_gather(dict.fromkeys(keys, int))
            self.abi = blkif.abi_of(said["protocol"])
            self.mapping = await self.dev.map_ring([refs[key] for key in keys])
            self.ring = BackRing(self.mapping.view, self.abi.request_size)
            self.channel = await self.dev.bind_evtchn(said["event-channel"], self.kicked)
            await self.dev.set_state(XenbusState.CONNECTED, self.properties)
        elif state is XenbusState.CLOSING:
            await self.dev.set_state(XenbusState.CLOSING)
        elif state is XenbusState.CLOSED and self.dev.state is not XenbusState.CLOSED:
            await self.detach()
            await self.dev.set_state(XenbusState.CLOSED)

    async def detach(self) -> None:
        if self.ring is not None:
            ring, self.ring = self.ring, None
            ring.release()
            await self.dev.close_evtchn(self.channel)
            await self.dev.unmap(self.mapping)

    def kicked(self) -> None:
        if self.ring is not None:
            self.requests += self.ring.take_requests()
            self.ring.final_check_for_requests()

    async def asked(self, count: int) -> list[bytes]:
        await until(lambda: len(self.requests) >= count)
        return self.requests

    def answer(self, ident: int, op: int, status: int) -> None:
        self.ring.put_response(self.abi.response.pack(ident, op, status))
        self.ring.push_responses()
        self.channel.notify()
