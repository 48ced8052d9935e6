"""CONTROL live-update: the daemon becomes another program, and its clients see no more than a pause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.kept_store import KeptStore
from tests.support.raw_store import RawStore, until
from tests.support.store_process import daemon_process
from tests.xenstore.daemon.test_process import tool, xen

from xenbus.errors import NoEntry, StoreError
from xenbus.hypervisor import broker
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.daemon.server import Daemon
from xenbus.xenstore.state.journal import replay
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.ringpage import RingTransport, Side
from xenbus.xenstore.wire import CODECS, Message, Op, Parser, encode

DEADLINE = 30.0
# A name that is a Python's, so that it gets this daemon's own arguments.
PROGRAM = sys.executable


@pytest.fixture
def rundir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lu-") as folder:
        yield Path(folder)


def generation(process: subprocess.Popen[bytes]) -> str:
    """Differs from program to program: where the kernel put it."""
    return Path(f"/proc/{process.pid}/maps").read_text().split("-")[0]


async def control(client: Client | SyncClient, *words: str) -> str:
    answer = client.control("live-update", *words)
    return answer if isinstance(answer, str) else await answer


async def update(client: Client, *options: str, program: str = PROGRAM) -> str:
    """What xenstore-control does, over a client of ours."""
    answer = await control(client, "-f", program)
    return answer if answer != "OK" else await control(client, "-s", "-t", "20", *options)


def request(number: int, op: Op, *arguments: object, tx: int = 0) -> bytes:
    return encode(op, number, tx, CODECS[op].request(*arguments))


async def collect(raw: RawStore, count: int) -> list[Message]:
    return await asyncio.wait_for(raw.receive(count), DEADLINE)


# ---- everything that a socket can have open ----


@pytest.mark.slow
def test_nothing_is_lost_under_load(rundir: Path) -> None:
    """Two updates, one after the other, while: transactions are open, one of them without a chance; watches
    have events that nobody has read; half a request was sent; answers wait that nobody reads, and requests
    behind them; clients write and read back all the time; Debian's xenstore-watch and test-xenstore run."""
    environment = {**os.environ, "XENSTORED_RUNDIR": str(rundir)}
    control_program = tool("xenstore-control")

    async def run(process: subprocess.Popen[bytes]) -> None:
        path = rundir / "socket"
        store = await Client.connect(str(path), timeout=DEADLINE)
        await store.write("/big", "y" * 2000)
        raw = await RawStore.connect(path)
        await store.write("/tx", "")
        tx = int((await raw.ask(Op.TRANSACTION_START)).rstrip(b"\0"))
        doomed = int((await raw.ask(Op.TRANSACTION_START)).rstrip(b"\0"))
        await raw.ask(Op.WRITE, "/tx/made", "in it", tx=tx)
        await raw.ask(Op.READ, "/big", tx=doomed)
        await store.write("/big", "y" * 2000)
        half = await RawStore.connect(path)
        message = half.request(Op.WRITE, "/half", "z" * 1000)
        await half.send(message[:500])
        lazy = await RawStore.connect(path)
        await lazy.ask(Op.WATCH, "/lazy", "t")
        (first,) = await collect(lazy, 1)
        assert first.payload == b"/lazy\0t\0"
        requests = b"".join(request(number, Op.READ, "/big") for number in range(1000, 4000))
        feeding = asyncio.create_task(lazy.send(requests))
        await until(lambda: feeding.done() or len(select.select([], [lazy.sock], [], 0)[1]) == 0, DEADLINE)
        for number in range(5):
            await store.write(f"/lazy/{number}", "")
        busy = [asyncio.create_task(write_and_read(rundir, who)) for who in range(3)]
        watch = await asyncio.create_subprocess_exec(
            tool("xenstore-watch"), "-n", "3", "/seen", env=environment, stdout=subprocess.PIPE
        )
        assert watch.stdout is not None
        assert await asyncio.wait_for(watch.stdout.readline(), DEADLINE) == b"/seen\n"
        test = await asyncio.create_subprocess_exec(
            tool("test-xenstore"), "-i", "300", env=environment, stdout=subprocess.PIPE
        )
        for number in range(2):
            before = generation(process)
            done = await asyncio.create_subprocess_exec(
                control_program, "live-update", PROGRAM, env=environment
            )
            assert await asyncio.wait_for(done.wait(), DEADLINE) == 0
            assert generation(process) != before
            await store.write("/seen/after", str(number))
        assert process.poll() is None
        # The transactions.
        assert await raw.ask(Op.READ, "/tx/made", tx=tx) == b"in it"
        assert await raw.ask(Op.TRANSACTION_END, True, tx=doomed) == b"!EAGAIN"
        assert await raw.ask(Op.TRANSACTION_END, True, tx=tx) == b"OK\0"
        assert await store.read("/tx/made") == b"in it"
        # The rest of the request.
        await half.send(message[500:])
        (answer,) = await collect(half, 1)
        assert answer.op == Op.WRITE
        assert await store.read("/half") == b"z" * 1000
        # The answers, and the events, each once and in order.
        got = await collect(lazy, 3000 + 5)
        await feeding
        answers = [one for one in got if one.op == Op.READ]
        assert [one.req_id for one in answers] == list(range(1000, 4000))
        assert {one.payload for one in answers} == {b"y" * 2000}
        events = [one.payload for one in got if one.op == Op.WATCH_EVENT]
        assert events == [b"/lazy/%d\0t\0" % number for number in range(5)]
        # Those who were busy, and Debian's.
        for task in busy:
            task.cancel()
        counts = await asyncio.gather(*busy)
        assert min(counts) > 10
        assert await asyncio.wait_for(watch.stdout.read(), DEADLINE) == b"/seen/after\n" * 2
        out, _ = await asyncio.wait_for(test.communicate(), DEADLINE)
        assert test.returncode == 0, out
        await watch.wait()
        assert await store.control("check") == "OK"
        for client in (raw, half, lazy):
            client.close()
        await store.close()

    with daemon_process(rundir) as process:
        asyncio.run(run(process))


