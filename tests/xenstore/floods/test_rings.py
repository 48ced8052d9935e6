"""Guests that flood their rings, on real shared pages: others are served, and what waits is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
from tests.support.raw_store import until
from tests.support.store_fuzz_live import Bystander, no_tracebacks
from tests.support.store_host import REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, Host, RawGuest, host

from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon.session import PORTION
from xenbus.xenstore.engine import PROFILES
from xenbus.xenstore.transport.unix import UnixTransport
from xenbus.xenstore.wire import Op, Parser, encode

# Seconds that a round of somebody else's work (nine requests) may take on a busy machine.
PATIENCE = 2.0


class Greedy:
    """A guest whose request ring is full whenever it is kicked; it takes its replies, or not."""

    def __init__(self, guest: RawGuest, message: bytes, *, reads: bool) -> None:
        self.guest, self.message, self.reads = guest, message, reads
        self.left = b""
        self.sent = 0

    @classmethod
    async def begin(cls, one: Host, domid: int, message: bytes, *, reads: bool) -> Greedy:
        self = cls(await one.raw_guest(domid), message, reads=reads)
        self.guest.on_kick = self.fill
        self.fill()
        return self

    def fill(self) -> None:
        guest = self.guest
        if self.reads:
            guest.set(RSP_CONS, guest.word(RSP_PROD))
        produced = guest.word(REQ_PROD)
        room = 1024 - (produced - guest.word(REQ_CONS)) % 2**32
        while len(self.left) < room:
            self.left += self.message
            self.sent += 1
        data, self.left = self.left[:room], self.left[room:]
        for at, byte in enumerate(data):
            guest.page[(produced + at) % 1024] = byte
        guest.set(REQ_PROD, produced + len(data))
        guest.channel.notify()


async def bystanders(client: Client, one: Host) -> tuple[Bystander, Bystander]:
    """A guest's, and domain 0's."""
    return await Bystander.ready(client, "data"), await Bystander.ready(one.dom0, "/bystander")


@pytest.mark.slow
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "deaf"])
@pytest.mark.parametrize(
    "message",
    [
        encode(Op.READ, 1, 0, b"n\0"),
        encode(Op.WRITE, 1, 0, b"n\0" + b"x" * 1500),
        encode(Op.WATCH, 1, 0, b"n\0t\0") + encode(Op.RESET_WATCHES, 2, 0, b"\0"),
        encode(Op.TRANSACTION_START, 1, 0, b"\0"),
        encode(99, 1, 0, b"x" * 4000),
    ],
    ids=["reads", "writes", "watches", "transactions", "nonsense"],
)
def test_ten_guests_that_never_stop_asking(message: bytes, reads: bool) -> None:
    async def run() -> None:
        with no_tracebacks():
            async with host() as one:
                client = await one.guest(6)
                good, dom0 = await bystanders(client, one)
                greedy = [await Greedy.begin(one, domid, message, reads=reads) for domid in range(10, 20)]
                for _ in range(10):
                    began = time.monotonic()
                    await good.work()
                    await dom0.work()
                    assert time.monotonic() - began < PATIENCE
                if reads:
                    before = [each.sent for each in greedy]
                    await until(
                        lambda: all(each.sent > was for each, was in zip(greedy, before, strict=True))
                    )
                for domid in range(10, 20):
                    domain = one.daemon.engine.domain(domid)
                    (conn,) = domain.connections
                    assert domain.memory <= domain.quotas.memory
                    assert conn.outstanding <= domain.quotas.outstanding
                    session = one.daemon._guests._guests[domid].session
                    # A ring's worth of requests, each of them a header at least.
                    assert len(session._pending) <= 1024 // 16
                for domid in range(10, 20):
                    one.machine.kill(domid)
                await until(lambda: len(one.daemon._guests) == 1)
                await good.work()
                await client.close()

    asyncio.run(run())


def test_a_guest_cannot_fill_the_queue_of_a_watcher_that_stopped() -> None:
    """Its requests are outstanding until their events were taken: it waits, and nobody else does."""

    async def run() -> None:
        with no_tracebacks():
            async with host() as one:
                client = await one.guest(6)
                good, dom0 = await bystanders(client, one)
                near, far = socket.socketpair()
                near.setblocking(False)
                watcher = one.daemon.open_session(0, UnixTransport(far, "a watcher"))
                watcher.start()
                near.send(encode(Op.WATCH, 1, 0, b"/local/domain/10\0" + b"t" * 3000 + b"\0"))
                await until(lambda: watcher.conn.watches)
                flood = b"".join(encode(Op.WRITE, 1, 0, b"n%d\0" % n) for n in range(400))
                await Greedy.begin(one, 10, flood, reads=True)
                (conn,) = one.daemon.engine.domain(10).connections
                await until(lambda: not conn.may_send)
                for _ in range(10):
                    await good.work()
                    await dom0.work()
                    assert not conn.may_send
                # No more than what its outstanding requests caused, and a portion on its way.
                assert watcher.conn.queued <= (conn.domain.quotas.outstanding + 1) * 3100
                assert watcher.transport.backlog <= PORTION + 3100
                # And once the watcher reads, the guest goes on: more events come than were waiting.
                parser, heard = Parser(), 0
                async with asyncio.timeout(10):
                    while heard < 500:
                        with contextlib.suppress(BlockingIOError):
                            heard += len(parser.feed(near.recv(65536)))
                        await asyncio.sleep(0)
                near.close()
                one.machine.kill(10)
                await until(lambda: len(one.daemon._guests) == 1)
                await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_guest_may_name_every_domain_there_could_be(profile: str) -> None:
    """In the entries of its nodes, four at a time: nothing is kept of those whom nobody knows."""

    async def run() -> None:
        with no_tracebacks():
            async with host(profile) as one:
                guest = await one.guest(5)
                await guest.write("data", "1")
                before = set(one.daemon.engine.domains)
                for first in range(10, 2000, 4):
                    await guest.set_perms("data", ["n5", *(f"r{domid}" for domid in range(first, first + 4))])
                assert set(one.daemon.engine.domains) == before
                await guest.close()

    asyncio.run(run())
