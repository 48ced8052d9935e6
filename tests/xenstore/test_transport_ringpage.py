"""The ring page: wrap-around, full rings, whatever the other end writes into it, reconnection."""

from __future__ import annotations

import asyncio
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.store_links import Store, blocking_ring, ring_pair
from tests.support.until import until

from xenbus.errors import DeadlineError, LinkDown, PeerError
from xenbus.ring.bytering import XENSTORE_REQ, XENSTORE_RSP
from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport import ringpage
from xenbus.xenstore.transport.ringpage import (
    CONNECTION,
    ERROR,
    FEATURES,
    ConnectionWord,
    Feature,
    RingFault,
    RingPage,
    RingPipe,
    RingTransport,
    Side,
)
from xenbus.xenstore.wire.message import Parser

REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060


class Sink:
    """A receiver that keeps everything."""

    def __init__(self, transport: Any) -> None:
        self.data = bytearray()
        self.lost: list[Exception | None] = []
        self.drains = 0
        self.changed = asyncio.Event()
        transport.start(self)

    def data_received(self, data: bytes | memoryview) -> None:
        self.data += data
        self.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.changed.set()

    def drained(self) -> None:
        self.drains += 1
        self.changed.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def put(view: memoryview, offset: int, value: int) -> None:
    struct.pack_into("<I", view, offset, value & 0xFFFFFFFF)


def get(view: memoryview, offset: int) -> int:
    (value,) = struct.unpack_from("<I", view, offset)
    return value


def fresh(start: int = 0, features: int = 0) -> memoryview:
    """A page whose four indices begin at `start`: guests must not assume zero."""
    view = memoryview(bytearray(4096))
    for offset in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
        put(view, offset, start)
    put(view, FEATURES, features)
    return view


def let_go(view: memoryview) -> bool:
    """Whether nothing holds on to the page any more (a mapping could be unmapped): only then it can grow."""
    buffer = view.obj
    view.release()
    try:
        buffer.append(0)
    except BufferError:
        return False
    return True


# ---- bytes ----

CHUNKS = st.lists(st.integers(1, 3000), max_size=8)


@settings(max_examples=40, deadline=None)
@given(CHUNKS, CHUNKS, st.sampled_from([0, 1, 1023, 1024, 0xFFFFFFFF, 0xFFFFFC01, 0x80000000]))
def test_both_streams_arrive_whole_whatever_the_offsets(up, down, start) -> None:
    async def main() -> None:
        guest, daemon = ring_pair(fresh(start))
        at_guest, at_daemon = Sink(guest), Sink(daemon)
        streams = []
        for end, sizes in ((guest, up), (daemon, down)):
            messages = [bytes((n + i) & 0xFF for i in range(n)) for n in sizes]
            end.send(messages)
            streams.append(b"".join(messages))
        await at_daemon.until(lambda: len(at_daemon.data) >= len(streams[0]))
        await at_guest.until(lambda: len(at_guest.data) >= len(streams[1]))
        assert (bytes(at_daemon.data), bytes(at_guest.data)) == tuple(streams)
        assert guest.backlog == daemon.backlog == 0
        assert at_guest.lost == at_daemon.lost == []
        guest.close()
        daemon.close()
        await asyncio.sleep(0)

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_garbage_in_the_page_never_raises_out_of_the_handler(data) -> None:
    """Either end, any word set to anything at any time: bytes, or one connection_lost. Nothing else."""

    async def main() -> None:
        view = fresh(features=data.draw(st.integers(0, 15)))
        side = data.draw(st.sampled_from(list(Side)))
        kicks = 0

        def notify() -> None:
            nonlocal kicks
            kicks += 1

        transport = RingTransport(view, notify, side, "somebody", reconnect=data.draw(st.booleans()))
        sink = Sink(transport)
        for _ in range(data.draw(st.integers(1, 6))):
            offset = data.draw(st.sampled_from([REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, CONNECTION, ERROR]))
            put(
                view,
                offset,
                data.draw(st.integers(0, 3) | st.integers(1000, 1100) | st.integers(0, 2**32 - 1)),
            )
            transport.send([b"x" * data.draw(st.integers(1, 2000))])
            transport.on_event()
            await asyncio.sleep(0)
        transport.close()
        await asyncio.sleep(0)
        assert len(sink.lost) == 1
        assert kicks < 2000
        assert let_go(view)

    asyncio.run(main())


