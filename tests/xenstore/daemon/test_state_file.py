"""`--state FILE`: what was answered is there after kill -9; a bad file is refused by name; guests go on."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.kept_store import KeptStore
from tests.support.raw_store import RawStore
from tests.xenstore.daemon.test_process import DEADLINE

from xenbus.errors import LinkDown, NoEntry, UsageError
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import keeper as keeping
from xenbus.xenstore.daemon.__main__ import main
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.daemon.server import Daemon
from xenbus.xenstore.state.journal import replay
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.wire import CODECS, HEADER, Op, Parser, encode


def run_daemon(rundir: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """One that will be killed."""
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "xenbus.xenstore.daemon", "--socket", str(rundir / "socket")]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(theirs), "--state", str(rundir / "state"), *arguments],
        pass_fds=(theirs,),
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    try:
        if os.read(ready, 100) != b"ready\n":
            raise AssertionError(process.communicate(timeout=DEADLINE)[1].decode())
    finally:
        os.close(ready)
    return process


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> str:
    process.send_signal(number)
    return process.communicate(timeout=DEADLINE)[1].decode()


def test_nothing_that_was_answered_is_lost_when_it_is_killed(tmp_path: Path) -> None:
    """Four clients write as fast as they can, in transactions too; it is killed in the middle, four times.
    A value may be newer than the last answer, never older."""
    chance = random.Random(5)
    answered: dict[str, int] = {}

    async def client(who: int, ends: asyncio.Event) -> None:
        async with await Client.connect(str(tmp_path / "socket")) as store:
            count = max((value for path, value in answered.items() if f"/{who}/" in path), default=0)
            try:
                while not ends.is_set():
                    count += 1
                    path = f"/load/{who}/{count % 7}"
                    if who == 0:

                        async def both(tx, path: str = path, count: int = count) -> None:  # type: ignore[no-untyped-def]
                            await tx.write(path, str(count))
                            await tx.write(path + "x", str(count))

                        await store.transaction(both)
                        answered[path + "x"] = count
                    elif count % 5 == 4:
                        await store.rm(path)
                        answered[path] = -count
                        continue
                    else:
                        await store.write(path, str(count))
                    answered[path] = count
            except (LinkDown, NoEntry):
                return

    async def round_(process: subprocess.Popen[bytes]) -> None:
        ends = asyncio.Event()
        tasks = [asyncio.create_task(client(who, ends)) for who in range(4)]
        goal = len(answered) + sum(map(abs, answered.values())) + chance.randrange(200, 600)
        while sum(map(abs, answered.values())) < goal:  # noqa: ASYNC110
            await asyncio.sleep(0)
        process.kill()
        ends.set()
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)

    for _ in range(4):
        process = run_daemon(tmp_path)
        asyncio.run(round_(process))
        assert end(process) == ""
        (tmp_path / "socket").unlink()
        image = replay((tmp_path / "state").read_bytes()).image
        for path, count in answered.items():
            placed = image.nodes.get(path.encode())
            found = int(placed.record.value) if placed else 0  # type: ignore[union-attr]
            assert found > abs(count) or found == max(count, 0), path
    process = run_daemon(tmp_path)
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        assert sorted(store.directory("/load")) == ["0", "1", "2", "3"]
        assert store.control("check") == "OK"
    assert end(process, signal.SIGTERM) == ""


def test_what_is_kept_and_what_is_not(tmp_path: Path) -> None:
    process = run_daemon(tmp_path, "--quota", "nodes=77")
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        store.write("/a/b", b"\0\xff")
        store.write("/a/c", "")
        store.set_perms("/a/c", ["n0", "r5"])
        store.set_quota("watches", 55)
    assert end(process) == ""
    assert oct((tmp_path / "state").stat().st_mode)[-3:] == "600"
    (tmp_path / "socket").unlink()
    process = run_daemon(tmp_path, "--quota", "node-size=99")
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        assert store.read("/a/b") == b"\0\xff"
        assert store.directory("/a") == ["b", "c"]
        assert [str(perm) for perm in store.get_perms("/a/c")] == ["n0", "r5"]
        assert [store.get_quota(name) for name in ("nodes", "watches", "node-size")] == [77, 55, 99]
        store.rm("/a")
    assert end(process, signal.SIGTERM) == ""
    process = run_daemon(tmp_path)
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        assert not store.exists("/a")
        assert store.exists("/tool/xenstored")
    assert end(process, signal.SIGTERM) == ""


def test_a_torn_end_is_cut_off_and_damage_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = run_daemon(tmp_path)
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        for number in range(3):
            store.write(f"/n/{number}", "value")
    assert end(process) == ""
    file = tmp_path / "state"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    process = run_daemon(tmp_path)
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        assert store.directory("/n") == ["0", "1"]
        store.write("/n/later", "")
    assert "cut off at byte" in end(process)
    arguments = ["--socket", str(tmp_path / "other"), "--state", str(file)]
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    for data, text in (
        (bytes(damaged), "damaged, but batch"),
        (whole[:40], "record 0"),
        (b"", "header at byte 0: 0 bytes"),
        (b"something else entirely", "begins with b'somethin'"),
    ):
        file.write_bytes(data)
        assert main(arguments) == 1
        assert text in caplog.text
        assert f"state file {file}; move it away" in caplog.text
        assert file.read_bytes() == data, "it is left as it was"
        caplog.clear()


def test_a_file_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "LOCK_SECONDS", 0.0)
    process = run_daemon(tmp_path)
    for state, text in (
        (tmp_path / "state", "another daemon keeps its store there"),
        (tmp_path / "none" / "state", "No such file or directory"),
        (tmp_path, "not a regular file"),
        (tmp_path / "socket", "not a regular file"),
    ):
        assert main(["--socket", str(tmp_path / "other"), "--state", str(state)]) == 1
        assert f"state file {state}" in caplog.text
        assert text in caplog.text
        caplog.clear()
    with SyncClient.connect(str(tmp_path / "socket")) as store:
        store.write("/still", "there")
    assert end(process) == ""


def test_a_full_disk_is_said_and_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is served on; CONTROL check says that the file is behind, until it is not."""
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.02)
    file = tmp_path / "state"

    async def run() -> list[str]:
        daemon = Daemon(keeper=Keeper(file))
        await daemon.go_on()
        store = await Client.connect(daemon.connect_local())
        await store.write("/before", "1")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
        try:
            answers = []
            for number in range(3):
                await store.write(f"/meanwhile/{number}", "2" * 50)
            answers.append(await store.control("check"))
            assert set(replay(file.read_bytes()).image.nodes) >= {b"/before"}
            assert not replay(file.read_bytes()).torn
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        async with asyncio.timeout(DEADLINE):
            while (answer := await store.control("check")) != "OK":  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        answers.append(answer)
        assert b"/meanwhile/2" in replay(file.read_bytes()).image.nodes
        await store.write("/after", "3")
        assert b"/after" in replay(file.read_bytes()).image.nodes
        await store.close()
        await daemon.close()
        return answers

    assert asyncio.run(run()) == [f"state file {file} is behind: File too large", "OK"]


