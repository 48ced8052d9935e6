"""Our clients on everybody's daemons, by the same operations: Debian's xenstored and oxenstored, and ours.
And what becomes of whoever waits when the daemon is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.store_links import Listener, Threaded
from tests.support.xenstored import DEADLINE, KINDS, Xenstored, needs, start
from tests.xenstore.peers.conftest import served

from xenbus.errors import Conflict, Denied, LinkDown, NoEntry, StoreError
from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient

MARKS = [pytest.param(kind, marks=needs(kind)) for kind in KINDS]


@pytest.fixture(scope="module", params=MARKS)
def daemon(request: pytest.FixtureRequest) -> Iterator[Xenstored]:
    with served(request.param) as daemon:
        yield daemon


@asynccontextmanager
async def asyncio_client(daemon: Xenstored) -> AsyncIterator[Any]:
    async with await Client.connect(str(daemon.socket), timeout=DEADLINE) as client:
        yield client


@asynccontextmanager
async def blocking_client(daemon: Xenstored) -> AsyncIterator[Any]:
    with SyncClient.connect(str(daemon.socket), timeout=DEADLINE) as client:
        yield Threaded(client)


CLIENTS = {"asyncio": asyncio_client, "blocking": blocking_client}


@pytest.fixture(params=CLIENTS)
def ask(
    request: pytest.FixtureRequest, daemon: Xenstored
) -> Callable[[Callable[[Any], Awaitable[None]]], None]:
    """`ask(body)` runs `body(client)`; afterwards nothing is held, and /peers is gone."""

    def run(body: Callable[[Any], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(20), CLIENTS[request.param](daemon) as client:
                await body(client)
                await client.rm("/peers") if await client.exists("/peers") else None
                assert set(client.counts().values()) == {0}

        asyncio.run(main())

    return run


def test_nodes(ask) -> None:
    async def body(client: Any) -> None:
        await client.write("/peers/a/b", b"\x00\xff\n")
        assert await client.read("/peers/a/b") == b"\x00\xff\n"
        assert await client.read("/peers/a") == b""
        await client.write("/peers/text", "täxt")
        assert await client.read_str("/peers/text") == "täxt"
        await client.mkdir("/peers/a/b")
        assert await client.read("/peers/a/b") == b"\x00\xff\n", "it keeps its value"
        await client.mkdir("/peers/dir")
        assert sorted(await client.directory("/peers")) == ["a", "dir", "text"]
        assert await client.exists("/peers/dir")
        await client.rm("/peers/a")
        assert not await client.exists("/peers/a/b")
        await client.rm("/peers/missing")
        for call in (client.read, client.directory, client.get_perms):
            with pytest.raises(NoEntry):
                await call("/peers/missing")
        with pytest.raises(NoEntry):
            await client.rm("/peers/missing/below")
        await client.write("/peers/long", b"x" * 2000)
        assert await client.read("/peers/long") == b"x" * 2000
        await client.write("/peers/empty", b"")
        assert await client.read("/peers/empty") == b""

    ask(body)


def test_long_lists(ask) -> None:
    """More than a reply holds: in parts, or as oxenstored does it, in one that is too long."""

    async def body(client: Any) -> None:
        names = [f"child-{number:04d}" for number in range(700)]
        await client.transaction(lambda tx: _make(tx, names))
        assert sorted(await client.directory("/peers/many")) == names

    async def _make(tx: Any, names: list[str]) -> None:
        for name in names:
            await tx.mkdir(f"/peers/many/{name}")

    ask(body)


def test_permissions(ask) -> None:
    async def body(client: Any) -> None:
        await client.write("/peers/p", "1")
        assert [str(one) for one in await client.get_perms("/peers/p")] == ["n0"]
        await client.set_perms("/peers/p", ["n0", "r0", "b0"])
        assert [str(one) for one in await client.get_perms("/peers/p")] == ["n0", "r0", "b0"]
        with pytest.raises(StoreError):
            await client.set_perms("/peers/missing", ["n0"])

    ask(body)


def test_watches(ask) -> None:
    async def body(client: Any) -> None:
        listener = await Listener.on(client, "/peers/w")
        assert await listener.next() == "/peers/w"
        await client.write("/peers/w/x", "1")
        assert await listener.next() == "/peers/w/x"
        await client.rm("/peers/w")
        assert await listener.next() == "/peers/w"
        await listener.close()
        special = await Listener.on(client, "@releaseDomain")
        assert await special.next() == "@releaseDomain"
        await special.close()

    ask(body)


def test_transactions(ask, daemon: Xenstored) -> None:
    async def body(client: Any) -> None:
        async def add(tx: Any) -> int:
            value = int(await tx.read("/peers/n")) if await tx.exists("/peers/n") else 0
            await tx.write("/peers/n", str(value + 1))
            return value + 1

        assert [await client.transaction(add) for _ in range(3)] == [1, 2, 3]
        runs = 0

        async def disturbed(tx: Any) -> None:
            nonlocal runs
            runs += 1
            await tx.read("/peers/n")
            if runs < 3:
                daemon.toolstack.write("/peers/n", str(10 * runs))
            await tx.write("/peers/n", "end")

        await client.transaction(disturbed)
        assert (runs, await client.read("/peers/n")) == (3, b"end")

        async def always(tx: Any) -> None:
            # Another value each time: the same one again is none to oxenstored.
            value = await tx.read("/peers/n")
            daemon.toolstack.write("/peers/n", value + b"x")
            await tx.write("/peers/n", "y")

        with pytest.raises(Conflict):
            await client.transaction(always, attempts=3)

        async def given_up(tx: Any) -> None:
            await tx.write("/peers/n", "never")
            raise KeyError

        with pytest.raises(KeyError):
            await client.transaction(given_up)
        assert await client.read("/peers/n") == b"endxxx"

    ask(body)


def test_several_at_once(ask) -> None:
    async def body(client: Any) -> None:
        for number in range(40):
            await client.write(f"/peers/g/{number}", str(number))
        wanted = {str(number): int for number in range(40)}
        assert await client.gather("/peers/g", wanted) == {str(number): number for number in range(40)}
        assert await client.gather("/peers/g", {"none": bytes}, {"none": b"?"}) == {"none": b"?"}
        if isinstance(client, Client):
            values = await asyncio.gather(*(client.read(f"/peers/g/{number % 40}") for number in range(2000)))
            assert values == [b"%d" % (number % 40) for number in range(2000)]

    ask(body)


def test_domains(ask, daemon: Xenstored) -> None:
    async def body(client: Any) -> None:
        assert await client.get_domain_path(7) == "/local/domain/7"
        assert not await client.is_introduced(7)
        with SyncClient(daemon.introduce(7), DEADLINE) as guest:
            assert await client.is_introduced(7)
            guest.write("data", "of a guest")
            assert await client.read("/local/domain/7/data") == b"of a guest"
            assert [str(one) for one in await client.get_perms("/local/domain/7/data")] == ["n7"]
            await client.write("/peers/secret", "1")
            with pytest.raises(Denied):
                guest.read("/peers/secret")
            with pytest.raises(Denied):
                guest.introduce(8, 1, 1)
            await client.resume_domain(7)
            await client.set_target(7, 0)
            assert guest.read("/peers/secret") == b"1"
            heard = await Listener.on(client, "@releaseDomain")
            assert await heard.next() == "@releaseDomain"
            await client.release(7)
            assert await heard.next() == "@releaseDomain"
            await heard.close()
        assert not await client.is_introduced(7)
        with pytest.raises(StoreError):
            await client.release(7)

    ask(body)


def test_reset_and_control(ask) -> None:
    async def body(client: Any) -> None:
        listener = await Listener.on(client, "/peers/r")
        assert await listener.next() == "/peers/r"
        await client.reset_watches()
        assert client.counts()["watches"] == 0
        assert await client.control("print", "hello") in ("OK", "")

    ask(body)


# ---- killed in the middle of a request ----

REAL = [pytest.param(kind, marks=needs(kind)) for kind in ("c", "o")]


@pytest.mark.parametrize("kind", REAL)
def test_killed_under_everybody_who_waits(kind: str, tmp_path: Path) -> None:
    """Stopped first, so that every request is under way; then kill -9. Nobody waits for a deadline."""
    with start(kind, tmp_path / "d", hurry=1000) as daemon:
        process = daemon.process  # type: ignore[attr-defined]

        async def main() -> float:
            async with await Client.connect(str(daemon.socket), timeout=60) as client:
                await client.write("/a", "1")
                lost: list[Exception] = []
                client.on_lost(lost.append)
                waiting = asyncio.create_task(client.wait_for("/a", lambda value: value == b"2", 60))
                await asyncio.sleep(0.01)
                os.kill(process.pid, signal.SIGSTOP)
                tasks = [
                    *(asyncio.create_task(client.read(f"/{number}")) for number in range(300)),
                    asyncio.create_task(client.transaction(lambda tx: tx.read("/a"))),
                    asyncio.create_task(client.watch("/b", lambda path: None)),
                    waiting,
                ]
                blocking = threading.Thread(target=_blocked, args=(daemon, outcome))
                blocking.start()
                await asyncio.sleep(0.05)
                process.kill()
                began = time.monotonic()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(result) for result in results} == {LinkDown}
                assert len(lost) == 1
                await asyncio.to_thread(blocking.join, DEADLINE)
                return time.monotonic() - began

        outcome: list[object] = []
        with SyncClient(daemon.connect(), 60) as client:
            outcome.append(client)
            took = asyncio.run(main())
        assert took < 2
        assert [type(one) for one in outcome[1:]] == [LinkDown]


def _blocked(daemon: Xenstored, outcome: list[Any]) -> None:
    try:
        outcome.append(outcome[0].read("/a"))
    except Exception as error:  # noqa: BLE001
        outcome.append(error)