@pytest.mark.parametrize("side", list(Side))
def test_indices_further_apart_than_the_ring(side: Side) -> None:
    async def main() -> None:
        view = fresh(features=Feature.ERROR)
        kicks: list[int] = []
        transport = RingTransport(view, lambda: kicks.append(get(view, ERROR)), side, "domain 7")
        sink = Sink(transport)
        _, _, _, prod = side.value[0]
        put(view, prod, 1025)
        transport.on_event()
        await sink.until(lambda: sink.lost)
        assert isinstance(sink.lost[0], PeerError)
        assert "domain 7" in str(sink.lost[0])
        if side is Side.DAEMON:  # it says why, before it kicks
            assert get(view, ERROR) == RingFault.RINGIDX
            assert kicks == [RingFault.RINGIDX]
        transport.on_event()
        transport.send([b"x"])
        transport.close()
        await asyncio.sleep(0)
        assert len(sink.lost) == 1

    asyncio.run(main())


def test_a_kick_comes_after_what_it_tells_of() -> None:
    async def main() -> None:
        view = fresh()
        seen: list[int] = []
        guest = RingTransport(view, lambda: seen.append(get(view, REQ_PROD)), Side.GUEST, "xenstored")
        sink = Sink(guest)
        guest.send([b"abc", b"de"])
        assert seen == [5]
        assert bytes(view[:5]) == b"abcde"
        put(view, RSP_PROD, 4)
        view[1024:1028] = b"wxyz"
        guest.on_event()
        assert sink.data == b"wxyz"
        assert get(view, RSP_CONS) == 4
        assert len(seen) == 2
        guest.on_event()
        assert len(seen) == 2  # nothing moved: nobody is disturbed
        guest.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_the_layout_is_the_headers() -> None:
    assert XENSTORE_REQ == (0, 1024, 2048, 2052)
    assert XENSTORE_RSP == (1024, 1024, 2056, 2060)
    view = fresh()
    for number, offset in enumerate((2064, 2068, 2072, 2076), 1):
        put(view, offset, number)
    page = RingPage(view, Side.GUEST)
    assert (page.features, page.connection, page.error, page.evtchn_port) == (1, 2, 3, 4)
    page.release()
    page.release()
    assert let_go(view)


# ---- back-pressure ----


def test_a_paused_end_leaves_the_other_with_its_backlog() -> None:
    async def main() -> None:
        guest, daemon = ring_pair()
        at_guest, at_daemon = Sink(guest), Sink(daemon)
        daemon.pause(True)
        guest.send([b"x" * 5000])
        for _ in range(5):
            await asyncio.sleep(0)
        assert guest.backlog == 5000 - 1024
        assert at_daemon.data == b""
        assert at_guest.drains == 0
        put(daemon.page._words.obj, REQ_CONS, 1024)  # room, and not told of yet
        guest.send([b"y"])
        assert guest.backlog == 5001 - 1024
        put(daemon.page._words.obj, REQ_CONS, 0)
        daemon.pause(False)
        await at_guest.until(lambda: at_guest.drains)
        assert at_daemon.data == b"x" * 5000 + b"y"
        assert guest.backlog == 0
        guest.close()
        daemon.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_channel_that_is_gone_ends_the_connection() -> None:
    async def main() -> None:
        def notify() -> None:
            raise OSError("port closed")

        guest = RingTransport(fresh(), notify, Side.GUEST, "xenstored")
        client = await Client.connect(guest)
        with pytest.raises(LinkDown, match="cannot notify xenstored"):
            await client.read("/a")
        await client.close()

    asyncio.run(main())


# ---- a store that hangs, stops, or starts anew ----


def test_a_wedged_daemon_is_met_by_deadlines_and_lets_the_page_go() -> None:
    async def main() -> None:
        view = fresh()
        guest = RingTransport(view, lambda: None, Side.GUEST, "xenstored")
        client = await Client.connect(guest, timeout=0.03)
        results = await asyncio.gather(
            *(client.write(f"/{n}", b"x" * 4000) for n in range(30)), return_exceptions=True
        )
        assert {type(result) for result in results} == {DeadlineError}
        await client.close()
        assert let_go(view)

    asyncio.run(main())


