"""The real engine behind every kind of transport, and both clients behind one set of async methods."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from xenbus.xenstore.client import Client
from xenbus.xenstore.engine.engine import Engine
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.ringpage import Feature, RingPipe, RingTransport, Side
from xenbus.xenstore.transport.unix import UnixPipe, UnixTransport
from xenbus.xenstore.wire.message import Parser


class Served:
    """One connection of the engine, at the daemon's end of a transport."""

    def __init__(self, store: Store, transport: Any, domid: int) -> None:
        self.store = store
        self.transport = transport
        self.conn = store.engine.connect(domid)
        self.parser = Parser()
        self.lost: list[Exception | None] = []
        store.by_conn[self.conn] = self
        transport.start(self)

    def data_received(self, data: bytes | memoryview) -> None:
        for message in self.parser.feed(data):
            self.store.engine.handle(self.conn, message)
        self.store.flush(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.store.engine.disconnect(self.conn)
        self.store.by_conn.pop(self.conn, None)
        self.store.flush()

    def drained(self) -> None:
        self.flush()

    def flush(self) -> None:
        if not self.transport.backlog and (data := self.conn.take()):
            self.transport.send([data])

    def reset(self) -> None:
        """The guest reconnected its ring."""
        self.parser = Parser()
        self.store.engine.reset(self.conn)


class Store:
    """An engine and whoever is connected to it."""

    def __init__(self) -> None:
        self.engine = Engine()
        for domid in (5, 6):
            self.engine.domain(domid)  # the hypervisor has them
        self.by_conn: dict[Any, Served] = {}

    def flush(self, *also: Served) -> None:
        for conn in self.engine.take_dirty():
            if conn in self.by_conn:
                self.by_conn[conn].flush()
        for served in also:
            served.flush()

    async def link(self, kind: str, domid: int = 0, **options: Any) -> tuple[Client, Served]:
        """A client over a transport of this kind."""
        near, served = self.transport(kind, domid)
        return await Client.connect(near, **options), served

    def transport(self, kind: str, domid: int = 0) -> tuple[Any, Served]:
        """(the client's end, the served end)."""
        if kind == "unix":
            a, b = socket.socketpair()
            return UnixTransport(a), Served(self, UnixTransport(b), domid)
        if kind == "memory":
            near, far = memory_pair()
            return near, Served(self, far, domid)
        assert kind == "ring", kind
        near, far = ring_pair()
        served = Served(self, far, domid)
        far._on_reconnect = served.reset
        return near, served

    def blocking(self, kind: str, domid: int = 0, **options: Any) -> tuple[SyncClient, Served]:
        """A blocking client: its calls belong into another thread than the loop's."""
        if kind == "unix":
            a, b = socket.socketpair()
            return SyncClient(UnixPipe(a), **options), Served(self, UnixTransport(b), domid)
        pipe, far = blocking_ring()
        return SyncClient(pipe, **options), Served(self, far, domid)


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

    async def transaction(self, function: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
        def run(tx: Any) -> Any:
            coroutine = function(_Direct(tx))
            try:
                coroutine.send(None)  # type: ignore[attr-defined]
            except StopIteration as end:
                return end.value
            raise AssertionError("a blocking transaction suspended")

        return await asyncio.to_thread(self.sync.transaction, run, **options)


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