async def write_and_read(rundir: Path, who: int) -> int:
    """Counts, until it is cancelled: no request may fail or be answered wrongly."""
    count = 0
    async with await Client.connect(str(rundir / "socket"), timeout=DEADLINE) as store:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                count += 1
                await store.write(f"/busy/{who}", str(count))
                assert await store.read(f"/busy/{who}") == str(count).encode()
    return count


# ---- guests ----


@pytest.mark.slow
def test_guests_on_rings_go_on(rundir: Path) -> None:
    """Half a request longer than the ring, answers without room, a transaction, watches; a guest that works
    all the time."""
    kept = KeptStore(rundir)
    try:
        dom0 = kept.start()
        half, full, busy = (kept.introduce(dom0, domid) for domid in (5, 6, 7))
        long = request(1, Op.WRITE, "/local/domain/5/long", "x" * 1500)
        half.send([long[:900]], 5)
        dom0.write("/big", "y" * 700)
        dom0.set_perms("/big", ["r0"])
        full.send([request(number, Op.READ, "/big") for number in range(1, 5)], 5)
        guest = SyncClient(busy, timeout=DEADLINE)
        watch = guest.watch("seen")
        assert guest.poll_watch(5) == (watch, "seen")
        stop, counts = threading.Event(), [0]

        def work() -> None:
            while not stop.is_set():
                counts[0] += 1
                guest.write("count", str(counts[0]))
                assert guest.read("count") == str(counts[0]).encode()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(2):
                assert asyncio.run(update(dom0)) == "OK"  # type: ignore[arg-type]
                before = counts[0]
                dom0.write("/local/domain/7/seen", str(number))
                while counts[0] < before + 20:
                    assert worker.is_alive()
        finally:
            stop.set()
            worker.join(DEADLINE)
        # Nothing was set anew and nothing fired besides: two writes, one of them perhaps merged.
        events = []
        while (event := guest.poll_watch(0.05)) is not None:
            events.append(event)
        assert set(events) == {(watch, "seen")}
        assert 1 <= len(events) <= 2
        half.send([long[900:]], 5)
        assert [message.op for message in Parser().feed(half.receive(5))] == [Op.WRITE]
        parser, got = Parser(), []
        while len(got) < 4:
            got += parser.feed(full.receive(5))
        assert [(one.req_id, one.payload) for one in got] == [(n, b"y" * 700) for n in range(1, 5)]
        # And the file: it is the new daemon's now.
        image = replay(kept.state.read_bytes()).image
        assert image.nodes[b"/local/domain/5/long"]
        guest.close()
        half.close()
        full.close()
        dom0.close()
    finally:
        kept.close()


