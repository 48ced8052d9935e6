"""The blocking client in somebody else's loop: nothing waits, whatever the store does."""

from __future__ import annotations

import asyncio
import selectors
import socket
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from tests.support.store_links import blocking_ring
from tests.support.xenstored import Xenstored, needs, start

from xenbus.errors import DeadlineError, LinkDown, NoEntry, UsageError
from xenbus.xenstore import calls
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.unix import UnixPipe
from xenbus.xenstore.wire.message import Op, Parser, encode


def loop(client: SyncClient, until: Callable[[], object], seconds: float = 10) -> int:
    """Somebody's loop; how often it went round."""
    end, rounds = time.monotonic() + seconds, 0
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        while not until():
            assert time.monotonic() < end
            left = client.process()
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.wants_write else 0)
            selector.modify(client, wanted)
            if not until():
                selector.select(min(left, end - time.monotonic()))
            rounds += 1
    return rounds


@pytest.fixture(params=["ours", pytest.param("c", marks=needs("c"))])
def daemon(request, tmp_path_factory) -> Any:
    with start(request.param, tmp_path_factory.mktemp("d")) as daemon:
        yield daemon


def test_requests_and_events_in_a_selectors_loop(daemon: Xenstored) -> None:
    with SyncClient.connect(daemon.socket, timeout=10) as client:
        heard: list[str] = []
        watch = client.watch("/a", heard.append)
        silent = client.watch("/b")
        seen: list[Any] = []
        client.submit(calls.write("/a/x", "1"), seen.append)
        value = client.submit(calls.read("/a/x"), seen.append)
        missing = client.submit(calls.read("/a/none"), seen.append)
        with pytest.raises(UsageError):
            value.result()
        assert not value.done and client.wants_write
        rounds = loop(client, lambda: missing.done)
        assert rounds < 50
        assert value.result() == b"1" and len(seen) == 3 and seen[1] is value
        assert isinstance(missing.error, NoEntry)
        with pytest.raises(NoEntry):
            missing.result()
        loop(client, lambda: "/a/x" in heard)
        assert heard[0] == "/a"
        daemon.toolstack.write("/a/y", "")
        daemon.toolstack.write("/b/y", "")
        loop(client, lambda: "/a/y" in heard and len(client._events) == 2)
        assert [client.poll_watch(0), client.poll_watch(0)] == [(silent, "/b"), (silent, "/b/y")]
        # Both ways of asking, one after the other.
        later = client.submit(calls.read("/a/x"))
        assert client.read("/a/y") == b"" and later.result() == b"1"
        watch.close()
        silent.close()
        assert set(client.counts().values()) == {0}
        assert client.process() == inf


def test_a_store_that_takes_nothing_holds_nobody_up() -> None:
    near, far = socket.socketpair()
    with SyncClient(UnixPipe(near), timeout=20) as client, far:
        replies = [client.submit(calls.write("/a", b"x" * 4000)) for _ in range(600)]
        client.process()
        client.process()
        assert client.wants_write and client._rest
        # It begins to take what it was sent: nothing was lost or torn.
        parser, count = Parser(), 0
        while count < 600:
            for message in parser.feed(far.recv(1 << 16)):
                count += 1
                assert message.payload == b"/a\0" + b"x" * 4000
                far.send(encode(Op.WRITE, message.req_id, 0, b"OK\0"))
            client.process()
        loop(client, lambda: all(reply.done for reply in replies))
        assert [reply.error for reply in replies] == [None] * 600
        assert not client.wants_write


def test_what_is_not_answered_ends_by_its_deadline() -> None:
    near, far = socket.socketpair()
    with SyncClient(UnixPipe(near), timeout=0.05) as client, far:
        reply = client.submit(calls.read("/a"))
        assert 0 < client.process() <= 0.05
        loop(client, lambda: reply.done)
        assert isinstance(reply.error, DeadlineError)


def test_a_dead_store_fails_what_was_submitted() -> None:
    near, far = socket.socketpair()
    with SyncClient(UnixPipe(near)) as client:
        replies = [client.submit(calls.read("/a"), lambda reply: 1 / 0) for _ in range(3)]
        client.process()
        far.close()
        with pytest.raises(LinkDown):
            loop(client, lambda: False)
        assert all(isinstance(reply.error, LinkDown) for reply in replies)
        with pytest.raises(LinkDown):
            client.process()
        late = client.submit(calls.read("/a"))
        assert isinstance(late.error, LinkDown)


def test_a_blocking_call_sends_what_process_could_not() -> None:
    near, far = socket.socketpair()
    with SyncClient(UnixPipe(near), timeout=10) as client, far:
        for _ in range(100):
            client.submit(calls.write("/a", b"x" * 4000))
        client.process()
        assert client._rest

        def serve() -> None:
            parser, count = Parser(), 0
            while count < 101:
                for message in parser.feed(far.recv(65536)):
                    count += 1
                    payload = b"v" if message.op == Op.READ else b"OK\0"
                    far.sendall(encode(message.op, message.req_id, 0, payload))

        thread = threading.Thread(target=serve)
        thread.start()
        assert client.read("/b") == b"v"
        thread.join(10)


def test_a_transport_without_a_descriptor_says_so() -> None:
    async def main() -> None:
        pipe, _ = blocking_ring()
        client = SyncClient(pipe)
        for use in (client.fileno, client.process):
            with pytest.raises(UsageError, match="no descriptor"):
                use()
        client.close()

    asyncio.run(main())
