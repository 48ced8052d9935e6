"""`xenbus store record`, `decode` and `replay`: other people's programs and ours, our daemon and Debian's."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.xenstored import Xenstored, needs, start

from xenbus.cli import recordings
from xenbus.cli.main import run
from xenbus.errors import LinkDown, UsageError
from xenbus.xenstore import calls, listener, relay, rerun
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transcript import explain
from xenbus.xenstore.transport import recording
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.recording import Record, Tape, read_recording
from xenbus.xenstore.transport.unix import UnixPipe, dial
from xenbus.xenstore.wire.message import HEADER, Message, Op, Parser, encode

PYTHON = [sys.executable, "-c"]
CLIENT = """
from xenbus.xenstore.sync import SyncClient
with SyncClient.connect() as store, SyncClient.connect() as other:
    store.write("/r/a", b"1\\xff")
    watch = store.watch("/r")
    other.write("/r/b", "2")
    batch = store.batch()
    batch.write("/r/c", "3"); batch.read("/r/a")
    batch.commit()
    store.transaction(lambda tx: tx.write("/r/a", tx.read("/r/b")))
    other.get("/r/none")
    store.set_perms("/r/b", ["n0", "r3"])
    store.get_perms("/r/b")
    for _ in range(4):
        store.poll_watch(5)
"""


@pytest.fixture
def daemon(tmp_path_factory) -> Iterator[Xenstored]:
    with start("ours", tmp_path_factory.mktemp("d")) as daemon:
        yield daemon


@pytest.fixture
def xenbus(capfd) -> Any:
    """xenbus("decode", ...) -> (exit code, stdout, stderr) of `xenbus store decode ...`."""

    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(["store", *map(str, words)])
        done = capfd.readouterr()
        return code, done.out, done.err

    return call


def at(daemon: Xenstored) -> list[object]:
    return ["--socket", daemon.socket]


def test_somebody_elses_program_is_recorded_and_read(daemon, xenbus, tmp_path) -> None:
    ls = shutil.which("xenstore-ls")
    if ls is None:
        pytest.skip("xenstore-ls (xenstore-utils) is not installed")
    daemon.toolstack.write("/l/a", "two\nwords")
    daemon.toolstack.mkdir("/l/empty")
    tape = tmp_path / "tape"
    tape.touch(0o644)
    code, out, err = xenbus("record", *at(daemon), tape, "--", ls, "-f", "/l")
    assert (code, out) == (0, '/l/a = "two\\nwords"\n/l/empty = ""\n')
    assert err == f"{tape}: 10 messages of 1 connections\n"
    assert stat.S_IMODE(tape.stat().st_mode) == 0o600
    code, out, _ = xenbus("decode", tape)
    said = [line[21:] for line in out.splitlines()]
    assert code == 0 and len(said) == 10
    assert said[:4] == ["DIRECTORY /l", "DIRECTORY /l: a empty", "READ /l/a", 'READ /l/a: "two\\nwords"']
    assert said[-1] == "DIRECTORY /l/empty: (none)"


@pytest.mark.parametrize("kind", ["ours", pytest.param("c", marks=needs("c"))])
def test_what_one_daemon_said_another_says(kind, daemon, xenbus, tmp_path, tmp_path_factory) -> None:
    """Recorded from one daemon, replayed to ours, and once more where it differs."""
    tape = tmp_path / "tape"
    with start(kind, tmp_path_factory.mktemp("e")) as first:
        code, _, err = xenbus("record", *at(first), tape, "--", *PYTHON, CLIENT)
        assert code == 0, err
        assert "of 2 connections" in err
    records = list(read_recording(tape))
    answers = sum(not record.outgoing for record in records)
    assert sum(record.message.op == Op.WATCH_EVENT for record in records) >= 4
    assert xenbus("replay", *at(daemon), tape) == (0, f"{answers} answers, all the same\n", "")
    assert daemon.toolstack.dump("/r") == {"/r": b"", "/r/a": b"2", "/r/b": b"2", "/r/c": b"3"}
    daemon.toolstack.write("/r/none", "there")
    code, out, _ = xenbus("replay", *at(daemon), tape)
    lines = out.splitlines()
    assert code == 1 and "answers are the same; message" in lines[0]
    assert lines[1:] == ["recorded: READ /r/none: ENOENT", '     now: READ /r/none: "there"']
    code, out, _ = xenbus("replay", "--json", *at(daemon), tape)
    found = json.loads(out)["difference"]
    assert code == 1
    assert (found["recorded"]["error"], found["got"]["result"]) == ("ENOENT", "there")


def test_decoded_for_programs(daemon, xenbus, tmp_path) -> None:
    tape = tmp_path / "tape"
    assert xenbus("record", *at(daemon), tape, "--", *PYTHON, CLIENT)[0] == 0
    code, out, _ = xenbus("decode", "--json", tape)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    by_op: dict[str, list[Any]] = {}
    for line in lines:
        by_op.setdefault(f"{line['kind']} {line['op']}", []).append(line)
    assert by_op["request WRITE"][0]["arguments"] == {"path": "/r/a", "value": {"base64": "Mf8="}}
    assert by_op["request TRANSACTION_END"][0]["arguments"] == {"commit": True}
    assert by_op["request TRANSACTION_END"][0]["tx_id"] > 0
    assert by_op["reply GET_PERMS"][0]["result"] == ["n0", "r3"]
    assert by_op["request SET_PERMS"][0]["arguments"] == {"path": "/r/b", "perms": ["n0", "r3"]}
    assert by_op["error READ"][0]["error"] == "ENOENT" and by_op["error READ"][0]["took"] >= 0
    assert by_op["event WATCH_EVENT"][0]["arguments"] == {"path": "/r", "token": "1"}
    assert {line["connection"] for line in lines} == {1, 2}
    said = xenbus("decode", tape)[1]
    assert " > " in said and "TRANSACTION_END commit in transaction" in said
    assert "event /r/b token 1" in said


def test_the_commands_own_exit_code(daemon, xenbus, tmp_path) -> None:
    assert xenbus("record", *at(daemon), tmp_path / "t", "--", "sh", "-c", "exit 7")[0] == 7
    assert xenbus("record", *at(daemon), tmp_path / "t", "--", "sh", "-c", "kill -9 $$")[0] == 137


def test_who_ends_it_ends_the_command(daemon, tmp_path) -> None:
    """SIGTERM is passed on, SIGINT is the command's own; what it says at its end is recorded too."""
    tape = tmp_path / "t"
    program = """
import signal
from xenbus.xenstore.sync import SyncClient
with SyncClient.connect() as store:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("began", store.connected, flush=True)
    signal.sigwait([signal.SIGTERM])
    store.write("/last", "1")
raise SystemExit(5)
"""
    command = [sys.executable, "-m", "xenbus.cli.main", "store", "record", str(tape)]
    command += ["--socket", str(daemon.socket), "--", *PYTHON, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "began True\n"
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=10)
            assert process.returncode == 5 and "2 messages" in err, err
        finally:
            process.kill()
    assert [record.message.op for record in read_recording(tape)] == [Op.WRITE, Op.WRITE]