@pytest.mark.slow
def test_a_domain_that_dies_meanwhile_is_noticed(rundir: Path) -> None:
    """Over the broker, whose handle is handed on: the guest's ring goes on, and its end is told."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = broker.Broker()
        server.create(0)
        primary = await broker.connect(server.handle(0))
        sock = server.handle(0, privileged=True)
        manager = daemon_process(
            rundir,
            "--broker-fd",
            str(sock.fileno()),
            pass_fds=(sock.fileno(),),
            says="(xenstored: domain . is gone: .*\n)?",
        )
        process = await loop.run_in_executor(None, manager.__enter__)
        sock.close()
        store = await Client.connect(str(rundir / "socket"), timeout=DEADLINE)
        heard: list[str] = []
        await store.watch("@releaseDomain", heard.append)
        guests = []
        for domid in (5, 6):
            server.create(domid, store_domid=0)
            hv = await broker.connect(server.handle(domid))
            ends: list[RingTransport] = []
            info = await hv.start_info(lambda ends=ends: [end.on_event() for end in ends] and None)  # type: ignore[misc]
            ends.append(RingTransport(info.store_page, info.store_channel.notify, Side.GUEST, "xenstored"))
            client = await Client.connect(ends[0], timeout=DEADLINE)
            await store.write(f"/local/domain/{domid}", "")
            await store.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
            await store.introduce(domid, 0, server.store_port(domid))
            await client.write("mine", "1")
            guests.append((hv, client))
        seen: asyncio.Queue[str] = asyncio.Queue()
        await guests[0][1].watch("seen", seen.put_nowait)
        assert await asyncio.wait_for(seen.get(), DEADLINE) == "seen"
        before = generation(process)
        dying = asyncio.create_task(update(store))
        # Any time from the trial to the new program's start.
        await until(lambda: generation(process) != before or dying.done(), DEADLINE)
        await guests[1][0].close()
        assert await asyncio.wait_for(dying, DEADLINE) == "OK"
        await store.wait_for("/local/domain/6", lambda value: value is None, DEADLINE)
        await until(lambda: len(heard) == 2, DEADLINE)
        assert await guests[0][1].read("mine") == b"1"
        await store.write("/local/domain/5/seen", "")
        assert await asyncio.wait_for(seen.get(), DEADLINE) == "seen"
        # A second one, and the domain's end after it.
        assert await asyncio.wait_for(update(store), DEADLINE) == "OK"
        assert await guests[0][1].read("mine") == b"1"
        await guests[0][0].close()
        await until(lambda: len(heard) == 3, DEADLINE)
        assert not await store.is_introduced(5)
        await store.close()
        for _, client in guests:
            await client.close()
        await primary.close()
        await server.close()
        assert await loop.run_in_executor(None, process.wait, DEADLINE) == 0
        await loop.run_in_executor(None, manager.__exit__, None, None, None)

    asyncio.run(run())


# ---- what does not happen ----


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """One daemon that outlives everything below."""
    with tempfile.TemporaryDirectory(prefix="lu-") as folder, daemon_process(Path(folder)) as process:
        yield Path(folder), process


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("exit 0", "does not take the store (exit 0): it said nothing"),
        ("echo no such library >&2; exit 127", "(exit 127): no such library"),
        ("kill -9 $$", "does not take the store (exit -9): it said nothing"),
        ("exec {python} -c 'import os; print(os.environ)'", "does not take the store (exit 0)"),
        ("exec {python} -m xenbus.xenstore.daemon --what", "error: "),
    ],
)
def test_a_program_that_fails_never_takes_over(
    served: tuple[Path, subprocess.Popen[bytes]], tmp_path: Path, text: str, answer: str
) -> None:
    rundir, process = served
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{text.format(python=sys.executable)}\n")
    program.chmod(0o755)
    before = generation(process)
    with SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as store:
        store.write("/still", "here")
        said = asyncio.run(update(store, program=str(program)))  # type: ignore[arg-type]
        assert answer in said
        assert str(program) in said
        assert store.read("/still") == b"here"
        # What was begun is over: another may begin.
        assert asyncio.run(control(store, "-a")) == "no live update was begun"
    assert generation(process) == before


@pytest.mark.slow
def test_a_script_may_be_the_program(served: tuple[Path, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    rundir, process = served
    program = tmp_path / "xenstored"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m xenbus.xenstore.daemon "$@"\n')
    program.chmod(0o755)
    before = generation(process)
    with SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as store:
        store.set_quota("watches", 41)
        assert asyncio.run(update(store, program=str(program))) == "OK"  # type: ignore[arg-type]
        assert generation(process) != before
        assert store.get_quota("watches") == 41
        words = f"-m xenbus.xenstore.daemon --socket {rundir}/socket --quota nodes=77"
        assert store.control("live-update", "-f", PROGRAM) == "OK"
        assert store.control("live-update", "-c", words) == "OK"
        assert store.control("live-update", "-s", "-t", "20", "-v", "1") == "OK"
        # The stream's word counts, not the new command line's.
        assert store.get_quota("nodes") == 1000
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[1:-1] == words.encode().split()


def test_words_in_the_wrong_order(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    rundir, _ = served
    with (
        SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as one,
        SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as other,
    ):

        def say(client: SyncClient, *words: str) -> str:
            try:
                return client.control("live-update", *words)
            except StoreError as error:
                return error.name

        assert say(one, "-s") == "this connection began no live update"
        assert say(one, "-c", "--socket x") == "this connection began no live update"
        assert say(one, "-a") == "no live update was begun"
        assert say(one, "-f", "/nonexistent") == "/nonexistent: there is no such file"
        assert say(one, "-f", "/etc/passwd") == "/etc/passwd: it cannot be executed"
        assert say(one, "-f", PROGRAM) == "OK"
        assert say(other, "-f", PROGRAM) == "another live update was begun already"
        assert say(other, "-s") == "this connection began no live update"
        assert say(one, "-s", "-v", "3") == "version 3 of the record stream is not known"
        for words in (
            [],
            ["-x"],
            ["-f"],
            ["-a", "x"],
            ["-c"],
            ["-s", "-t"],
            ["-s", "-t", "x"],
            ["-s", "-q", "1"],
        ):
            assert say(one, *words) == "EINVAL"
        assert say(other, "-a") == "OK"
        assert say(one, "-s") == "this connection began no live update"
        assert say(one, "-f", PROGRAM) == "OK"
    with SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as third:
        # Who began it is gone.
        assert say(third, "-f", PROGRAM) == "OK"
        assert say(third, "-a") == "OK"


def test_it_can_be_called_off(served: tuple[Path, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    rundir, process = served
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n: > {tmp_path}/runs\nexec sleep 1000\n")
    program.chmod(0o755)

    async def run() -> str:
        one, other = [await Client.connect(str(rundir / "socket"), timeout=DEADLINE) for _ in range(2)]
        task = asyncio.create_task(update(one, program=str(program)))
        await until((tmp_path / "runs").exists, DEADLINE)
        assert await control(other, "-a") == "OK"
        answer = await asyncio.wait_for(task, DEADLINE)
        await one.close()
        await other.close()
        return answer

    before = generation(process)
    assert asyncio.run(run()) == "it was called off"
    assert generation(process) == before


def test_a_guest_may_not_and_an_embedded_store_cannot(tmp_path: Path) -> None:
    async def run() -> None:
        daemon = Daemon()
        guest = await Client.connect(daemon.connect_local(5))
        with pytest.raises(StoreError, match="EACCES"):
            await guest.control("live-update", "-f", PROGRAM)
        store = await Client.connect(daemon.connect_local())
        assert "a part of another program" in await control(store, "-f", PROGRAM)
        await guest.close()
        await store.close()
        await daemon.close()

    asyncio.run(run())


@pytest.mark.slow
def test_oxenstoreds_transactions_hold_it_up(rundir: Path) -> None:
    """They are snapshots, and have no place in the stream: -F drops those that are open after -t seconds."""
    with daemon_process(rundir, "--profile", "oxenstored") as process:

        async def run() -> None:
            store = await Client.connect(str(rundir / "socket"), timeout=DEADLINE)
            raw = await RawStore.connect(rundir / "socket")
            tx = int((await raw.ask(Op.TRANSACTION_START)).rstrip(b"\0"))
            before = generation(process)
            assert await control(store, "-f", PROGRAM) == "OK"
            assert await control(store, "-s", "-t", "0") == "transactions are open: domain 0"
            assert generation(process) == before
            assert await control(store, "-f", PROGRAM) == "OK"
            assert await control(store, "-s", "-t", "0", "-F") == "OK"
            assert generation(process) != before
            assert (await raw.ask(Op.TRANSACTION_END, True, tx=tx))[:1] == b"!"
            tx = int((await raw.ask(Op.TRANSACTION_START)).rstrip(b"\0"))
            assert await control(store, "-f", PROGRAM) == "OK"
            task = asyncio.create_task(control(store, "-s", "-t", "20"))
            await store.write("/x", "1")
            assert await raw.ask(Op.TRANSACTION_END, True, tx=tx) == b"OK\0"
            assert await asyncio.wait_for(task, DEADLINE) == "OK"
            assert await store.read("/x") == b"1"
            raw.close()
            await store.close()

        asyncio.run(run())


@pytest.mark.slow
def test_with_a_state_file(rundir: Path) -> None:
    """The lock is held throughout, and the file is the new daemon's."""
    state = rundir / "state"
    with daemon_process(rundir, "--state", str(state)):
        with SyncClient.connect(str(rundir / "socket"), timeout=DEADLINE) as store:
            store.write("/before", "1")
            assert asyncio.run(update(store)) == "OK"  # type: ignore[arg-type]
            store.write("/after", "2")
            nodes = replay(state.read_bytes()).image.nodes
            assert {b"/before", b"/after"} <= set(nodes)
            with pytest.raises(Exception, match="another daemon"):
                Keeper(state)
            with pytest.raises(NoEntry):
                store.read("/none")
        assert xen(rundir, "xenstore-read", "/after") == "2\n"
