"""A ring that starts anew, and all the ways in which one ends: whatever was under way, all is given back."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.raw_store import until
from tests.support.store_fuzz_live import no_tracebacks
from tests.support.store_host import (
    CONNECTION,
    ERROR,
    FEATURES,
    REQ_CONS,
    REQ_PROD,
    RSP_CONS,
    RSP_PROD,
    Host,
    RawGuest,
    host,
)

from xenbus.errors import NoEntry, StoreError
from xenbus.xenstore.wire import Op, encode

# A watch, a transaction with a change in it, and questions whose answers fill the ring.
BUSY = (
    encode(Op.WATCH, 1, 0, b"data\0t\0")
    + encode(Op.TRANSACTION_START, 2, 0, b"\0")
    + encode(Op.WRITE, 3, 1, b"data\0in a transaction")
    + encode(Op.READ, 4, 0, b"long\0") * 8
)
HALF = encode(Op.WRITE, 9, 0, b"data\0" + b"x" * 500)[:300]


async def busy(one: Host, domid: int = 5) -> RawGuest:
    """A guest that has a watch, an open transaction, answers that it does not take and half a request."""
    guest = await one.raw_guest(domid)
    await one.dom0.write(f"/local/domain/{domid}/long", "l" * 400)
    guest.put(BUSY)
    domain = one.daemon.engine.domain(domid)
    await until(lambda: domain.transactions and guest.word(RSP_PROD) - guest.word(RSP_CONS) == 1024)
    guest.put(HALF)
    assert (domain.watches, domain.transactions) == (1, 1)
    return guest


async def works(guest: RawGuest) -> None:
    """One request and its answer, on an empty ring."""
    guest.put(encode(Op.GET_DOMAIN_PATH, 77, 0, b"5\0"))
    (reply,) = await guest.replies(1)
    assert (reply.req_id, reply.payload) == (77, b"/local/domain/5\0")


def run(body, profile: str = "xenstored") -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        with no_tracebacks():
            async with host(profile) as one:
                await body(one)

    asyncio.run(main())


# ---- the connection word ----


def test_a_guest_that_reconnects_starts_from_nothing() -> None:
    """Where it is offered, as oxenstored does."""

    async def body(one: Host) -> None:
        guest = await busy(one)
        assert guest.word(FEATURES) & 1
        guest.set(CONNECTION, 1)
        guest.channel.notify()
        await until(lambda: guest.word(CONNECTION) == 0)
        assert guest.word(REQ_CONS) == guest.word(REQ_PROD)
        assert guest.word(RSP_CONS) == guest.word(RSP_PROD)
        domain = one.daemon.engine.domain(5)
        assert (domain.watches, domain.transactions) == (0, 0)
        (conn,) = domain.connections
        assert (conn.queued, conn.replies) == (0, 0)
        await one.dom0.write("/local/domain/5/data", "1")
        await works(guest)
        assert one.machine.held(0).mapped_pages == 1

    run(body, "oxenstored")


def test_half_a_request_is_forgotten() -> None:
    async def body(one: Host) -> None:
        guest = await one.raw_guest(5)
        guest.put(HALF)
        await until(lambda: guest.word(REQ_CONS) == guest.word(REQ_PROD))
        guest.set(CONNECTION, 1)
        guest.channel.notify()
        await until(lambda: guest.word(CONNECTION) == 0)
        await works(guest)

    run(body, "oxenstored")


def test_what_is_not_offered_is_not_done() -> None:
    async def body(one: Host) -> None:
        guest = await one.raw_guest(5)
        assert not guest.word(FEATURES) & 1
        guest.put(encode(Op.WATCH, 1, 0, b"data\0t\0"))
        await guest.replies(2)
        guest.set(CONNECTION, 1)
        await works(guest)
        assert guest.word(CONNECTION) == 1, "the word means nothing"
        assert one.daemon.engine.domain(5).watches == 1

    run(body)


# ---- introduced again ----


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda guest: guest.set(REQ_PROD, guest.word(REQ_CONS) + 5000), 2),
        (lambda guest: guest.set(RSP_CONS, guest.word(RSP_PROD) + 9), 2),
        (lambda guest: guest.put(struct.pack("<IIII", 2, 1, 0, 5000)), 3),
    ],
    ids=["requests", "replies", "too long"],
)
def test_a_stopped_ring_starts_anew_when_it_is_introduced_again(spoil, fault) -> None:  # type: ignore[no-untyped-def]
    async def body(one: Host) -> None:
        guest = await one.raw_guest(5)
        guest.put(encode(Op.WATCH, 1, 0, b"data\0t\0"))
        await guest.replies(2)
        spoil(guest)
        guest.channel.notify()
        if guest.word(REQ_PROD) == guest.word(REQ_CONS):
            guest.put(encode(Op.READ, 1, 0, b"data\0"))
        await until(lambda: guest.word(ERROR) == fault)
        assert one.daemon.engine.domain(5).watches == 0
        fresh = await guest.hv.evtchn.alloc_unbound(0, lambda: None)
        await one.dom0.introduce(5, 1, fresh.port)
        guest.channel = fresh
        assert guest.word(ERROR) == 0
        await works(guest)
        assert (one.machine.held(0).mapped_pages, one.machine.held(0).ports) == (1, 1)

    run(body)


def test_introduced_again_in_the_middle_of_everything() -> None:
    async def body(one: Host) -> None:
        guest = await busy(one)
        for _ in range(3):
            fresh = await guest.hv.evtchn.alloc_unbound(0, lambda: None)
            await one.dom0.introduce(5, 1, fresh.port)
            guest.channel = fresh
        domain = one.daemon.engine.domain(5)
        assert (domain.watches, domain.transactions, len(domain.connections)) == (0, 0, 1)
        assert (one.machine.held(0).mapped_pages, one.machine.held(0).ports) == (1, 1)
        await works(guest)

    run(body)


def test_introduced_again_with_a_port_that_is_none() -> None:
    async def body(one: Host) -> None:
        await busy(one)
        with pytest.raises(StoreError):
            await one.dom0.introduce(5, 1, 999)
        domain = one.daemon.engine.domain(5)
        assert (domain.watches, domain.transactions) == (0, 0)
        await one.dom0.release(5)
        await until(one.idle)

    run(body)


# ---- its end ----


@pytest.mark.parametrize("profile", ["xenstored", "oxenstored"])
@pytest.mark.parametrize("end", ["release", "death", "both", "release in flight"])
def test_the_end_in_the_middle_of_requests(end: str, profile: str) -> None:
    async def body(one: Host) -> None:
        await one.dom0.write("/local/domain/6", "")
        heard: list[str] = []
        await one.dom0.watch("@releaseDomain", heard.append)
        guest = await busy(one)
        if end == "release in flight":
            # The guest goes on asking while it is released.
            release = asyncio.ensure_future(one.dom0.release(5))
            while not release.done():
                guest.set(RSP_CONS, guest.word(RSP_PROD))
                guest.channel.notify()
                await asyncio.sleep(0)
            await release
        elif end != "death":
            await one.dom0.release(5)
        if end in ("death", "both"):
            one.machine.kill(5)
        await until(one.idle)
        await until(lambda: len(heard) == 2)
        engine = one.daemon.engine
        assert 5 not in engine.domains
        assert not any(b"/5" in path for path in engine.nodes)
        assert engine.watches.by_path.keys() == {b"@releaseDomain"}
        assert not await one.dom0.exists("/local/domain/5")

    run(body, profile)


ACTIONS = st.sampled_from(["introduce", "release", "kill", "create", "ask", "half", "busy", "turn", "wait"])


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=25))
def test_any_order_of_beginnings_and_ends(actions: list[str]) -> None:
    """Nothing waits for what was asked before it; at the end all is given back."""

    async def body(one: Host) -> None:
        guest: RawGuest | None = None
        tasks: list[asyncio.Task[object]] = []

        async def create() -> RawGuest:
            made = await one.raw_guest(5, introduce=False)
            await one.dom0.mkdir("/local/domain/5")
            return made

        async def quietly(awaitable) -> None:  # type: ignore[no-untyped-def]
            with contextlib.suppress(StoreError):
                await awaitable

        for action in actions:
            if action == "create" and guest is None:
                guest = await create()
            elif action == "introduce":
                port = one.machine.store_port(5) if guest is not None else 1
                tasks.append(asyncio.create_task(quietly(one.dom0.introduce(5, 1, port))))
            elif action == "release":
                tasks.append(asyncio.create_task(quietly(one.dom0.release(5))))
            elif action == "kill" and guest is not None:
                one.machine.kill(5)
                guest = None
            elif action in ("ask", "half", "busy") and guest is not None:
                data = {"ask": encode(Op.READ, 1, 0, b"x\0"), "half": HALF[:50], "busy": BUSY}[action]
                if 1024 - (guest.word(REQ_PROD) - guest.word(REQ_CONS)) % 2**32 >= len(data):
                    guest.put(data)
            elif action == "turn":
                await asyncio.sleep(0)
            elif action == "wait" and tasks:
                await asyncio.wait_for(asyncio.gather(*tasks), 5)
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert await one.dom0.read("/tool") == b""
        await quietly(one.dom0.release(5))
        if guest is not None:
            one.machine.kill(5)
        await until(one.idle)
        domain = one.daemon.engine.domains.get(5)
        assert domain is None or (domain.watches, domain.transactions, len(domain.connections)) == (0, 0, 0)

    run(body)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("end", ["death", "the daemon's own word"])
def test_an_end_at_any_moment_of_an_introduction(end: str, again: bool) -> None:
    async def body(one: Host) -> None:
        for turns in range(12):
            domid = 10 + turns
            guest = await one.raw_guest(domid, introduce=again)
            if again:
                guest.channel = await guest.hv.evtchn.alloc_unbound(0, lambda: None)
            port = guest.channel.port if again else one.machine.store_port(domid)
            task = asyncio.ensure_future(one.dom0.introduce(domid, 1, port))
            for _ in range(turns):
                await asyncio.sleep(0)
            if end == "death":
                one.machine.kill(domid)
            else:
                one.daemon.domain_died(domid)
            with contextlib.suppress(StoreError):
                await task
            if end == "death":
                assert not await one.dom0.is_introduced(domid), turns
            else:
                # It may have been introduced after its end, if that came first of all.
                with contextlib.suppress(NoEntry):
                    await one.dom0.release(domid)
            await until(one.idle)

    run(body)
