"""The blocking client where things go wrong, and what only it has: events that wait to be asked for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.support.store_links import Store

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, PeerError, StoreError, UsageError
from xenbus.xenstore import calls, sync
from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transaction import RetryPolicy
from xenbus.xenstore.transport.unix import UnixPipe, UnixTransport
from xenbus.xenstore.wire.message import Message, Op, Parser, encode


@contextmanager
def served(
    *, timeout: float = 10
) -> Iterator[tuple[SyncClient, Callable[[Callable[[Store], object]], object]]]:
    """(client, run): the engine lives in another thread; `run(f)` calls `f(store)` there."""
    ready = threading.Event()
    box: dict[str, object] = {}

    async def main() -> None:
        store = Store()
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        client, _ = store.blocking("unix", timeout=timeout)
        box.update(client=client, store=store, loop=loop, stop=lambda: stop.set())
        ready.set()
        await stop.wait()
        await store.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(5)
    loop, store = box["loop"], box["store"]

    def run(function: Callable[[Store], object]) -> object:
        async def call() -> object:
            result = function(store)
            store.daemon.flush()
            return result

        return asyncio.run_coroutine_threadsafe(call(), loop).result(5)

    try:
        yield box["client"], run
    finally:
        box["client"].close()
        loop.call_soon_threadsafe(box["stop"])
        thread.join(5)
        assert not thread.is_alive()


@contextmanager
def scripted(timeout: float = 5) -> Iterator[tuple[SyncClient, socket.socket]]:
    """(client, the store's end of its socket)."""
    near, far = socket.socketpair()
    with SyncClient(UnixPipe(near), timeout) as client, far:
        far.settimeout(5)
        yield client, far


def requests(far: socket.socket) -> list[Message]:
    return Parser().feed(far.recv(65536))


def test_events_wait_and_equal_ones_are_one() -> None:
    with served() as (client, _):
        seen: list[str] = []
        one = client.watch("/a", seen.append)
        two = client.watch("/a/b")
        for _ in range(3):
            client.write("/a/b", "1")
        assert seen == []
        found = [client.poll_watch(1) for _ in range(4)]
        assert found == [(one, "/a"), (two, "/a/b"), (one, "/a/b"), (two, "/a/b")]
        assert [event.first for _, event in found] == [True, True, False, False]
        assert client.poll_watch(0.01) is None
        assert seen == ["/a", "/a/b"]
        client.write("/a/b", "2")
        one.close()
        one.close()
        assert client.poll_watch(1) == (two, "/a/b")
        assert client.poll_watch(0) is None
        two.close()
        assert set(client.counts().values()) == {0}


def test_waiting_events_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(sync, "MAX_EVENTS", 10)
    with served() as (client, _):
        watch = client.watch("/a")
        for n in range(30):
            client.write(f"/a/{n}", "")
        paths = []
        while (event := client.poll_watch(0.01)) is not None:
            paths.append(event[1])
        assert len(paths) <= 10
        assert "/a" in paths
        watch.close()


def test_an_event_wakes_a_poll() -> None:
    with served() as (client, run):
        watch = client.watch("/w")
        assert client.poll_watch(1) == (watch, "/w")
        assert client.poll_watch(0.01) is None
        other = client.watch("@releaseDomain")
        assert client.poll_watch(1) == (other, "@releaseDomain")
        client.introduce(5, 0, run(lambda store: store.port(5)))
        timer = threading.Timer(0.02, run, [lambda store: store.machine.kill(5)])
        timer.start()
        assert client.poll_watch(5) == (other, "@releaseDomain")
        timer.join()
        client.reset_watches()


def test_a_dead_store_fails_the_request_and_everything_after() -> None:
    with scripted() as (client, far):
        timer = threading.Timer(0.02, far.close)
        timer.start()
        began = time.monotonic()
        with pytest.raises(LinkDown, match="READ /a"):
            client.read("/a")
        assert time.monotonic() - began < 2
        timer.join()
        assert client.closed
        for request in (lambda: client.read("/a"), lambda: client.poll_watch(1)):
            with pytest.raises(LinkDown):
                request()
        with pytest.raises(LinkDown):
            client.transaction(lambda tx: None)


def test_a_store_that_hangs_is_met_by_deadlines() -> None:
    with scripted(0.02) as (client, far):
        with pytest.raises(DeadlineError, match="READ /a"):
            client.read("/a")
        with pytest.raises(DeadlineError):
            client.watch("/w")
        with pytest.raises(DeadlineError):
            client.transaction(lambda tx: None)
        began = time.monotonic()
        client.timeout = 5
        with pytest.raises(DeadlineError):
            client.wait_for("/a", lambda value: False, 0.02)
        assert time.monotonic() - began < 1
        assert client.timeout == 5
        # What it answers at last is dropped, and what it made is undone.
        late = requests(far)
        assert [message.op for message in late] == [Op.READ, Op.WATCH, Op.TRANSACTION_START, Op.WATCH]
        payloads = [b"late", b"OK\0", b"9\0", b"OK\0"]
        far.sendall(
            b"".join(
                encode(message.op, message.req_id, 0, payload)
                for message, payload in zip(late, payloads, strict=True)
            )
        )
        answers = threading.Thread(target=_answer_read, args=(far,))
        answers.start()
        assert client.read("/b") == b"now"
        answers.join()
        assert client.counts()["waiters"] == client.counts()["watches"] == 0


def _answer_read(far: socket.socket) -> None:
    seen = []
    while Op.READ not in [message.op for message in seen]:
        seen += requests(far)
    for message in seen:
        far.sendall(encode(message.op, message.req_id, message.tx_id, b"now" if message.op == 2 else b"OK\0"))
    undone = [(message.op, message.tx_id) for message in seen if message.op != Op.READ]
    assert undone in (
        [],
        [(Op.UNWATCH, 0), (Op.TRANSACTION_END, 9), (Op.UNWATCH, 0)],
    ), undone


def test_a_flood_of_events_does_not_hold_up_a_deadline() -> None:
    with scripted(0.05) as (client, far):
        stop = threading.Event()

        def flood() -> None:
            while not stop.wait(0.001):
                far.sendall(encode(Op.WATCH_EVENT, 0, 0, b"/a\x007\0"))

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            began = time.monotonic()
            with pytest.raises(DeadlineError):
                client.read("/a")
            assert time.monotonic() - began < 2
        finally:
            stop.set()
            thread.join()


class Interrupting(UnixPipe):
    """Ctrl-C in the middle of a receive, once."""

    armed = False

    def receive(self, timeout: float) -> bytes:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return super().receive(timeout)


def test_an_interrupt_leaves_the_session_right() -> None:
    near, far = socket.socketpair()
    pipe = Interrupting(near)
    with SyncClient(pipe, 5) as client, far:
        far.settimeout(5)
        for action in (
            lambda: client.watch("/w"),
            lambda: client.read("/first"),
            lambda: client.transaction(lambda tx: None),
        ):
            pipe.armed = True
            with pytest.raises(KeyboardInterrupt):
                action()
        late = requests(far)
        far.sendall(
            b"".join(encode(m.op, m.req_id, 0, p) for m, p in zip(late, [b"OK\0", b"x", b"4\0"], strict=True))
        )
        answers = threading.Thread(target=_answer_all, args=(far, seen := []))
        answers.start()
        assert client.read("/second") == b"/second\0"
        assert client.read("/third") == b"/third\0"
        client.close()
        answers.join()
        kinds = [(m.op, m.tx_id) for m in seen if m.op != Op.READ]
        assert kinds == [(Op.UNWATCH, 0), (Op.TRANSACTION_END, 4)]


def _answer_all(far: socket.socket, seen: list[Message]) -> None:
    parser = Parser()
    while data := far.recv(65536):
        for message in parser.feed(data):
            seen.append(message)
            payload = message.payload if message.op == Op.READ else b"OK\0"
            far.sendall(encode(message.op, message.req_id, message.tx_id, payload))


def test_nonsense_ends_the_link() -> None:
    with scripted() as (client, far):
        far.sendall(b"\xff" * 16)
        with pytest.raises((PeerError, LinkDown)):
            client.read("/a")
        assert client.closed


def test_a_store_that_takes_nothing_is_met_by_a_deadline() -> None:
    with scripted(0.02) as (client, _):
        while not client.closed:
            client._submit(calls.write("/a", b"x" * 4000))
            assert client.counts()["unanswered"] < 512
            client._flush()
        with pytest.raises(LinkDown, match="took nothing"):
            client.read("/a")


def test_only_what_started_is_aborted_and_conflicts_are_bounded() -> None:
    with served() as (client, run):
        runs = []

        def collide(tx: sync.Transaction) -> None:
            runs.append(tx.id)
            tx.read("/")
            tx.write("/c", "1")
            client.write("/c", "2")

        client.write("/c", "0")
        with pytest.raises(Conflict, match="after 3 attempts"):
            client.transaction(collide, policy=RetryPolicy(attempts=3, base=0.001, cap=0.002))
        assert len(runs) == 3
        assert client.counts()["transactions"] == 0
        assert (
            run(lambda store: sum(len(conn.transactions) for conn in store.engine.domain(0).connections)) == 0
        )


def test_addresses(tmp_path) -> None:
    with pytest.raises(LinkDown, match="no store at"):
        SyncClient.connect(tmp_path / "none")
    with pytest.raises(UsageError, match="event loop"):
        SyncClient.connect(f"replay:{tmp_path}/none")
    with pytest.raises(UsageError, match="unknown"):
        SyncClient.connect("pigeon:x")


def test_without_an_address_it_looks_where_libxenstore_does(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setenv("XENSTORED_RUNDIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(2)
        with SyncClient.connect() as client:
            assert client.peer == f"xenstored at {tmp_path}/socket"

        async def main() -> None:
            async with await Client.connect() as client:
                assert client.peer == f"xenstored at {tmp_path}/socket"

        asyncio.run(main())


def test_errors_are_by_name() -> None:
    with served() as (client, _):
        with pytest.raises(NoEntry):
            client.read("/none")
        with pytest.raises(StoreError, match="EINVAL"):
            client.read("")


def test_a_unix_transport_meets_a_blocking_client() -> None:
    """Both ends of one socket, of our own making."""

    async def main() -> None:
        a, b = socket.socketpair()
        far = UnixTransport(b)

        class Echo:
            def data_received(self, data: bytes | memoryview) -> None:
                far.send([bytes(data)])

            def connection_lost(self, exc: Exception | None) -> None:
                done.set()

            def drained(self) -> None:
                pass

        done = asyncio.Event()
        far.start(Echo())
        client = SyncClient(UnixPipe(a), 5)
        # An echo is a reply of the same kind: the payload comes back.
        assert await asyncio.to_thread(client.read, "/x") == b"/x\0"
        client.close()
        await asyncio.wait_for(done.wait(), 5)

    asyncio.run(main())
