"""Stores that are killed and come back, real processes: nobody waits for ever, nothing is missed unsaid."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import xenstored
from tests.support.store_links import Store
from tests.support.until import until

from xenbus.errors import LinkDown, StoreError, UsageError
from xenbus.xenstore import calls
from xenbus.xenstore.client import Client
from xenbus.xenstore.image import Change
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.unix import UnixPipe
from xenbus.xenstore.wire import Op, Parser, encode

SOON = Reconnect(base=0.01, cap=0.05, deadline=20)
KINDS = ["ours", pytest.param("c", marks=xenstored.needs("c")), pytest.param("o", marks=xenstored.needs("o"))]


def once(end: Any) -> Callable[[], Any]:
    """Dials this end; the next time there is nobody."""
    ends = [end]

    def dial() -> Any:
        if not ends:
            raise LinkDown("nobody there")
        return ends.pop()

    return dial


class Mortal:
    """A daemon that dies and is started anew; `address` leads to the living one. A process, which is killed
    with SIGKILL; where its death is not what is tested, ours in a thread ("thread")."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.address = str(folder / "address")
        self.lives = 0
        self.process: Any = None
        self.daemon: Any = None

    def start(self) -> None:
        self.lives += 1
        place = self.folder / str(self.lives)
        if self.kind == "ours":
            place.mkdir()
            socket = place / "socket"
            reading, writing = os.pipe()
            command = [sys.executable, "-m", "xenbus.xenstore.daemon", "--socket", str(socket)]
            self.process = subprocess.Popen([*command, "--ready-fd", str(writing)], pass_fds=[writing])
            os.close(writing)
            with os.fdopen(reading, "rb") as ready:
                assert ready.read() == b"ready\n"
        else:
            self.daemon = xenstored.start("ours" if self.kind == "thread" else self.kind, place)
            self.process, socket = getattr(self.daemon, "process", None), self.daemon.socket
        link = self.folder / "new"
        link.symlink_to(socket)
        link.rename(self.address)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(5)
        if self.daemon is not None:
            self.daemon.stop()
        self.process = self.daemon = None


@pytest.fixture(params=KINDS)
def mortal(request) -> Iterator[Mortal]:
    with tempfile.TemporaryDirectory(prefix="xb-") as folder:
        store = Mortal(request.param, Path(folder))
        store.start()
        try:
            yield store
        finally:
            store.kill()


