"""The asyncio client where things go wrong: cancellation, deadlines, a store that dies or talks nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.support.store_links import Store

from xenbus.errors import (
    Conflict,
    DeadlineError,
    Denied,
    LinkDown,
    NoEntry,
    PeerError,
    StoreError,
    UsageError,
)
from xenbus.xenstore.calls import LISTING_RESTARTS
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon.session import Session
from xenbus.xenstore.events import MAX_EVENTS
from xenbus.xenstore.transaction import RetryPolicy
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.unix import UnixTransport
from xenbus.xenstore.wire.message import Message, Op, Parser, encode


def with_store(test: Callable[[Client, Session, Store], Awaitable[None]]) -> Callable[[], None]:
    """`test(client, served, store)` over the in-process transport; nothing may be left behind."""

    def run() -> None:
        async def main() -> None:
            store = Store()
            client, served = await store.link("memory")
            try:
                async with asyncio.timeout(20):
                    await test(client, served, store)
                    if not client.closed:
                        await client.read("/")
                        assert set(client.counts().values()) == {0}, client.counts()
                        assert not served.conn.watches
                        assert not served.conn.transactions
            finally:
                await client.close()
                await store.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not others

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


class Script:
    """A store that does only what a test says: the far end of a pair, as messages."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.parser = Parser()
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        transport.start(self)

    def data_received(self, data: bytes | memoryview) -> None:
        for message in self.parser.feed(data):
            self.inbox.put_nowait(message)

    def connection_lost(self, exc: Exception | None) -> None:
        pass

    def drained(self) -> None:
        pass

    def answer(self, message: Message, payload: bytes) -> None:
        self.transport.send([encode(message.op, message.req_id, message.tx_id, payload)])


def sent_by(client: Client) -> list[list[bytes]]:
    """The messages of each write from now on."""
    transport = client._transport
    sends: list[list[bytes]] = []
    send = transport.send

    def counted(messages: list[bytes]) -> None:
        sends.append(list(messages))
        send(messages)

    transport.send = counted
    return sends


