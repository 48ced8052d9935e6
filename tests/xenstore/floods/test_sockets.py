"""Domain 0's side of too much: a thousand clients, a hundred thousand nodes, readers that stop.

The daemon is a process of its own whose memory is measured; others are served meanwhile, within a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.support.raw_store import RawStore, until
from tests.support.store_process import daemon_process, resident

from xenbus.xenstore.client import Client
from xenbus.xenstore.engine import QUEUE_LIMIT
from xenbus.xenstore.transport.unix import dial
from xenbus.xenstore.wire import Op, encode

pytestmark = pytest.mark.slow
KIB, MIB = 1024, 1024 * 1024
# Seconds that somebody else's request may take on a busy machine, whatever the flood does.
PATIENCE = 2.0
# Clients that the daemon takes (server.MAX_CLIENTS).
CLIENTS = 1024


class Scene:
    """The daemon's process, and one client that only wants to work."""

    def __init__(self, process: subprocess.Popen, path: Path, other: Client) -> None:
        self.process, self.path, self.other = process, path, other
        self.rounds = 0
        self.slowest = 0.0
        self.opened = contextlib.ExitStack()

    async def serve_others(self) -> None:
        """One round of work with known answers; the time it took is kept."""
        self.rounds += 1
        value, began = str(self.rounds), time.monotonic()
        await self.other.write("/other", value)
        assert await self.other.read_str("/other") == value
        await self.other.transaction(lambda tx: tx.write("/other", value + "!"))
        self.slowest = max(self.slowest, time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def others_served(self) -> AsyncIterator[None]:
        """Others work in the background while the block floods."""
        task = asyncio.create_task(self._work())
        before = self.rounds
        try:
            yield
            await until(lambda: self.rounds > before + 1 or task.done(), 10)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert self.slowest < PATIENCE, "others wait"

    async def _work(self) -> None:
        while True:
            await self.serve_others()
            await asyncio.sleep(0.002)

    async def report(self) -> dict[str, int]:
        """Domain 0's counts, as the daemon says."""
        words = (await self.other.control("memreport")).partition("domain 0: ")[2].splitlines()[0].split()
        return dict(zip(words[::2], map(int, words[1::2]), strict=True))

    async def alone(self, clients: int = 1) -> dict[str, int]:
        """The counts once no more than so many clients are left."""
        async with asyncio.timeout(10):
            while (counts := await self.report())["connections"] > clients:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return counts

    def memory(self) -> int:
        return resident(self.process)

    def dial(self) -> socket.socket:
        """A blocking socket, closed with the scene."""
        sock = self.opened.enter_context(dial(str(self.path)))
        sock.settimeout(10)
        return sock

    async def raw(self) -> RawStore:
        return RawStore(self.opened.enter_context((await RawStore.connect(self.path)).sock))


@pytest.fixture
def flood(tmp_path: Path) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    def run(body: Callable[[Scene], Awaitable[None]], says: str = "") -> None:
        async def main(process: subprocess.Popen) -> None:
            path = tmp_path / "socket"
            async with await Client.connect(str(path), timeout=20) as other:
                scene = Scene(process, path, other)
                with scene.opened:
                    await scene.serve_others()
                    await body(scene)
                await scene.alone()
                await scene.serve_others()
                assert await other.control("check") == "OK"

        with daemon_process(tmp_path, says=says) as process:
            asyncio.run(main(process))

    return run


@pytest.fixture
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CLIENTS + 100:
        pytest.skip(f"this process may have {hard} descriptors alone")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CLIENTS + 100), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_clients_and_one_more(flood, descriptors) -> None:
    """Also where a process may usually have 1024 descriptors alone: the daemon asks for more."""

    async def body(scene: Scene) -> None:
        before = scene.memory()
        socks: list[socket.socket] = []

        def connect() -> None:
            for number in range(CLIENTS - 1):  # and `other`
                sock = scene.dial()
                sock.sendall(encode(Op.WRITE, number, 0, b"/n/%d\0%d" % (number, number)))
                socks.append(sock)
            for sock in socks:
                assert sock.recv(100)[-3:] == b"OK\0"

        async with scene.others_served():
            await asyncio.to_thread(connect)
        # A session, its transport, a socket's book-keeping: objects, and no buffer of its own.
        assert scene.memory() - before < CLIENTS * 8 * KIB
        assert (await scene.report())["connections"] == CLIENTS
        late = scene.dial()
        assert late.recv(1) == b"", "turned away, not left waiting"
        socks.pop().close()
        await scene.alone(CLIENTS - 1)
        again = scene.dial()
        again.sendall(encode(Op.READ, 1, 0, b"/n/7\0"))
        assert again.recv(100)[-1:] == b"7"

    flood(body, says=f"xenstored: a client is turned away: {CLIENTS} are connected\n")