def test_a_disk_without_room_is_no_matter_for_the_command(daemon, xenbus) -> None:
    code, _, err = xenbus("record", *at(daemon), "/dev/full", "--", *PYTHON, CLIENT)
    assert code == 0 and "the rest was not recorded" in err, err


def test_a_socket_for_whoever_connects(daemon, tmp_path) -> None:
    tape, where = tmp_path / "tape", tmp_path / "s"
    command = [sys.executable, "-m", "xenbus.cli.main", "store", "record", str(tape)]
    command += ["--listen", str(where), "--socket", str(daemon.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            assert stat.S_IMODE(where.stat().st_mode) == 0o600
            with SyncClient.connect(where, timeout=10) as client:
                client.write("/s/a", "x" * 4000)
                replies = [client.submit(call) for call in _reads(600)]
                assert client.read("/s/a") == b"x" * 4000
                assert all(reply.result() == b"x" * 4000 for reply in replies)
                # Longer than the protocol has it: hung up on, as by a store.
                with pytest.raises((LinkDown, OSError)):
                    client._pipe.send([HEADER.pack(Op.READ, 1, 0, 8192) + b"a" * 8192], 5)
                    client.read("/s/a")
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=10)
            assert process.returncode == 0 and "of 1 connections" in err
        finally:
            process.kill()
    assert not where.exists()
    assert sum(record.message.op == Op.READ for record in read_recording(tape)) >= 1202


def _reads(count: int) -> Any:
    return [calls.read("/s/a") for _ in range(count)]


def test_what_cannot_be_done_is_said(daemon, xenbus, tmp_path) -> None:
    tape = tmp_path / "t"
    for words, code, said in (
        (["record", *at(daemon), tape], 2, "give a command to run"),
        (["record", "--socket", tmp_path / "none", tape, "--", "true"], 6, "no XenStore answers"),
        (["record", *at(daemon), tmp_path / "no" / "t", "--", "true"], 2, "No such file"),
        (["record", *at(daemon), tape, "--", "/no/such/program"], 2, "/no/such/program"),
        (["record", *at(daemon), tape, "--listen", tmp_path, "--", "true"], 2, "cannot listen"),
        (["decode", tmp_path / "none"], 2, "No such file"),
        (["decode", __file__], 2, "no line of a recording"),
        (["replay", *at(daemon), __file__], 2, "no line of a recording"),
    ):
        found, _, err = xenbus(*words)
        assert (found, said in err, err.count("\n")) == (code, True, 1), err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    assert xenbus("decode", tmp_path / "binary")[0] == 2
    tape.write_text(Record(0, True, Message(Op.READ, 1, 0, b"/a\0")).encode() + "\n")
    assert xenbus("replay", "--socket", tmp_path / "none", tape)[0] == 6


def test_a_tape_is_bounded(daemon, xenbus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(recording, "FILE_LIMIT", 400)
    tape = tmp_path / "t"
    code, _, err = xenbus("record", *at(daemon), tape, "--", *PYTHON, CLIENT)
    assert code == 0 and "it is full" in err
    assert 0 < tape.stat().st_size <= 400


# ---- a store that answers otherwise ----


def replayed(records: list[Record], answers: list[bytes], monkeypatch) -> Any:
    """`rerun` against a store that sends this and hangs up."""
    monkeypatch.setattr(rerun, "PATIENCE", 0.2)
    near, far = socket.socketpair()

    def serve() -> None:
        far.recv(65536)
        for answer in answers:
            far.sendall(answer)
        if not answers or answers[-1] != b"":
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return rerun.rerun(records, lambda: UnixPipe(near))
    finally:
        thread.join()
        far.close()


def tape_of(*said: tuple[bool, int, int, bytes]) -> list[Record]:
    return [Record(0, out, Message(op, req_id, 0, payload)) for out, op, req_id, payload in said]


def test_where_a_store_differs(monkeypatch) -> None:
    read = (True, 2, 1, b"/a\0")
    event = (False, 15, 0, b"/a\0t\0")
    right = encode(2, 1, 0, b"v")
    fired = encode(15, 0, 0, b"/a\0t\0")
    same = tape_of(read, (False, 2, 1, b"v"), event)
    assert replayed(same, [right, fired], monkeypatch) == (2, None)
    assert replayed(same, [fired, right], monkeypatch) == (2, None)
    count, found = replayed(same, [encode(2, 1, 0, b"w"), fired], monkeypatch)
    assert (count, found.got.payload, found.record) == (0, b"w", same[1])
    count, found = replayed(same, [right, b""], monkeypatch)
    assert (count, found.got, found.closed) == (1, None, False)
    count, found = replayed(same, [right], monkeypatch)
    assert (count, found.got, found.closed) == (1, None, True)
    part = tape_of((True, 22, 1, b"/a\x000\0"), (False, 22, 1, b"7\0x\0\0"))
    assert replayed(part, [encode(22, 1, 0, b"9\0x\0\0")], monkeypatch) == (1, None)
    assert replayed(part, [encode(22, 1, 0, b"9\0y\0\0")], monkeypatch)[1] is not None


def test_a_transcript_of_nonsense() -> None:
    lines = list(
        explain(
            tape_of(
                (True, 2, 1, b"no end"),
                (False, 11, 1, b"?"),
                (False, 2, 9, b"stray"),
                (True, 99, 2, b"what"),
                (False, 16, 2, b"ENOSYS\0"),
                (False, 15, 0, b""),
                (False, 3, 9, b"zz\0"),
                (True, 2, 0, b"/a\0"),
                (True, 2, 0, b"/b\0"),
                (False, 2, 0, b"1"),
                (False, 2, 0, b"2"),
            )
        )
    )
    assert [line.raw for line in lines[:4]] == [b"no end", b"?", None, b"what"]
    assert (lines[2].result, lines[2].asked) == (b"stray", None)
    assert (lines[4].op, lines[4].error) == ("99", "ENOSYS")
    assert lines[5].raw == b"" and lines[6].raw == b"zz\0"
    assert [lines[n].asked.arguments["path"] for n in (9, 10)] == ["/a", "/b"]


def test_one_that_takes_one_request_at_a_time_gets_one(tmp_path) -> None:
    """As /dev/xen/xenbus does: whoever sends more waits, and everything is answered."""

    async def main() -> None:
        near, far = memory_pair()
        near.max_outstanding = 1  # type: ignore[misc]
        most = waiting = 0

        class Slow:
            parser = Parser()

            def data_received(self, data: Any) -> None:
                nonlocal most, waiting
                for message in self.parser.feed(data):
                    waiting += 1
                    most = max(most, waiting)
                    asyncio.get_running_loop().call_soon(self.answer, message)

            def answer(self, message: Message) -> None:
                nonlocal waiting
                waiting -= 1
                far.send([encode(message.op, message.req_id, 0, message.payload)])

            def connection_lost(self, exc: Exception | None) -> None:
                pass

            def drained(self) -> None:
                pass

        far.start(Slow())
        tape = Tape(tmp_path / "tape")
        passing = relay.Relay(tape, lambda: near)
        passing.listen(tmp_path / "s")

        def work() -> None:
            with SyncClient(UnixPipe(dial(str(tmp_path / "s"))), 10) as client:
                replies = [client.submit(call) for call in _reads(300)]
                client.read("/x")
                assert {reply.result() for reply in replies} == {b"/s/a\0"}

        await asyncio.to_thread(work)
        await passing.close()
        far.close()
        tape.close()
        assert most == 1
        assert tape.messages == 602

    asyncio.run(main())


def test_a_store_that_is_gone_is_no_crash(tmp_path) -> None:
    async def main() -> None:
        def gone() -> Any:
            raise OSError("gone")

        tape = Tape(tmp_path / "tape")
        passing = relay.Relay(tape, gone)
        passing.listen(tmp_path / "s")
        with pytest.raises(UsageError, match="cannot listen"):
            passing.listen(tmp_path / "s")

        def work() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "s"))
                assert sock.recv(1) == b""

        await asyncio.to_thread(work)
        assert isinstance(passing.refused, OSError)
        await passing.close()
        tape.close()

    asyncio.run(main())