def test_the_file_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "COMPACT_BYTES", 2000)
    file = tmp_path / "state"

    async def run() -> None:
        daemon = Daemon(keeper=Keeper(file))
        await daemon.go_on()
        store = await Client.connect(daemon.connect_local())
        sizes = []
        for number in range(400):
            await store.write("/counter", str(number))
            sizes.append(file.stat().st_size)
            found = replay(file.read_bytes())
            assert not found.torn
            assert found.image.nodes[b"/counter"].record.value == b"%d" % number  # type: ignore[union-attr]
        assert max(sizes) < 12_000
        assert sum(after < before for before, after in itertools.pairwise(sizes)) > 2
        await store.close()
        await daemon.close()
        assert not file.with_name("state.new").exists()

    asyncio.run(run())


def test_off_costs_nothing_and_says_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        daemon = Daemon()
        await daemon.go_on()
        assert type(daemon.engine).__name__ == "Engine"
        await daemon.close()

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "LOCK_SECONDS", 0.0)

    async def run() -> None:
        for _ in range(3):
            daemon = Daemon(keeper=Keeper(tmp_path / "state"))
            await daemon.go_on()
            with pytest.raises(UsageError, match="another daemon"):
                Keeper(tmp_path / "state")
            await daemon.close()

    asyncio.run(run())


