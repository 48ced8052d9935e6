"""A store whose guests come over real shared pages, in one process; a guest that handles its page by hand."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.support.raw_store import until
from xenbus.hypervisor.embedded import Machine
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.transport.ringpage import RingTransport, Side
from xenbus.xenstore.wire import Parser

REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060
FEATURES, CONNECTION, ERROR = 2064, 2068, 2072


class RawGuest:
    """A guest that handles its ring page with its bare hands."""

    def __init__(self, host: Host, domid: int) -> None:
        self.host, self.domid = host, domid
        self.kicks = 0
        self.on_kick: Callable[[], None] = lambda: None

    async def open(self) -> RawGuest:
        self.hv = self.host.machine.domain(self.domid)
        info = await self.hv.start_info(self._kicked)
        self.page, self.channel = info.store_page, info.store_channel
        return self

    def _kicked(self) -> None:
        self.kicks += 1
        self.on_kick()

    def word(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.page, offset)[0]
        return value

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.page, offset, value & 0xFFFFFFFF)

    def put(self, data: bytes) -> None:
        """Into the request ring as far as there is room, without looking whether it is well-formed."""
        produced = self.word(REQ_PROD)
        assert len(data) <= 1024 - (produced - self.word(REQ_CONS)) % 2**32
        for at, byte in enumerate(data):
            self.page[(produced + at) % 1024] = byte
        self.set(REQ_PROD, produced + len(data))
        self.channel.notify()

    def get(self) -> bytes:
        """What the response ring holds."""
        consumed, produced = self.word(RSP_CONS), self.word(RSP_PROD)
        data = bytes(self.page[1024 + at % 1024] for at in range(consumed, produced))
        self.set(RSP_CONS, produced)
        self.channel.notify()
        return data

    async def replies(self, count: int) -> list[Any]:
        parser, got = Parser(), []
        async with asyncio.timeout(5):
            while len(got) < count:
                await until(lambda: self.word(RSP_PROD) != self.word(RSP_CONS))
                got += parser.feed(self.get())
        return got


class Host:
    """An in-process machine with a store; domain 0's client is `dom0`."""

    def __init__(self, profile: str = "xenstored") -> None:
        self.machine = Machine()
        self.hv = self.machine.domain(0)
        self.daemon = Daemon(self.hv, profile=profile)
        self.dom0: Client
        self.failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.failures.append(context))

    async def guest(self, domid: int) -> Client:
        """An introduced guest with a home of its own, and its client."""
        hv = self.machine.domain(domid)
        ends: list[RingTransport] = []

        def kicked() -> None:
            for end in ends:
                end.on_event()

        info = await hv.start_info(kicked)
        ends.append(RingTransport(info.store_page, info.store_channel.notify, Side.GUEST, "xenstored"))
        await self.introduce(domid)
        return await Client.connect(ends[0])

    async def raw_guest(self, domid: int, introduce: bool = True) -> RawGuest:
        guest = await RawGuest(self, domid).open()
        if introduce:
            await self.introduce(domid)
        return guest

    async def introduce(self, domid: int) -> None:
        await self.dom0.mkdir(f"/local/domain/{domid}")
        await self.dom0.introduce(domid, 1, self.machine.store_port(domid))
        await self.dom0.set_perms(f"/local/domain/{domid}", [f"n{domid}"])

    def idle(self) -> bool:
        held = self.machine.held(0)
        return (held.mapped_pages, held.ports, len(self.daemon._guests), len(self.daemon._tasks)) == (
            0,
            0,
            0,
            0,
        )


@contextlib.asynccontextmanager
async def host(profile: str = "xenstored") -> AsyncIterator[Host]:
    one = Host(profile)
    one.dom0 = await Client.connect(one.daemon.connect_local())
    try:
        yield one
        assert one.failures == []
        assert one.daemon.engine.check() == []
    finally:
        await one.dom0.close()
        await one.daemon.close()
        assert one.idle()
        for domid in list(one.machine.domids()):
            one.machine.kill(domid)
        await asyncio.sleep(0)