@pytest.mark.parametrize("offered", [True, False])
def test_the_error_word_ends_the_connection_if_it_was_offered(offered: bool) -> None:
    async def main() -> None:
        view = fresh(features=Feature.ERROR if offered else 0)
        guest = RingTransport(view, lambda: None, Side.GUEST, "xenstored")
        client = await Client.connect(guest, timeout=0.05)
        reading = asyncio.create_task(client.read("/a"))
        await until(lambda: client.counts()["unanswered"])
        put(view, ERROR, 3)
        guest.on_event()
        with pytest.raises(LinkDown if offered else DeadlineError, match=r"PROTO|READ"):
            await reading
        assert client.closed is offered
        await client.close()

    asyncio.run(main())


def test_the_daemon_says_why_it_stops() -> None:
    async def main() -> None:
        guest, daemon = ring_pair()
        client = await Client.connect(guest)
        sink = Sink(daemon)
        reading = asyncio.create_task(client.read("/a"))
        await sink.until(lambda: sink.data)
        daemon.fault(RingFault.PROTO)
        daemon.fault(RingFault.PROTO)
        with pytest.raises(LinkDown, match="PROTO"):
            await reading
        assert sink.lost == [None]

    asyncio.run(main())


def stale(view: memoryview) -> None:
    """What another kernel left: half a request, half a reply."""
    put(view, REQ_PROD, get(view, REQ_PROD) + 700)
    put(view, RSP_PROD, get(view, RSP_PROD) + 300)


def test_a_reconnecting_guest_starts_with_empty_rings() -> None:
    async def main() -> None:
        store = Store()
        view = fresh(0xFFFFFF00)
        guest, daemon = ring_pair(view, reconnect=False)
        served = store.serve(daemon)

        def reset() -> None:
            served.parser = Parser()
            store.engine.reset(served.conn)

        daemon._on_reconnect = reset
        first = await Client.connect(guest)
        await first.watch("/w", lambda path: None)
        hold = asyncio.Event()
        running = asyncio.create_task(first.transaction(lambda tx: hold.wait()))
        await until(lambda: served.conn.transactions)
        assert served.conn.watches
        assert served.conn.transactions
        await first.close()
        with pytest.raises(LinkDown):
            hold.set()
            await running
        stale(view)
        again = RingTransport(
            view,
            lambda: asyncio.get_running_loop().call_soon(daemon.on_event),
            Side.GUEST,
            "xenstored",
            reconnect=True,
        )
        daemon._notify = lambda: asyncio.get_running_loop().call_soon(again.on_event)
        assert get(view, CONNECTION) == ConnectionWord.RECONNECT
        second = await Client.connect(again)
        await second.write("/a", "1")
        assert await second.read("/a") == b"1"
        assert get(view, CONNECTION) == ConnectionWord.CONNECTED
        assert not served.conn.watches
        assert not served.conn.transactions
        await second.close()
        await store.close()

    asyncio.run(main())


def test_a_guest_that_finds_a_reconnection_under_way_waits_for_it() -> None:
    async def main() -> None:
        view = fresh(features=Feature.RECONNECTION)
        put(view, CONNECTION, ConnectionWord.RECONNECT)
        guest = RingTransport(view, lambda: None, Side.GUEST, "xenstored")
        sink = Sink(guest)
        guest.send([b"later"])
        put(view, RSP_PROD, 8)  # somebody else's reply: to be ignored, as all fields but the word
        put(view, REQ_PROD, 5000)
        guest.on_event()
        await asyncio.sleep(0)
        assert get(view, REQ_PROD) == 5000
        assert guest.backlog == 5
        assert sink.data == b""
        put(view, RSP_PROD, 0)
        put(view, REQ_PROD, 0)
        put(view, CONNECTION, ConnectionWord.CONNECTED)
        guest.on_event()
        assert get(view, REQ_PROD) == 5
        assert sink.drains == 1
        guest.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_no_reconnection_is_asked_of_a_store_that_does_not_offer_it() -> None:
    async def main() -> None:
        view = fresh()
        guest = RingTransport(view, lambda: None, Side.GUEST, "xenstored", reconnect=True)
        assert get(view, CONNECTION) == ConnectionWord.CONNECTED
        guest.close()

    asyncio.run(main())


# ---- a caller that blocks ----