def test_it_is_lost_and_comes_back(mortal: Mortal) -> None:
    async def main() -> None:
        told: list[str] = []
        client = await Client.connect(mortal.address, timeout=10, reconnect=SOON)
        client.on_lost(lambda why: told.append("lost"))
        client.on_reconnected(lambda: told.append("back"))
        await client.write("/a/b", "1")
        heard: asyncio.Queue[Any] = asyncio.Queue()
        watch = await client.watch("/a", heard.put_nowait)
        assert (await heard.get()).first

        async def during(tx: Any) -> None:
            await tx.write("/a/b", "2")
            await asyncio.to_thread(mortal.kill)
            await tx.read("/a/b")

        async with client.events("/a/b") as events:
            assert (await anext(events)).first
            waiting = asyncio.create_task(client.wait_for("/ready", lambda value: value == b"1", 20))
            with pytest.raises(LinkDown):
                await client.transaction(during)
            reads = [client.read("/a/b") for _ in range(600)]
            async with asyncio.timeout(2):
                outcomes = await asyncio.gather(*reads, client.watch("/x", print), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {LinkDown}
            assert not client.connected and not client.closed and told == ["lost"]
            assert not waiting.done()

            await asyncio.to_thread(mortal.start)
            async with asyncio.timeout(10):
                event = await heard.get()
                assert (event, event.resync, event.first) == ("/a", True, False)
                event = await anext(events)
                assert (event, event.resync) == ("/a/b", True)
                await until(lambda: told == ["lost", "back"])
                await client.write("/a/b", "3")
                assert await heard.get() == "/a/b" and not (await anext(events)).resync
                await client.write("/ready", "1")
                assert await waiting == b"1"
            batch = client.batch()
            batch.write("/a/b", "4")
            await batch.commit()
        await watch.close()
        await client.read("/")
        assert set(client.counts().values()) == {0}
        await client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_blocking_caller_finds_it_again(mortal: Mortal) -> None:
    told: list[str] = []
    with SyncClient.connect(mortal.address, timeout=10, reconnect=SOON) as client:
        client.on_lost(lambda why: told.append("lost"))
        client.on_reconnected(lambda: told.append("back"))
        watch = client.watch("/a")
        assert client.poll_watch(5) == (watch, "/a")

        def during(tx: Any) -> None:
            tx.write("/a", "2")
            mortal.kill()
            mortal.start()
            tx.read("/a")

        with pytest.raises(LinkDown):
            client.transaction(during)
        assert not client.closed and told == ["lost"]
        client.write("/a", "1")
        assert told == ["lost", "back"]
        found = client.poll_watch(5)
        assert found is not None and found[0] is watch and found[1].resync
        # The write's own event is equal to it, if it came before that one was taken.
        assert client.poll_watch(0) in (None, (watch, "/a"))
        client.read("/")
        assert client.poll_watch(0) is None
        done = threading.Event()

        def kill() -> None:
            mortal.kill()
            mortal.start()
            done.wait(20)  # Debian's end with the thread that started them

        killer = threading.Timer(0.05, kill)
        killer.start()
        found = client.poll_watch(10)
        while found is not None and not found[1].resync:
            found = client.poll_watch(10)
        assert found is not None
        watch.close()
        client.read("/")
        assert set(client.counts().values()) == {0}
        done.set()
        killer.join()


@pytest.mark.parametrize("mortal", ["thread"], indirect=True)
def test_whatever_the_first_call_is_it_connects_again(mortal: Mortal) -> None:
    with (
        SyncClient.connect(mortal.address, timeout=10, reconnect=SOON) as client,
        client.mirror("/m") as mirror,
    ):

        def again() -> None:
            mortal.kill()
            mortal.start()
            with pytest.raises(LinkDown):
                client.read("/")  # finds out
            assert not client.connected

        again()
        watch = client.watch("/w")
        assert client.poll_watch(5) == (watch, "/w")
        again()
        batch = client.batch()
        batch.write("/m/a", "1")
        batch.commit()
        assert mirror.synced() == [Change("/m", b""), Change("/m/a", b"1")]
        again()
        assert [change.gone for change in mirror.update(5)] == [True, True]
        assert dict(mirror) == {}
        again()
        assert client.wait_for("/", lambda value: value == b"", 5) == b""
        again()
        reply = client.submit(calls.write("/w", "1"))
        while not reply.done:
            client.process()
        assert reply.result() is None
        assert client.transaction(lambda tx: tx.read("/w")) == b"1"

        calls_made = 0

        def lose(tx: Any) -> None:
            nonlocal calls_made
            calls_made += 1
            mortal.kill()
            mortal.start()
            try:
                tx.read("/w")
            except LinkDown:
                client.read("/")  # stands again; the transaction does not
            tx.read("/w")

        with pytest.raises(LinkDown, match="was lost with its connection"):
            client.transaction(lose)
        assert calls_made == 1
        while client.poll_watch(0) is not None:
            pass
        mortal.kill()
        with pytest.raises(LinkDown):
            client.read("/")
        assert not client.closed
        began = time.monotonic()
        with pytest.raises(LinkDown, match="not there again yet"):
            client.poll_watch(0.05)
        assert time.monotonic() - began < 5
        mortal.start()
        assert mirror.synced() == []
        watch.close()
    assert client.closed and set(client.counts().values()) == {0}


def test_a_store_that_is_lost_while_a_blocking_wait_looks_and_stays_away() -> None:
    """The wait ends when its own time does, not when the store is given up."""
    near, far = socket.socketpair()
    dial = once(UnixPipe(near, "a store"))

    def serve() -> None:
        parser = Parser()
        with far:
            while data := far.recv(4096):
                for message in parser.feed(data):
                    if message.op != Op.WATCH:
                        return
                    event = encode(Op.WATCH_EVENT, 0, 0, message.payload)
                    far.sendall(encode(Op.WATCH, message.req_id, 0, b"OK\0") + event)

    thread = threading.Thread(target=serve)
    thread.start()
    with SyncClient.connect(dial, timeout=10, reconnect=Reconnect(base=0.2, cap=0.2, deadline=20)) as client:
        with pytest.raises(LinkDown, match="not there again yet"):
            client.wait_for("/a", lambda value: False, 0.5)
        assert not client.closed
    thread.join(5)


def test_a_store_that_stays_away_is_given_up() -> None:
    async def main() -> None:
        near, far = memory_pair()
        dial = once(near)

        lost: list[tuple[bool, str]] = []
        client = await Client.connect(dial, reconnect=Reconnect(base=0.001, cap=0.01, deadline=0.1))
        client.on_lost(lambda why: lost.append((client.closed, str(why))))
        far.close()
        await until(lambda: client.closed)
        assert [closed for closed, _ in lost] == [False, True]
        assert "was not there again within 0.1 s" in lost[1][1] and "nobody there" in lost[1][1]
        with pytest.raises(LinkDown, match="nobody there"):
            await client.read("/a")
        client.on_lost(lambda why: lost.append((client.closed, str(why))))
        assert len(lost) == 3
        await client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_events_and_waits_end_when_it_is_given_up() -> None:
    async def main() -> None:
        store = Store()
        near, served = store.transport("memory")
        dial = once(near)

        client = await Client.connect(dial, reconnect=Reconnect(base=0.001, cap=0.01, deadline=0.05))
        async with client.events("/e") as events:
            await anext(events)
            waiting = asyncio.create_task(client.wait_for("/w", lambda value: False, 20))
            await until(lambda: len(served.conn.watches) == 2)
            served.transport.close()
            async with asyncio.timeout(5):
                with pytest.raises(LinkDown, match="was not there again"):
                    await anext(events)
                with pytest.raises(LinkDown):
                    await waiting
        await client.close()
        await store.close()

    asyncio.run(main())


def test_a_watch_that_is_refused_afterwards_is_said() -> None:
    async def main() -> None:
        store = Store()
        dom0, _ = await store.link("memory")
        dial, sessions = store.dialled(5)
        client = await Client.connect(dial, reconnect=SOON)
        async with client.events("a") as first, client.events("b") as second, client.events("c") as third:
            for events in (first, second, third):
                assert (await anext(events)).first
            store.engine.domain(5).quotas.set("watches", 1)
            sessions[0].transport.close()
            async with asyncio.timeout(5):
                assert (await anext(first)).resync
                refused = 0
                for events in (second, third):
                    try:
                        assert (await anext(events)).resync
                    except LinkDown as exc:
                        assert isinstance(exc.__cause__, StoreError)
                        refused += 1
            assert refused
            assert client.counts()["watches"] == 3 - refused
        await client.close()
        await dom0.close()
        await store.close()

    asyncio.run(main())


def test_closing_while_it_is_away() -> None:
    async def main() -> None:
        near, far = memory_pair()
        dial = once(near)

        lost: list[Exception] = []
        client = await Client.connect(dial, reconnect=SOON)
        client.on_lost(lost.append)
        far.close()
        await until(lambda: bool(lost))
        await client.close()
        assert client.closed and len(lost) == 1
        with pytest.raises(LinkDown, match="closed here"):
            await client.read("/")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_only_what_can_be_dialled_can_be_dialled_again() -> None:
    async def main() -> None:
        near, _ = memory_pair()
        with pytest.raises(UsageError, match="cannot be made again"):
            await Client.connect(near, reconnect=SOON)

    asyncio.run(main())


def test_pauses_grow_are_random_and_end() -> None:
    policy = Reconnect(base=1, cap=10, deadline=60)
    assert [policy.pause(n, 0, 1.0) for n in range(5)] == [1, 2, 4, 8, 10]
    assert policy.pause(3, 0, 0.0) == 4
    assert policy.pause(9, 57, 1.0) == 3
    assert policy.pause(9, 60, 0.0) is None
