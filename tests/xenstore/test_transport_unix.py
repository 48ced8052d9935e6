"""Sockets and the in-process pair: partial writes, back-pressure, ends; and how addresses are understood."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xenbus.errors import LinkDown, UsageError
from xenbus.xenstore import transport
from xenbus.xenstore.client import Client
from xenbus.xenstore.transport import Busy
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.unix import UnixPipe, UnixTransport, dial


class Sink:
    def __init__(self, end: Any) -> None:
        self.data = bytearray()
        self.lost: list[Exception | None] = []
        self.drains = 0
        self.changed = asyncio.Event()
        end.start(self)

    def data_received(self, data: bytes | memoryview) -> None:
        self.data += data
        self.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.changed.set()

    def drained(self) -> None:
        self.drains += 1
        self.changed.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def pair(kind: str) -> tuple[Any, Any]:
    if kind == "memory":
        return memory_pair()
    a, b = socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return UnixTransport(a), UnixTransport(b)


@pytest.mark.parametrize("kind", ["unix", "memory"])
def test_what_the_other_end_does_not_take_waits(kind: str) -> None:
    async def main() -> None:
        near, far = pair(kind)
        at_near, at_far = Sink(near), Sink(far)
        far.pause(True)
        far.pause(True)
        messages = [bytes([n % 251]) * 1000 for n in range(500)]
        near.send(messages[:400])
        near.send(messages[400:])
        for _ in range(5):
            await asyncio.sleep(0)
        assert near.backlog > 300_000
        assert at_near.drains == 0
        assert at_far.data == b""
        far.pause(False)
        await at_near.until(lambda: at_near.drains)
        await at_far.until(lambda: len(at_far.data) == 500_000)
        assert bytes(at_far.data) == b"".join(messages)
        assert near.backlog == 0
        near.close()
        far.close()
        await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["unix", "memory"])
def test_the_end_is_told_once_to_both_and_after_the_last_bytes(kind: str) -> None:
    async def main() -> None:
        near, far = pair(kind)
        at_near, at_far = Sink(near), Sink(far)
        near.send([b"last words"])
        await asyncio.sleep(0)
        near.close()
        near.close()
        near.send([b"nobody hears"])
        near.pause(True)
        await at_far.until(lambda: at_far.lost)
        assert at_far.data == b"last words"
        assert isinstance(at_far.lost[0], LinkDown)
        far.send([b"nobody hears"])
        far.close()
        await asyncio.sleep(0)
        assert at_near.lost == [None]
        assert len(at_far.lost) == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["unix", "memory"])
def test_what_was_sent_before_the_start_arrives(kind: str) -> None:
    async def main() -> None:
        near, far = pair(kind)
        near.send([b"x" * 100_000])
        at_near = Sink(near)
        at_far = Sink(far)
        await at_far.until(lambda: len(at_far.data) == 100_000)
        await at_near.until(lambda: near.backlog == 0)
        near.close()
        far.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_reset_is_told_as_what_it_was() -> None:
    async def main() -> None:
        near, far = pair("unix")
        sink = Sink(near)
        far.close()  # never started: it is closed, and that is all
        near.send([b"x"])
        await sink.until(lambda: sink.lost)
        assert isinstance(sink.lost[0], (BrokenPipeError, ConnectionResetError, LinkDown))

    asyncio.run(main())


def test_what_waits_is_not_overtaken() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        transport = UnixTransport(near)
        sink = Sink(transport)
        transport.send([b"a" * 1_000_000])
        first = transport.backlog
        assert first
        while True:  # room, and the loop has had no chance to notice
            try:
                far.recv(1 << 20)
            except BlockingIOError:
                break
        transport.send([b"b"])
        assert transport.backlog == first + 1
        received = bytearray()
        async with asyncio.timeout(5):
            while not sink.drains or not received.endswith(b"b"):
                try:
                    received += far.recv(1 << 20)
                except BlockingIOError:
                    await asyncio.sleep(0)
        assert received == b"a" * first + b"b"
        transport.close()
        far.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_what_was_lost_before_the_start_is_told_at_the_start() -> None:
    async def main() -> None:
        near, far = pair("unix")
        far.close()
        near.send([b"x"])
        sink = Sink(near)
        await sink.until(lambda: sink.lost)
        assert isinstance(sink.lost[0], BrokenPipeError)

    asyncio.run(main())


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left() -> None:
    async def main() -> None:
        near, far = pair("unix")
        Sink(near)
        near.close()
        far.close()
        await asyncio.sleep(0)

    before = _descriptors()
    asyncio.run(main())
    assert _descriptors() == before


def test_a_blocking_pipe_keeps_its_time() -> None:
    near, far = socket.socketpair()
    pipe = UnixPipe(near, "somebody")
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="somebody sent nothing"):
        pipe.receive(0.01)
    assert time.monotonic() - before >= 0.01
    with pytest.raises(TimeoutError, match="somebody sent nothing"):
        pipe.receive(-1)
    with pytest.raises(TimeoutError, match="took nothing"):
        pipe.send([b"x" * 1_000_000], 0.01)
    far.send(b"abc")
    assert pipe.receive(5) == b"abc"
    far.close()
    pipe.close()
    pipe.close()


# ---- addresses ----


def test_a_path_alone_is_what_it_is(tmp_path) -> None:
    assert transport.resolve(tmp_path / "socket")[0].name == "unix"
    assert transport.resolve("/dev/null")[0].name == "device"
    assert transport.resolve("/odd:name")[0].name == "unix"
    assert transport.resolve("unix:/a:b") == (transport.resolve("unix:x")[0], "/a:b")


@pytest.mark.parametrize("address", ["pigeon:/x", "_stream:x", "a.b:x", ":x"])
def test_an_unknown_scheme_is_our_callers_fault(address: str) -> None:
    with pytest.raises(UsageError, match="no transport"):
        transport.resolve(address)


def test_a_scheme_is_one_registration(monkeypatch) -> None:
    monkeypatch.setattr(transport, "_SCHEMES", dict(transport._SCHEMES))
    near, far = memory_pair()
    transport.register("carrier", lambda rest: near if rest == "dove" else far)
    scheme, rest = transport.resolve("carrier:dove")
    assert scheme.connect(rest) is near
    assert scheme.blocking is None


def test_where_libxenstore_looks(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setenv("XENSTORED_RUNDIR", str(tmp_path))
    assert transport.default_address() == "/dev/xen/xenbus"
    (tmp_path / "socket").touch()
    assert transport.default_address() == str(tmp_path / "socket")
    monkeypatch.setenv("XENSTORED_PATH", "/elsewhere")
    assert transport.default_address() == "/elsewhere"


def test_a_queue_that_is_full_does_not_hang_the_caller(tmp_path) -> None:
    """A daemon that accepts nobody: connect must not wait for ever in the kernel, nor stop the loop."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as held:
        listener.bind(path)
        listener.listen(0)
        with pytest.raises(Busy, match="nobody accepts"):
            while True:
                held.enter_context(dial(path, 0.02))

        async def main() -> None:
            connecting = asyncio.create_task(Client.connect(path, timeout=5))
            began = time.monotonic()
            await asyncio.sleep(0.03)
            assert time.monotonic() - began < 0.5
            assert not connecting.done()
            listener.accept()[0].close()
            await (await connecting).close()
            with pytest.raises(Busy):
                await Client.connect(path, timeout=0.03)

        asyncio.run(main())