def test_a_blocking_guest_meets_deadlines_and_faults() -> None:
    async def main() -> None:
        pipe, daemon = blocking_ring()
        daemon.page.features = Feature.ERROR
        client = SyncClient(pipe, 0.03)
        with pytest.raises(DeadlineError):
            await asyncio.to_thread(client.read, "/a")
        daemon.start(sink := _Quiet())
        client.timeout = 5
        reading = asyncio.create_task(asyncio.to_thread(client.read, "/a"))
        async with asyncio.timeout(5):
            await sink.heard.wait()
        daemon.fault(RingFault.COMM)
        with pytest.raises(LinkDown, match="COMM"):
            await reading
        client.close()
        client.close()

    asyncio.run(main())


class _Quiet:
    def __init__(self) -> None:
        self.heard = asyncio.Event()

    def data_received(self, data: bytes | memoryview) -> None:
        self.heard.set()

    def connection_lost(self, exc: Exception | None) -> None:
        pass

    def drained(self) -> None:
        pass


def test_a_blocking_guest_reconnects() -> None:
    view = fresh(features=Feature.RECONNECTION)
    stale(view)
    kicks = threading.Event()
    waits = 0

    def wait(seconds: float) -> None:
        nonlocal waits
        waits += 1
        page = RingPage(view, Side.DAEMON)
        page.empty()
        page.connection = ConnectionWord.CONNECTED
        page.release()

    pipe = RingPipe(view, kicks.set, wait, "xenstored", reconnect=True)
    assert get(view, CONNECTION) == ConnectionWord.RECONNECT
    assert kicks.is_set()
    pipe.send([b"hello"], 1.0)
    assert waits == 1
    assert get(view, REQ_PROD) - get(view, REQ_CONS) == 5
    with pytest.raises(TimeoutError):
        pipe.receive(0.001)
    put(view, RSP_PROD, get(view, RSP_CONS) + 2000)
    with pytest.raises(LinkDown, match="apart"):
        pipe.receive(1)
    pipe.close()
    assert let_go(view)


def test_a_blocking_guest_takes_replies_while_it_sends() -> None:
    """A store that makes no room for requests before its replies are taken."""
    view = fresh()
    put(view, RSP_PROD, 1024)
    taken = bytearray()

    def wait(seconds: float) -> None:
        if get(view, RSP_CONS) != get(view, RSP_PROD):
            return
        page = RingPage(view, Side.DAEMON)
        taken.extend(page.read())
        page.release()

    pipe = RingPipe(view, lambda: None, wait, "xenstored")
    pipe.send([bytes(3000)], 2.0)
    assert len(pipe.receive(1.0)) == 1024
    wait(0)
    assert taken == bytes(3000)
    pipe.close()
    assert let_go(view)


def test_where_no_fence_can_be_had_the_rings_are_looked_at_again(monkeypatch) -> None:
    monkeypatch.setattr(ringpage.fence, "FENCED", False)

    async def main() -> None:
        view = fresh()
        guest = RingTransport(view, lambda: None, Side.GUEST, "xenstored")
        sink = Sink(guest)
        await asyncio.sleep(0)
        view[1024:1026] = b"ok"
        put(view, RSP_PROD, 2)  # and no kick
        await sink.until(lambda: sink.data == b"ok")
        view[1026:1028] = b"ay"
        put(view, RSP_PROD, 4)
        await sink.until(lambda: sink.data == b"okay")
        guest.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_backlog_that_comes_and_goes_within_one_turn_is_told_of() -> None:
    """The other end, on another CPU, makes room between two passes: who waits for `drained` must hear it."""

    async def main() -> None:
        view = fresh()
        guest = RingPage(view, Side.GUEST)
        taken = bytearray()

        class Answering(Sink):
            """Reads no more until its answer is gone, as a session of the daemon does."""

            def data_received(self, data: bytes | memoryview) -> None:
                super().data_received(data)
                daemon.send([b"r" * 1500])
                daemon.pause(bool(daemon.backlog))

            def drained(self) -> None:
                super().drained()
                daemon.pause(False)

        daemon = RingTransport(view, lambda: taken.extend(guest.read()), Side.DAEMON, "domain 1")
        sink = Answering(daemon)
        for _ in range(3):
            guest.write(b"q")
            daemon.on_event()
            await asyncio.sleep(0)
        await sink.until(lambda: len(sink.data) == 3)
        assert sink.drains == 3 and len(taken) == 4500
        daemon.close()

    asyncio.run(main())