def test_the_environment_of_a_recorded_program(daemon, xenbus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    show = "import os; print(os.environ['XENSTORED_PATH'] == os.environ['XENBUS_STORE'] == "
    show += "os.environ['XENSTORED_RUNDIR'] + '/socket')"
    assert xenbus("record", *at(daemon), tmp_path / "t", "--", *PYTHON, show)[1] == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


PAYLOADS = st.one_of(
    st.binary(max_size=30),
    st.lists(
        st.sampled_from(["/a", "T", "F", "0", "7", "n5", "zz", "", "999999999999999999999"]), max_size=4
    ).map(lambda words: "".join(f"{word}\0" for word in words).encode()),
)
MESSAGES = st.builds(Message, st.integers(0, 30), st.integers(0, 2), st.integers(0, 2), PAYLOADS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(Record, st.floats(0, 9), st.booleans(), MESSAGES, st.integers(1, 2)), max_size=12))
def test_whatever_was_recorded_is_told(records: list[Record]) -> None:
    lines = list(explain(records))
    assert len(lines) == len(records)
    for line in lines:
        assert recordings._sentence(line).isprintable()
        json.dumps(recordings._data(line))


def test_without_descriptors_nobody_is_taken_and_nothing_spins(tmp_path, monkeypatch) -> None:
    async def main() -> None:
        near = socket.socket(socket.AF_UNIX)
        tape = Tape(tmp_path / "tape")
        daemon = Daemon()
        passing = relay.Relay(tape, daemon.connect_local)
        passing.listen(tmp_path / "s")
        looked = 0

        class Exhausted:
            """The listener of a process that has no descriptor left, twice."""

            def __init__(self, real: socket.socket) -> None:
                self.real = real

            def fileno(self) -> int:
                return self.real.fileno()

            def close(self) -> None:
                self.real.close()

            def accept(self) -> Any:
                nonlocal looked
                looked += 1
                if looked <= 2:
                    raise OSError(errno.EMFILE, "Too many open files")
                return self.real.accept()

        monkeypatch.setattr(listener, "ACCEPT_PAUSE", 0.01)
        assert passing._listener is not None
        passing._listener._sock = Exhausted(passing._listener._sock)  # type: ignore[assignment]

        def work() -> None:
            near.connect(str(tmp_path / "s"))
            with SyncClient(UnixPipe(near), 10) as client:
                client.write("/a", "1")

        await asyncio.to_thread(work)
        assert looked == 4, "twice in vain, the client, and nobody behind it"
        await passing.close()
        await daemon.close()
        tape.close()

    asyncio.run(main())