def with_script(test: Callable[[Client, Script], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            near, far = memory_pair()
            script = Script(far)
            client = await Client.connect(near)
            try:
                async with asyncio.timeout(20):
                    await test(client, script)
            finally:
                await client.close()
                far.close()
                await asyncio.sleep(0)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


# ---- the link ----


def test_a_store_killed_in_a_request_fails_every_waiter_at_once() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        lost: list[Exception] = []
        async with await Client.connect(UnixTransport(near)) as client:
            client.on_lost(lost.append)
            client.on_lost(lambda exc: 1 / 0)
            reads = [asyncio.create_task(client.read(f"/{n}")) for n in range(700)]
            start = asyncio.create_task(client.transaction(lambda tx: tx.read("/a")))
            wait = asyncio.create_task(client.wait_for("/a", lambda value: False, 30))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert client.counts()["waiters"] == 702
            far.close()
            async with asyncio.timeout(2):
                results = await asyncio.gather(*reads, start, wait, return_exceptions=True)
            assert {type(result) for result in results} == {LinkDown}
            assert len(lost) == 1
            client.on_lost(lost.append)
            assert lost[0] is lost[1]
            assert client.closed
            with pytest.raises(LinkDown):
                await client.read("/a")
            assert set(client.counts().values()) == {0}

    asyncio.run(main())


@with_store
async def test_closing_here_is_no_loss(client: Client, served: Session, store: Store) -> None:
    lost: list[Exception] = []
    client.on_lost(lost.append)
    waiting = asyncio.create_task(client.wait_for("/a", lambda value: False, 30))
    await asyncio.sleep(0.01)
    await client.close()
    await client.close()
    with pytest.raises(LinkDown, match="closed here"):
        await waiting
    client.on_lost(lost.append)
    await asyncio.sleep(0)
    assert lost == []
    assert served.closed


@with_script
async def test_nonsense_from_the_store_ends_the_link(client: Client, script: Script) -> None:
    reading = asyncio.create_task(client.read("/a"))
    await script.inbox.get()
    script.transport.send([b"\xff" * 16])
    with pytest.raises(LinkDown, match="payload"):
        await reading
    assert client.closed


@with_script
async def test_a_malformed_reply_is_the_stores_fault_and_the_link_lives(
    client: Client, script: Script
) -> None:
    perms = asyncio.create_task(client.get_perms("/a"))
    script.answer(await script.inbox.get(), b"what")
    with pytest.raises(PeerError):
        await perms
    read = asyncio.create_task(client.read("/a"))
    script.answer(await script.inbox.get(), b"1")
    assert await read == b"1"


@pytest.mark.parametrize("number", [b"x\0", b"0\0", b"4294967296\0", b""])
def test_a_transaction_id_that_is_none_ends_the_link(number: bytes) -> None:
    @with_script
    async def test(client: Client, script: Script) -> None:
        task = asyncio.create_task(client.transaction(lambda tx: tx.read("/a")))
        script.answer(await script.inbox.get(), number)
        with pytest.raises(PeerError):
            await task
        assert client.closed

    test()


def test_where_nobody_listens(tmp_path) -> None:
    async def main() -> None:
        with pytest.raises(LinkDown, match="no store at"):
            await Client.connect(str(tmp_path / "none"))
        with pytest.raises(LinkDown):
            await Client.connect(f"unix:{tmp_path}/none")
        with pytest.raises(UsageError, match="scheme 'pigeon' is unknown"):
            await Client.connect("pigeon:/x")
        with pytest.raises(UsageError):
            await Client.connect("_stream:/x")

    asyncio.run(main())


# ---- sharing ----


@with_script
async def test_concurrent_requests_share_a_write_and_a_timer(client: Client, script: Script) -> None:
    loop = asyncio.get_running_loop()
    before = len(loop._scheduled)
    sends = sent_by(client)
    reads = [asyncio.create_task(client.read(f"/{n}")) for n in range(64)]
    messages = [await script.inbox.get() for _ in range(64)]
    assert [len(messages) for messages in sends] == [64]
    assert len(loop._scheduled) - before == 1
    for message in reversed(messages):
        script.answer(message, message.payload)
    assert await asyncio.gather(*reads) == [b"/%d\0" % n for n in range(64)]


@pytest.mark.slow
@with_store
async def test_a_watch_costs_little(client: Client, served: Session, store: Store) -> None:
    def callback(path: str) -> None:
        pass

    count = 2000
    paths = [f"/d/{n}" for n in range(count)]
    await asyncio.gather(*(client.watch("/warm/up", callback) for _ in range(600)))
    tracemalloc.start(1)
    try:
        watches = await asyncio.gather(*(client.watch(path, callback) for path in paths))
        held = tracemalloc.take_snapshot().filter_traces(
            [
                tracemalloc.Filter(True, "*/xenstore/client.py"),
                tracemalloc.Filter(True, "*/xenstore/session.py"),
            ]
        )
    finally:
        tracemalloc.stop()
    size = sum(statistic.size for statistic in held.statistics("filename"))
    assert len(watches) == count
    assert size / count < 250
    await client.reset_watches()


# ---- deadlines ----


@with_store
async def test_a_store_that_hangs_is_met_by_deadlines(client: Client, served: Session, store: Store) -> None:
    client.timeout = 0.03
    served.transport.pause(True)
    results = await asyncio.gather(
        client.read("/a"),
        client.write("/b", "1"),
        client.watch("/c", print),
        client.transaction(lambda tx: tx.read("/a")),
        client.wait_for("/d", lambda value: True, 0.02),
        return_exceptions=True,
    )
    assert {type(result) for result in results} == {DeadlineError}
    assert "in-process xenstored owed" in str(results[0])
    assert client.counts()["waiters"] == 0
    client.timeout = 10
    served.transport.pause(False)
    # What it does at last is dropped or undone: the watch, the transaction.
    assert await client.read("/b") == b"1"


@with_store
async def test_a_shorter_deadline_set_later_holds(client: Client, served: Session, store: Store) -> None:
    served.transport.pause(True)
    slow = asyncio.create_task(client.read("/"))
    await asyncio.sleep(0)
    client.timeout = 0.02
    with pytest.raises(DeadlineError):
        await client.read("/")
    assert not slow.done()
    served.transport.pause(False)
    client.timeout = 10
    await slow


# ---- cancellation ----


@with_store
async def test_a_cancelled_wait_leaves_nothing(client: Client, served: Session, store: Store) -> None:
    """At every moment of a watch, a transaction and a read: cancelled after any number of loop turns."""

    async def work(tx: Any) -> None:
        await tx.write("/t", "1")

    for turns in range(8):
        for make in (
            lambda: client.watch("/w", lambda path: None),
            lambda: client.transaction(work),
            lambda: client.read("/"),
            lambda: client.gather("/", {"a": bytes, "b": bytes}, {"a": b"", "b": b""}),
            lambda: client.wait_for("/never", lambda value: False, 30),
        ):
            task = asyncio.create_task(make())
            for _ in range(turns):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                result = await task
                assert done
                if hasattr(result, "close"):
                    await result.close()
        await client.read("/")
        assert set(client.counts().values()) == {0}, turns
        assert not served.conn.watches, turns
        assert not served.conn.transactions, turns


@with_script
async def test_a_reply_after_the_cancellation_is_dropped(client: Client, script: Script) -> None:
    first = asyncio.create_task(client.read("/first"))
    message = await script.inbox.get()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(client.read("/second"))
    script.answer(message, b"wrong")
    script.answer(await script.inbox.get(), b"right")
    assert await second == b"right"


# ---- watches ----


@with_store
async def test_a_closed_watch_is_silent_at_once(client: Client, served: Session, store: Store) -> None:
    heard: list[str] = []
    watch = await client.watch("/w", heard.append)
    await client.write("/w", "1")
    assert heard == ["/w", "/w"]
    closing = asyncio.create_task(watch.close())
    writing = asyncio.create_task(client.write("/w", "2"))
    await asyncio.gather(closing, writing, watch.close())
    assert heard == ["/w", "/w"]


@with_store
async def test_a_callback_that_raises_harms_nobody(client: Client, served: Session, store: Store) -> None:
    heard: list[str] = []
    bad = await client.watch("/w", lambda path: 1 / 0)
    good = await client.watch("/w", heard.append)
    await client.write("/w/x", "1")
    assert heard == ["/w", "/w/x"]
    await bad.close()
    await good.close()


@with_store
async def test_a_refused_watch_is_none(client: Client, served: Session, store: Store) -> None:
    with pytest.raises(StoreError, match="EINVAL"):
        await client.watch("/a/", print)
    guest, guest_end = await store.link("memory", 5)
    store.engine.domain(5).quotas.set("watches", 1)
    watches = []
    with pytest.raises(StoreError) as caught:
        while len(watches) < 4:  # versions of the store differ by one in where they stop
            watches.append(await guest.watch(f"w{len(watches)}", lambda path: None))
    assert (caught.value.op, caught.value.path) == ("WATCH", f"w{len(watches)}")
    assert guest.counts()["watches"] == len(watches) > 0
    for watch in watches:
        await watch.close()
    assert set(guest.counts().values()) == {0}
    assert not guest_end.conn.watches
    await guest.close()


@with_store
async def test_events_coalesce_and_are_bounded(client: Client, served: Session, store: Store) -> None:
    async with client.events("/e") as paths:
        assert await anext(paths) == "/e"
        for _ in range(3):
            await client.write("/e/x", "1")
        await client.write("/e/y", "1")
        assert await anext(paths) == "/e/x"
        assert await anext(paths) == "/e/y"
        await asyncio.gather(*(client.write(f"/e/{n}", "") for n in range(MAX_EVENTS + 1)))
        found = [await anext(paths)]
        assert found == ["/e"]
        assert client.counts()["watches"] == 1


@with_store
async def test_waiting_reads_once_for_a_burst_of_events(
    client: Client, served: Session, store: Store
) -> None:
    other, _ = await store.link("memory")
    waiting = asyncio.create_task(client.wait_for("/s", lambda value: value == b"end", 10))
    await asyncio.sleep(0.01)
    sends = sent_by(client)
    await asyncio.gather(*(other.write(f"/s/{n}", "") for n in range(100)))
    await other.write("/s", "mid")
    await asyncio.sleep(0.02)
    await other.write("/s", "end")
    assert await waiting == b"end"
    assert len(sends) <= 8
    await other.close()


@with_store
async def test_events_end_with_the_link(client: Client, served: Session, store: Store) -> None:
    async with client.events("/e") as paths:
        assert await anext(paths) == "/e"
        waiting = asyncio.create_task(anext(paths))
        await asyncio.sleep(0)
        served.transport.close()
        with pytest.raises(LinkDown):
            await waiting


# ---- long lists ----


@with_script
async def test_a_long_list_that_changes_is_fetched_again(client: Client, script: Script) -> None:
    task = asyncio.create_task(client.directory("/d"))
    message = await script.inbox.get()
    assert message.op == Op.DIRECTORY
    script.transport.send([encode(Op.ERROR, message.req_id, 0, b"E2BIG\0")])
    parts = [
        (b"/d\x000\0", b"7\0old\0"),
        (b"/d\x004\0", b"8\0new\0\0"),  # another generation: what we have is void
        (b"/d\x000\0", b"8\0a\0"),
        (b"/d\x002\0", b"8\0b\0\0"),
    ]
    for asked, answer in parts:
        message = await script.inbox.get()
        assert (message.op, message.payload) == (Op.DIRECTORY_PART, asked)
        script.answer(message, answer)
    assert await task == ["a", "b"]


@with_script
async def test_a_list_that_never_stops_changing_is_given_up(client: Client, script: Script) -> None:
    task = asyncio.create_task(client.directory("/d"))
    message = await script.inbox.get()
    script.transport.send([encode(Op.ERROR, message.req_id, 0, b"E2BIG\0")])
    for generation in range(2 * LISTING_RESTARTS):
        script.answer(await script.inbox.get(), b"%d\0a\0" % generation)
    with pytest.raises(Conflict, match=r"DIRECTORY_PART /d: EAGAIN .* changed 64 times"):
        await task


# ---- transactions ----


@with_script
async def test_only_what_started_is_aborted(client: Client, script: Script) -> None:
    task = asyncio.create_task(client.transaction(lambda tx: tx.read("/a")))
    message = await script.inbox.get()
    script.transport.send([encode(Op.ERROR, message.req_id, 0, b"ENOSPC\0")])
    with pytest.raises(StoreError, match="ENOSPC"):
        await task
    read = asyncio.create_task(client.read("/"))
    message = await script.inbox.get()
    assert message.op == Op.READ  # no TRANSACTION_END went before it
    script.answer(message, b"")
    await read


@with_store
async def test_a_conflict_that_never_ends_is_given_up(client: Client, served: Session, store: Store) -> None:
    runs = 0

    async def collide(tx: Any) -> None:
        nonlocal runs
        runs += 1
        await tx.read("/")
        await tx.write("/c", "1")
        await client.write("/c", "2")

    await client.write("/c", "0")
    with pytest.raises(Conflict, match="after 4 attempts"):
        await client.transaction(collide, policy=RetryPolicy(attempts=4, base=0.001, cap=0.002))
    assert runs == 4


@with_store
async def test_many_contend_and_all_succeed(client: Client, served: Session, store: Store) -> None:
    other, _ = await store.link("memory", max_transactions=3)
    await client.write("/n", "0")

    async def add(tx: Any) -> None:
        await tx.write("/n", str(int(await tx.read("/n")) + 1))

    await asyncio.gather(*(which.transaction(add) for which in [client, other] * 20))
    assert await client.read("/n") == b"40"
    await other.close()


@with_store
async def test_transactions_take_turns(client: Client, served: Session, store: Store) -> None:
    most = 0

    async def work(tx: Any) -> None:
        nonlocal most
        most = max(most, client.counts()["transactions"])
        await tx.write(f"/x/{tx.id}", "")

    await client.mkdir("/x")
    narrow, _ = await store.link("memory", max_transactions=1)
    hold = asyncio.Event()
    held = asyncio.create_task(narrow.transaction(lambda tx: hold.wait()))
    await asyncio.sleep(0.01)
    narrow.timeout = 0.02
    with pytest.raises(DeadlineError, match="a free transaction"):
        await narrow.transaction(work)
    narrow.timeout = 10
    hold.set()
    await held
    await narrow.transaction(work)
    await narrow.close()


@with_store
async def test_a_guest_sees_its_own_home_and_no_other(client: Client, served: Session, store: Store) -> None:
    await client.write("/local/domain/5/name", "guest")
    await client.set_perms("/local/domain/5", ["n5"])
    await client.set_perms("/local/domain/5/name", ["n5"])
    await client.write("/secret", "1")
    await client.set_perms("/secret", ["n0"])
    guest = await store.guest(client)
    assert await guest.read("name") == b"guest"
    heard: list[str] = []
    await guest.watch("device", heard.append)
    await guest.write("device/x", "1")
    assert heard == ["device", "device/x"]
    with pytest.raises(Denied):
        await guest.read("/secret")
    with pytest.raises(Denied):
        await guest.exists("/secret")
    with pytest.raises(NoEntry):
        await guest.read("nothing")
    with pytest.raises(Denied):
        await guest.control("help")
    await guest.close()
    await client.release(5)
