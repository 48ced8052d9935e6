"""The daemon's socket: who may open it, what ends a client, and that nobody harms anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.raw_store import RawStore, until

from xenbus.errors import StoreError, UsageError
from xenbus.xenstore import listener
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.daemon.session import BUDGET
from xenbus.xenstore.engine import Connection, Engine, Quotas
from xenbus.xenstore.wire import Message, Op, encode


@contextlib.asynccontextmanager
async def daemon_at(path: Path, **options: object) -> AsyncIterator[Daemon]:
    daemon = Daemon(None, Quotas(), **options)  # type: ignore[arg-type]
    try:
        await daemon.listen_unix(path)
        yield daemon
    finally:
        await daemon.close()
        await asyncio.sleep(0)


def test_the_socket_is_domain_0s_alone_from_the_start_and_gone_at_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        path, before = tmp_path / "socket", os.umask(0)
        try:
            async with daemon_at(path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert os.umask(0) == 0, "the process's mask is as it was"
        finally:
            os.umask(before)
        assert not path.exists()

    asyncio.run(run())


def test_more_requests_at_once_than_a_turn_serves(tmp_path: Path) -> None:
    """What is left has its turns without anything else to wake the daemon, one at a time."""

    async def run() -> None:
        count = 5 * BUDGET
        async with daemon_at(tmp_path / "socket") as daemon:
            client = await RawStore.connect(tmp_path / "socket")
            await client.send(b"".join(client.request(Op.READ, "/") for _ in range(count)))
            assert [one.req_id for one in await client.receive(count)] == list(range(1, count + 1))
            (session,) = daemon._sessions.values()
            turns: list[Callable[[], None]] = []
            session._loop = SimpleNamespace(call_soon=turns.append)  # type: ignore[assignment]
            for count in (1, 2):
                session.schedule()
                session.schedule()
                assert len(turns) == count
                turns[-1]()
            client.close()

    asyncio.run(run())


def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with daemon_at(path):
            client = await RawStore.connect(path)
            assert await client.ask(Op.READ, "/tool") == b""
            client.close()

    asyncio.run(run())


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "socket"
        async with daemon_at(path):
            with pytest.raises(UsageError, match="answers there already"):
                async with daemon_at(path):
                    pass
            assert path.exists(), "the refused one did not remove the other's socket"
        path.write_text("data")
        with pytest.raises(UsageError, match="not a socket"):
            async with daemon_at(path):
                pass
        assert path.read_text() == "data"
        with pytest.raises(UsageError, match="No such file"):
            async with daemon_at(tmp_path / "none" / "socket"):
                pass
        with pytest.raises(UsageError, match="cannot listen"):
            async with daemon_at(tmp_path / ("x" * 200)):
                pass

    asyncio.run(run())


def test_another_daemons_socket_is_not_unlinked_at_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "socket"
        async with daemon_at(path):
            path.unlink()
            path.write_text("theirs")
        assert path.read_text() == "theirs"

    asyncio.run(run())


def test_requests_in_one_send_are_answered_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket"):
            client = await RawStore.connect(tmp_path / "socket")
            total = 3000  # more than one turn of the loop serves
            await client.send(
                b"".join(encode(Op.WRITE, number, 0, b"/a\0%d" % number) for number in range(total))
                + encode(Op.READ, total, 0, b"/a\0")
            )
            replies = await client.receive(total + 1)
            assert [reply.req_id for reply in replies] == list(range(total + 1))
            assert replies[-1].payload == b"%d" % (total - 1)
            client.close()

    asyncio.run(run())


def test_one_busy_client_does_not_make_others_wait_for_all_of_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            busy, other = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            assert await busy.ask(Op.WRITE, "/a", "") == await other.ask(Op.WRITE, "/b", "") == b"OK\0"
            before, total = daemon.engine.generation, 2000
            busy.sock.setblocking(True)
            busy.sock.sendall(encode(Op.WRITE, 1, 0, b"/a\0") * total)
            busy.sock.setblocking(False)
            await other.ask(Op.READ, "/b")
            assert 0 < daemon.engine.generation - before < total
            await busy.receive(total)
            busy.close()
            other.close()

    asyncio.run(run())


def test_a_message_in_pieces(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket"):
            client = await RawStore.connect(tmp_path / "socket")
            for byte in encode(Op.WRITE, 1, 0, b"/a\0value"):
                await client.send(bytes([byte]))
                await asyncio.sleep(0)
            assert (await client.receive())[0].payload == b"OK\0"
            client.close()

    asyncio.run(run())


def test_an_oversized_message_closes_that_socket_after_what_came_before(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            bad, good = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            assert await good.ask(Op.WATCH, "/a", "t") == b"OK\0"
            await bad.send(encode(Op.WRITE, 1, 0, b"/a\x001") + struct.pack("<IIII", 2, 2, 0, 4097) + b"/a\0")
            assert (await bad.receive())[0].payload == b"OK\0"
            assert await bad.ended()
            assert await good.ask(Op.READ, "/a") == b"1"
            assert len(daemon.engine.domain(0).connections) == 1
            bad.close()
            good.close()

    asyncio.run(run())


def test_leaving_in_a_transaction_and_with_watches_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            client = await RawStore.connect(tmp_path / "socket")
            await client.ask(Op.WATCH, "/a", "t")
            tx = int((await client.ask(Op.TRANSACTION_START))[:-1])
            assert await client.ask(Op.WRITE, "/a", "1", tx=tx) == b"OK\0"
            await client.send(b"half a hea")
            client.close()
            domain = daemon.engine.domain(0)
            await until(lambda: not domain.connections)
            assert (domain.watches, domain.transactions) == (0, 0)
            assert b"/a" not in daemon.engine.nodes
            assert daemon.engine.check() == []

    asyncio.run(run())


def test_a_defect_of_ours_costs_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle = Engine.handle

    def defect(engine: Engine, conn: Connection, message: Message) -> None:
        if message.op == Op.MKDIR:
            raise ZeroDivisionError
        handle(engine, conn, message)

    monkeypatch.setattr(Engine, "handle", defect)

    async def run() -> None:
        async with daemon_at(tmp_path / "socket"):
            client, other = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            await client.send(encode(Op.WRITE, 1, 0, b"/a\x001") + encode(Op.MKDIR, 2, 0, b"/b\0"))
            await client.send(encode(Op.READ, 3, 0, b"/a\0"))
            replies = [(one.req_id, one.payload) for one in await client.receive(3)]
            assert replies == [(1, b"OK\0"), (2, b"EIO\0"), (3, b"1")]
            assert await other.ask(Op.READ, "/a") == b"1"
            assert "ZeroDivisionError" in caplog.text and "MKDIR req 2" in caplog.text
            client.close()
            other.close()

    asyncio.run(run())


def test_events_reach_other_clients(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket"):
            watcher, writer = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            await watcher.ask(Op.WATCH, "/a", "t")
            await watcher.receive()
            assert await writer.ask(Op.WRITE, "/a/b", "1") == b"OK\0"
            (event,) = await watcher.receive()
            assert (event.op, event.req_id, event.tx_id, event.payload) == (
                Op.WATCH_EVENT,
                0,
                0,
                b"/a/b\0t\0",
            )
            watcher.close()
            writer.close()

    asyncio.run(run())


def test_who_does_not_read_its_replies_is_not_read_from(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            deaf, other = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            await other.ask(Op.WRITE, "/big", "x" * 4000)
            flood = deaf.request(Op.READ, "/big") * 1000
            sent = 0
            with contextlib.suppress(BlockingIOError):
                for _ in range(1000):
                    sent += deaf.sock.send(flood)
                    await other.ask(Op.READ, "/tool")
            assert sent < len(flood) * 1000
            (session,) = [one for one in daemon._sessions.values() if one.transport.backlog]
            held = session.transport.backlog + session.conn.queued
            assert held < 3 << 20, "what waits for it is bounded"
            assert await other.ask(Op.READ, "/tool") == b""
            replies = await deaf.receive(sent // 24)
            assert {len(reply.payload) for reply in replies} == {4000}, "once it reads, all is there"
            deaf.close()
            other.close()

    asyncio.run(run())


def test_a_watcher_that_never_reads_is_dropped_past_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            deaf, other = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            await deaf.ask(Op.WATCH, "/", "t" * 3000)
            (conn,) = [one for one in daemon.engine.domain(0).connections if one.watches]
            conn.queue_limit = 100_000
            number = 0
            while not conn.closed and number < 2000:
                assert await other.ask(Op.WRITE, f"/a{number}", "") == b"OK\0"
                number += 1
            assert conn.closed
            assert await deaf.ended()
            assert "does not read" in caplog.text
            deaf.close()
            other.close()

    asyncio.run(run())


def test_one_client_too_many_is_turned_away(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket", max_clients=2) as daemon:
            first, second = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            assert await first.ask(Op.READ, "/tool") == await second.ask(Op.READ, "/tool") == b""
            third = await RawStore.connect(tmp_path / "socket")
            assert await third.ended()
            first.close()
            await until(lambda: len(daemon.engine.domain(0).connections) == 1)
            fourth = await RawStore.connect(tmp_path / "socket")
            assert await fourth.ask(Op.READ, "/tool") == b""
            for client in (second, third, fourth):
                client.close()

    asyncio.run(run())


def test_out_of_descriptors_it_takes_clients_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    monkeypatch.setattr(listener, "ACCEPT_PAUSE", 0.05)

    async def run() -> None:
        async with daemon_at(tmp_path / "socket"):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            client = await RawStore.connect(tmp_path / "socket")
            assert await client.ask(Op.READ, "/tool") == b""
            late = socket.socket(socket.AF_UNIX)
            late.setblocking(False)
            highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            try:
                spare = []
                with contextlib.suppress(OSError):
                    while True:
                        spare.append(os.dup(0))
                late.connect(str(tmp_path / "socket"))
                await until(lambda: "no client is taken" in caplog.text)
                assert await client.ask(Op.READ, "/tool") == b"", "those that are there are served"
            finally:
                for fd in spare:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            raw = RawStore(late)
            assert await raw.ask(Op.READ, "/tool") == b""
            raw.close()
            client.close()

    asyncio.run(run())


def test_without_a_hypervisor_there_are_no_guests(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            client = await Client.connect(daemon.connect_local())
            with pytest.raises(StoreError, match="ENOSYS"):
                await client.introduce(5, 1, 1)
            assert not await client.is_introduced(5)
            await client.write("/after", "1")
            await client.close()

    asyncio.run(run())


def test_a_local_connection_has_the_rights_of_its_domain(tmp_path: Path) -> None:
    async def run() -> None:
        daemon = Daemon()
        dom0 = await Client.connect(daemon.connect_local())
        guest = await Client.connect(daemon.connect_local(5))
        await dom0.write("/local/domain/5/name", "five")
        await dom0.set_perms("/local/domain/5/name", ["n5"])
        assert await guest.read("name") == b"five"
        with pytest.raises(StoreError, match="EACCES"):
            await guest.write("other", "")
        with pytest.raises(StoreError, match="EACCES"):
            await guest.introduce(6, 1, 1)
        daemon.domain_died(5)
        with pytest.raises(ConnectionError):
            await guest.read("name")
        assert not await dom0.exists("/local/domain/5/name")
        for client in (guest, dom0):
            await client.close()
        await daemon.close()

    asyncio.run(run())


def test_a_report_goes_to_a_file_and_never_stops_the_daemon(tmp_path: Path) -> None:
    async def run() -> None:
        os.mkfifo(tmp_path / "fifo")
        async with daemon_at(tmp_path / "socket"):
            client = await RawStore.connect(tmp_path / "socket")
            for name in ("fifo", "none/report", "."):
                assert await client.ask(Op.CONTROL, "memreport", str(tmp_path / name)) == b"!EINVAL"
            for _ in range(2):
                assert await client.ask(Op.CONTROL, "memreport", str(tmp_path / "report")) == b"OK\0"
            assert (tmp_path / "report").read_text().count("domain 0: nodes 5 ") == 2, "it is added to"
            client.close()

    asyncio.run(run())


NOISE = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.builds(
        lambda op, tx, payload: struct.pack("<IIII", op, 1, tx, len(payload)) + payload,
        st.integers(0, 30),
        st.integers(0, 2),
        st.lists(
            st.sampled_from([b"/f", b"@releaseDomain", b"t", b"5", b"n5", b"T", b"quota"]), max_size=3
        ).map(lambda words: b"".join(word + b"\0" for word in words)),
    ),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NOISE, min_size=1, max_size=12))
def test_noise_on_one_socket_harms_no_other(tmp_path: Path, caplog, pieces: list[bytes]) -> None:
    async def run() -> None:
        async with daemon_at(tmp_path / "socket") as daemon:
            failures: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
            good, noisy = [await RawStore.connect(tmp_path / "socket") for _ in range(2)]
            assert await good.ask(Op.WRITE, "/good", "1") == b"OK\0"
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    await noisy.send(piece)
                    assert await good.ask(Op.READ, "/good") == b"1"
            noisy.close()
            await until(lambda: len(daemon.engine.domain(0).connections) == 1)
            assert await good.ask(Op.WATCH, "/good", "t") == b"OK\0"
            assert daemon.engine.check() == []
            assert failures == []
            good.close()

    asyncio.run(run())
