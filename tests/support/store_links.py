"""The real daemon behind every kind of transport, and both clients behind one set of async methods."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from xenbus.hypervisor.embedded import Machine
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon.server import Daemon
from xenbus.xenstore.daemon.session import Session
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.recording import RecordingTransport, Tape
from xenbus.xenstore.transport.ringpage import Feature, RingPipe, RingTransport, Side
from xenbus.xenstore.transport.unix import UnixPipe, UnixTransport

GUESTS = (5, 6)


class Store:
    """The daemon on an in-process machine with two guests that are not introduced yet."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.hv = self.machine.domain(0)
        self.daemon = Daemon(self.hv)
        self.engine = self.daemon.engine
        self.guests = {domid: self.machine.domain(domid) for domid in GUESTS}

    async def close(self) -> None:
        await self.daemon.close()
        for hv in (*self.guests.values(), self.hv):
            await hv.close()
        await asyncio.sleep(0)

    def port(self, domid: int) -> int:
        """What INTRODUCE takes."""
        return self.machine.store_port(domid)

    def serve(self, transport: Any, domid: int = 0) -> Session:
        """The daemon at the far end of any transport."""
        session = self.daemon.open_session(domid, transport)
        session.start()
        return session

    async def link(self, kind: str, domid: int = 0, **options: Any) -> tuple[Client, Session]:
        """A client over a transport of this kind, and the daemon's side of it."""
        near, session = self.transport(kind, domid)
        return await Client.connect(near, **options), session

    def transport(self, kind: str, domid: int = 0) -> tuple[Any, Session]:
        """(the client's end, the daemon's side)."""
        if kind == "unix":
            a, b = socket.socketpair()
            return UnixTransport(a), self.serve(UnixTransport(b), domid)
        if kind == "recorded":
            near, session = self.transport("memory", domid)
            return RecordingTransport(near, Tape(os.devnull)), session
        near, far = memory_pair() if kind == "memory" else ring_pair()
        return near, self.serve(far, domid)

    def dialled(self, domid: int = 0) -> tuple[Callable[[], Any], list[Session]]:
        """What a client that reconnects may call, and the daemon's sides of all that it got."""
        sessions: list[Session] = []

        def dial() -> Any:
            near, session = self.transport("memory", domid)
            sessions.append(session)
            return near

        return dial, sessions

    def blocking(self, kind: str, domid: int = 0, **options: Any) -> tuple[SyncClient, Session]:
        """A blocking client: its calls belong into another thread than the loop's."""
        if kind == "unix":
            a, b = socket.socketpair()
            return SyncClient(UnixPipe(a), **options), self.serve(UnixTransport(b), domid)
        pipe, far = blocking_ring()
        return SyncClient(pipe, **options), self.serve(far, domid)

    async def guest(self, other: Client, domid: int = 5, **options: Any) -> Client:
        """A guest as it really comes: its own ring page and channel, introduced by domain 0."""
        ends: list[RingTransport] = []
        info = await self.guests[domid].start_info(lambda: [end.on_event() for end in ends] and None)
        ends.append(RingTransport(info.store_page, info.store_channel.notify, Side.GUEST, "xenstored"))
        client = await Client.connect(ends[0], **options)
        await other.introduce(domid, 0, self.port(domid))
        return client


def ring_pair(
    view: memoryview | None = None, *, features: int = Feature.ERROR | Feature.RECONNECTION, **guest: Any
) -> tuple[RingTransport, RingTransport]:
    """(the guest's end, the daemon's end) of one page, in one loop."""
    page = view if view is not None else memoryview(bytearray(4096))
    loop = asyncio.get_running_loop()
    ends: list[RingTransport] = []

    def kick(index: int) -> Callable[[], None]:
        return lambda: loop.call_soon(lambda: ends[index].on_event()) and None

    daemon = RingTransport(page, kick(1), Side.DAEMON, "domain 1")
    daemon.page.features = features
    ends.append(daemon)
    ends.append(RingTransport(page, kick(0), Side.GUEST, "xenstored", **guest))
    return ends[1], ends[0]