def test_a_hundred_thousand_nodes(flood) -> None:
    count, wide = 100_000, 10_000

    async def body(scene: Scene) -> None:
        before, raw = scene.memory(), await scene.raw()

        async def write(paths: list[bytes]) -> None:
            for start in range(0, len(paths), 500):
                some = paths[start : start + 500]
                await raw.send(b"".join(encode(Op.WRITE, 1, 0, path + b"\0value") for path in some))
                assert {reply.op for reply in await raw.receive(len(some))} == {Op.WRITE}

        async with scene.others_served():
            await write([b"/big/%d/%d" % (n // 100, n) for n in range(count)])
        grown = scene.memory() - before
        # A node is an object, a path, a value, and its name in its parent: 0.4 KiB measured.
        assert grown < count * KIB
        async with scene.others_served():
            await write([b"/wide/%d" % n for n in range(wide)])
            assert len(await scene.other.directory("/wide")) == wide
            assert len(await scene.other.directory("/big")) == count // 100
        nodes, full = (await scene.report())["nodes"], scene.memory()
        await scene.other.rm("/wide")
        await scene.other.rm("/big")
        assert nodes - (await scene.report())["nodes"] == count + count // 100 + wide + 2
        await write([b"/big/%d/%d" % (n // 100, n) for n in range(count // 2)])
        assert scene.memory() < full + 2 * MIB, "what was freed is used again"

    flood(body)


def test_paths_as_long_and_deep_as_they_may_be(flood) -> None:
    async def body(scene: Scene) -> None:
        before = scene.memory()
        raw = await scene.raw()
        deep, broad = "/d" * 1024, "/" + "x" * 2047
        async with scene.others_served():
            assert await raw.ask(Op.WRITE, deep, "bottom") == b"OK\0"
            assert await raw.ask(Op.READ, deep) == b"bottom"
            assert await raw.ask(Op.WRITE, broad, "v" * 1000) == b"OK\0"
            assert await raw.ask(Op.DIRECTORY, "/") == b"tool\0other\0d\0" + broad[1:].encode() + b"\0"
            tx = int((await raw.ask(Op.TRANSACTION_START))[:-1])
            assert await raw.ask(Op.RM, deep, tx=tx) == b"OK\0"
            assert await raw.ask(Op.TRANSACTION_END, True, tx=tx) == b"OK\0"
            assert await raw.ask(Op.RM, "/d") == await raw.ask(Op.RM, broad) == b"OK\0"
        # Every node of a deep path has all of its path as its name: half the square of the depth.
        assert scene.memory() - before < 2 * len(deep) * 1024 + 4 * MIB

    flood(body)


def test_half_a_header_for_ever_and_a_byte_now_and_then(flood, descriptors) -> None:
    async def body(scene: Scene) -> None:
        before = scene.memory()
        socks = [scene.dial() for _ in range(500)]
        whole = encode(Op.WRITE, 1, 0, b"/slow\0" + b"x" * 4000)
        for number, sock in enumerate(socks):
            sock.sendall(whole[: (3, 15, 16, 17, 4000)[number % 5]])
        async with scene.others_served():
            for at in range(4000, len(whole)):
                for sock in socks[4::5]:
                    sock.sendall(whole[at : at + 1])
                await asyncio.sleep(0)
        assert [sock.recv(100)[-3:] for sock in socks[4::5]] == [b"OK\0"] * 100, "slow is not wrong"
        # What is incomplete is kept: a message each, and the connections.
        assert scene.memory() - before < len(socks) * 16 * KIB

    flood(body)


def test_clients_that_ask_and_never_read(flood) -> None:
    async def body(scene: Scene) -> None:
        await scene.other.write("/big", b"x" * 4000)
        before = scene.memory()
        question = encode(Op.READ, 1, 0, b"/big\0") * 4000
        deaf = [scene.dial() for _ in range(20)]
        for sock in deaf:
            sock.setblocking(False)
        async with scene.others_served():
            stuck = 0
            while stuck < 40:  # twice in a row, all of them
                for sock in deaf:
                    try:
                        sock.send(question)
                        stuck = 0
                    except BlockingIOError:
                        stuck += 1
                await asyncio.sleep(0.01)
        # For each: one turn's replies (256 of 4 KiB), requests taken in, a portion on its way.
        assert scene.memory() - before < len(deaf) * 2 * MIB + 4 * MIB
        for sock in deaf:
            sock.close()
        assert (await scene.alone())["queued"] == 0

    flood(body)


def test_a_storm_of_events_for_a_reader_that_stopped(flood) -> None:
    """Different events cannot be merged: past the limit of a queue the reader is given up, and said so."""

    async def body(scene: Scene) -> None:
        before = peak = scene.memory()
        deaf = await scene.raw()
        assert await deaf.ask(Op.WATCH, "/storm", "t" * 3500) == b"OK\0"
        async with scene.others_served():
            number = 0
            while (await scene.report())["watches"]:
                assert number < 20_000, "it was never given up"
                names = range(number, number + 500)
                await asyncio.gather(*(scene.other.write(f"/storm/{n}", b"") for n in names))
                number += 500
                peak = max(peak, scene.memory())
        assert peak - before < 2 * QUEUE_LIMIT, "its queue, and the portion that is handed over"
        assert await deaf.ended()

    flood(body, says=r"xenstored: a client on the socket does not read: dropped with \d+ bytes waiting\n")


def test_watches_and_transactions_without_end(flood) -> None:
    """Domain 0 has no quota: what it opens costs what it costs, others are served, it goes with its owner."""
    count = 10_000

    async def body(scene: Scene) -> None:
        before = await scene.report()
        memory = scene.memory()
        async with await Client.connect(str(scene.path), timeout=30) as greedy:
            heard: list[str] = []
            async with scene.others_served():
                for _ in range(0, count, 500):
                    await asyncio.gather(*(greedy.watch("/hot", heard.append) for _ in range(500)))
                await scene.other.write("/hot", "1")
                await until(lambda: len(heard) == 2 * count)
            raw = await scene.raw()
            async with scene.others_served():
                request = encode(Op.TRANSACTION_START, 1, 0, b"\0")
                for _ in range(20):
                    await raw.send(request * 100)
                    await raw.receive(100)
                for tx in range(1, 2001, 100):
                    writes = (encode(Op.WRITE, 1, n, b"/hot/%d\0" % n) for n in range(tx, tx + 100))
                    await raw.send(b"".join(writes))
                    await raw.receive(100)
            assert 2000 <= (await scene.report())["transactions"] <= 2001, "and one of the other's at most"
            assert (await scene.report())["watches"] == count
            raw.close()
            # A watch is an object in two tables, a transaction an overlay of three nodes.
            assert scene.memory() - memory < count * KIB + 2000 * 4 * KIB
        after = await scene.alone()
        assert (after["watches"], after["transactions"]) == (0, 0)
        assert after["memory"] - before["memory"] < 100, "/hot alone"

    flood(body)