# ---- guests ----


@pytest.fixture
def kept() -> Iterator[KeptStore]:
    # A short path: a socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kept-") as folder:
        store = KeptStore(Path(folder))
        try:
            yield store
        finally:
            store.close()


def test_a_guest_goes_on_with_a_new_daemon(kept: KeptStore) -> None:
    dom0 = kept.start()
    with SyncClient(kept.introduce(dom0, 5)) as guest:
        guest.write("data/mine", "1")
        watch = guest.watch("data")
        assert guest.poll_watch(5) == (watch, "data")
        dom0.close()
        kept.kill()
        dom0 = kept.start()
        # An event may be lost with the daemon: each watch fires once.
        assert guest.poll_watch(5) == (watch, "data")
        assert guest.read("data/mine") == b"1"
        dom0.write("/local/domain/5/data/other", "2")
        assert guest.poll_watch(5) == (watch, "data/other")
        with pytest.raises(NoEntry):
            guest.read("nothing")
        assert dom0.is_introduced(5)
        kept.kill()
        kept.machine.remove(5)
        dom0.close()
        dom0 = kept.start()
        assert not dom0.is_introduced(5)
        assert not dom0.exists("/local/domain/5")
        dom0.close()


def request(number: int, op: Op, *arguments: object) -> bytes:
    return encode(op, number, 0, CODECS[op].request(*arguments))


def test_half_a_request_and_answers_without_room_outlive_it(kept: KeptStore) -> None:
    """A request longer than the ring, of which the daemon has read the first part; and more answers than the
    ring has room for, of which one is in there in part."""
    dom0 = kept.start()
    rings = [kept.introduce(dom0, domid) for domid in (5, 6)]
    half, full = rings
    long = request(1, Op.WRITE, "/local/domain/5/long", "x" * 1500)
    half.send([long[:900]], 5)
    dom0.write("/big", "y" * 700)
    dom0.set_perms("/big", ["r0"])
    full.send([request(number, Op.READ, "/big") for number in range(1, 5)], 5)
    deadline = time.monotonic() + DEADLINE

    def under_way() -> bool:
        connections = {one.record.conn_id: one.record for one in image().connections.values()}
        return len(connections[5].inbound) == 900 and len(connections[6].outbound) > 0

    def image():  # type: ignore[no-untyped-def]
        return replay(kept.state.read_bytes()).image

    while not under_way():
        assert time.monotonic() < deadline
    dom0.close()
    kept.kill()
    dom0 = kept.start()
    half.send([long[900:]], 5)
    parser = Parser()
    messages = parser.feed(half.receive(5))
    assert [(message.op, message.req_id) for message in messages] == [(Op.WRITE, 1)]
    assert len(dom0.read("/local/domain/5/long")) == 1500
    got = []
    parser = Parser()
    while len(got) < 4:
        got += parser.feed(full.receive(5))
    assert [(message.req_id, message.payload) for message in got] == [(n, b"y" * 700) for n in range(1, 5)]
    assert not parser.buffered
    # Once more, with half of what is left taken.
    full.send([request(number, Op.READ, "/big") for number in range(5, 9)], 5)
    while not len(image().connections[6].record.outbound) > HEADER.size:
        assert time.monotonic() < deadline
    got = parser.feed(full.receive(5))
    dom0.close()
    kept.kill()
    dom0 = kept.start()
    while len(got) < 4:
        got += parser.feed(full.receive(5))
    assert [message.req_id for message in got] == [5, 6, 7, 8]
    for ring in rings:
        ring.close()
    dom0.close()


def test_a_raw_client_sees_its_answer_only_after_the_file_has_it(tmp_path: Path) -> None:
    async def run() -> None:
        daemon = Daemon(keeper=Keeper(tmp_path / "state"))
        await daemon.go_on()
        await daemon.listen_unix(tmp_path / "socket")
        raw = await RawStore.connect(tmp_path / "socket")
        for number in range(20):
            await raw.ask(Op.WRITE, "/x", str(number))
            image = replay((tmp_path / "state").read_bytes()).image
            assert image.nodes[b"/x"].record.value == b"%d" % number  # type: ignore[union-attr]
        raw.close()
        await daemon.close()

    asyncio.run(run())