def blocking_ring() -> tuple[RingPipe, RingTransport]:
    """(a guest's end for another thread, the daemon's end in this loop)."""
    page = memoryview(bytearray(4096))
    loop = asyncio.get_running_loop()
    kicked = threading.Event()

    def wait(seconds: float) -> None:
        kicked.wait(seconds)
        kicked.clear()

    daemon = RingTransport(page, kicked.set, Side.DAEMON, "domain 1")
    return RingPipe(
        page, lambda: loop.call_soon_threadsafe(daemon.on_event) and None, wait, "xenstored"
    ), daemon


class _Direct:
    """Blocking methods as coroutines that never suspend."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._target, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return call


class Threaded:
    """A `SyncClient` with the async client's shape: every call runs in a thread."""

    def __init__(self, client: SyncClient) -> None:
        self.sync = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.sync, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(method, *args, **kwargs)

        return call

    def counts(self) -> dict[str, int]:
        return self.sync.counts()

    def batch(self) -> Any:
        return _ThreadedBatch(self.sync.batch())

    async def transaction(self, function: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
        def run(tx: Any) -> Any:
            coroutine = function(_Direct(tx))
            try:
                coroutine.send(None)  # type: ignore[attr-defined]
            except StopIteration as end:
                return end.value
            raise AssertionError("a blocking transaction suspended")

        return await asyncio.to_thread(self.sync.transaction, run, **options)


class _ThreadedBatch:
    """A blocking batch with the async one's shape."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    async def send(self) -> list[Any]:
        return await asyncio.to_thread(self._batch.send)

    async def commit(self, **options: Any) -> list[Any]:
        return await asyncio.to_thread(self._batch.commit, **options)


class Listener:
    """The events of one watch, of either client, one after the other."""

    def __init__(self, client: Client | Threaded) -> None:
        self._client = client
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self.watch: Any = None

    @classmethod
    async def on(cls, client: Client | Threaded, path: str, depth: int | None = None) -> Listener:
        self = cls(client)
        if isinstance(client, Client):
            self.watch = await client.watch(path, self._queue.put_nowait, depth=depth)
        else:
            self.watch = await client.watch(path, depth=depth)
        return self

    async def next(self, timeout: float = 5.0) -> str:
        if isinstance(self._client, Client):
            return await asyncio.wait_for(self._queue.get(), timeout)
        found = await self._client.poll_watch(timeout)
        assert found is not None, "no event came"
        assert found[0] is self.watch
        return found[1]

    async def close(self) -> None:
        if isinstance(self._client, Client):
            await self.watch.close()
        else:
            await asyncio.to_thread(self.watch.close)


LINKS = ["unix", "memory", "ring", "recorded", "unix blocking", "ring blocking"]


def on_every_link(suite: Callable[[Any, Client, Store], Awaitable[None]]) -> Callable[[str], None]:
    """`suite(client, other, store)`: the client under test, and domain 0 from elsewhere."""

    @pytest.mark.parametrize("link", LINKS)
    def test(link: str) -> None:
        async def main() -> None:
            store = Store()
            kind, _, blocking = link.partition(" ")
            other, _ = await store.link("memory")
            client: Any
            if blocking:
                sync, served = store.blocking(kind, timeout=10)
                client = Threaded(sync)
            else:
                client, served = await store.link(kind, timeout=10)
            try:
                async with asyncio.timeout(20):
                    await suite(client, other, store)
                    await client.read("/")  # what was posted without waiting is answered before this
                    left = client.counts()
                    assert left == {"watches": 0, "transactions": 0, "waiters": 0, "unanswered": 0}
                    assert not served.conn.transactions
                    assert not served.conn.watches
            finally:
                await client.close()
                await other.close()
                await store.close()
            assert store.engine.check() == []

        asyncio.run(main())

    test.__name__ = suite.__name__
    test.__doc__ = suite.__doc__
    return test
