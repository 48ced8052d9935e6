"""Recordings: what passed, in order, readable; and the same connection again without a store."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.store_links import Store

from xenbus.errors import LinkDown, NoEntry, PeerError, UsageError
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport import recording
from xenbus.xenstore.transport.recording import Record, RecordingTransport, Tape, read_recording
from xenbus.xenstore.wire.message import Message, Op


async def session(client: Any) -> list[Any]:
    """The connection that is recorded: replies, errors, events, a transaction."""
    heard: list[str] = []
    await client.write("/a", b"\xff\0\x80")
    watch = await client.watch("/a", heard.append)
    await client.write("/a/b", "1")
    with pytest.raises(NoEntry):
        await client.read("/none")
    values = await asyncio.gather(client.read("/a"), client.read("/a/b"))

    async def change(tx: Any) -> bytes:
        await tx.write("/t", "2")
        return await tx.read("/t")

    values.append(await client.transaction(change))
    await watch.close()
    return [values, heard]


async def record(path: Any) -> list[Any]:
    store = Store()
    near, _ = store.transport("unix")
    client = await Client.connect(RecordingTransport(near, Tape(path)))
    result = await session(client)
    await client.close()
    await store.close()
    return result


def test_a_recording_is_replayed_with_the_same_outcome(tmp_path) -> None:
    async def main() -> None:
        path = tmp_path / "tape"
        result = await record(path)
        assert result == [[b"\xff\0\x80", b"1", b"2"], ["/a", "/a/b"]]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client = await Client.connect(f"replay:{path}", timeout=5)
        client._session._last_id = 1000  # request ids are translated
        assert await session(client) == result
        with pytest.raises(LinkDown, match="ends before READ"):
            await client.read("/more")
        await client.close()

    asyncio.run(main())


def test_a_file_is_ours_alone_and_a_device_stays_everybodys(tmp_path) -> None:
    path = tmp_path / "tape"
    path.touch(0o644)
    Tape(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    master, slave = os.openpty()
    try:
        os.fchmod(slave, 0o620)
        Tape(os.ttyname(slave)).close()
        assert stat.S_IMODE(os.fstat(slave).st_mode) == 0o620
    finally:
        os.close(master)
        os.close(slave)


def test_a_client_that_connects_again_goes_on_with_its_recording(tmp_path) -> None:
    async def main() -> None:
        path, socket = tmp_path / "tape", tmp_path / "socket"
        daemon = Daemon()
        await daemon.listen_unix(socket)
        client = await Client.connect(
            f"recording:{path},{socket}", reconnect=Reconnect(base=0.01, cap=0.05, deadline=20)
        )
        await client.write("/a", "1")
        lost, back = asyncio.Event(), asyncio.Event()
        client.on_lost(lambda why: lost.set())
        client.on_reconnected(back.set)
        await daemon.close()
        await asyncio.wait_for(lost.wait(), 10)
        daemon = Daemon()
        await daemon.listen_unix(socket)
        await asyncio.wait_for(back.wait(), 20)
        await client.write("/b", "2")
        await client.close()
        await daemon.close()
        asked = [(r.connection, r.message.payload) for r in read_recording(path) if r.outgoing]
        assert asked[0] == (1, b"/a\x001")
        assert asked[-1][0] > 1 and asked[-1][1] == b"/b\x002"

    asyncio.run(main())


def test_a_recording_says_what_passed(tmp_path) -> None:
    async def main() -> None:
        path = tmp_path / "tape"
        await record(path)
        records = list(read_recording(path))
        assert [r.message.op for r in records[:2]] == [Op.WRITE, Op.WRITE]
        assert [r.outgoing for r in records[:2]] == [True, False]
        assert records[0].message.payload == b"/a\0\xff\0\x80"
        assert [r.seconds for r in records] == sorted(r.seconds for r in records)
        events = [r for r in records if r.message.op == Op.WATCH_EVENT]
        assert [e.message.payload for e in events] == [b"/a\x001\0", b"/a/b\x001\0"]
        assert all(json.loads(line)["to"] in ("store", "client") for line in path.read_text().splitlines())

    asyncio.run(main())


def test_another_question_than_the_recorded_one(tmp_path) -> None:
    async def main() -> None:
        path = tmp_path / "tape"
        await record(path)
        client = await Client.connect(f"replay:{path}", timeout=5)
        lost: list[Exception] = []
        client.on_lost(lost.append)
        with pytest.raises(LinkDown, match=r"has WRITE .* not READ"):
            await client.read("/a")
        assert isinstance(lost[0], PeerError)
        await client.close()

    asyncio.run(main())


def test_an_address_of_both(tmp_path) -> None:
    async def main() -> None:
        path = tmp_path / "tape"
        await record(path)
        copy = tmp_path / "copy"
        client = await Client.connect(f"recording:{copy},replay:{path}", timeout=5)
        await session(client)
        await client.close()
        assert [r.message for r in read_recording(copy)] == [r.message for r in read_recording(path)]
        with pytest.raises(UsageError, match="expected recording:FILE,ADDRESS"):
            await Client.connect("recording:tape")

    asyncio.run(main())


def test_a_blocking_caller_is_recorded_too(tmp_path) -> None:
    path = tmp_path / "tape"

    async def main() -> None:
        store = Store()
        await store.daemon.listen_unix(tmp_path / "socket")

        def work() -> None:
            with SyncClient.connect(f"recording:{path},{tmp_path}/socket", timeout=5) as client:
                client.write("/a", "1")
                assert client.read("/a") == b"1"

        await asyncio.to_thread(work)
        await store.close()

        client = await Client.connect(f"replay:{path}", timeout=5)
        await client.write("/a", "1")
        assert await client.read("/a") == b"1"
        await client.close()

    asyncio.run(main())
    with pytest.raises(UsageError, match="event loop"):
        SyncClient.connect(f"recording:{tmp_path}/new,replay:{path}")


def test_a_file_that_is_full_stops_the_recording_and_not_the_connection(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recording, "FILE_LIMIT", 300)

    async def main() -> None:
        path = tmp_path / "tape"
        await record(path)
        assert 0 < path.stat().st_size <= 300
        assert len(list(read_recording(path))) >= 2

    asyncio.run(main())


@pytest.mark.parametrize("line", ["", "x", "[]", '{"op": "READ"}', '{"op": 1, "payload": 2}', "null"])
def test_a_line_that_is_none(line: str) -> None:
    with pytest.raises(UsageError, match="no line of a recording"):
        Record.decode(line)


WORD = st.integers(0, 2**32 - 1)


@given(st.floats(0, 1e6), st.booleans(), WORD, WORD, WORD, st.binary(max_size=50))
def test_every_message_makes_the_round_trip(seconds, outgoing, op, req_id, tx_id, payload) -> None:
    record = Record(round(seconds, 6), outgoing, Message(op, req_id, tx_id, payload))
    assert Record.decode(record.encode()) == record
