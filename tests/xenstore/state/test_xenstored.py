"""The stream against Debian's C xenstored 4.17 and its own live update: ours goes on with what it wrote, and
it goes on with what we wrote: sockets, rings, watches, half a request and waiting answers included."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.engine_talk import Talk
from tests.support.machine import PORT_BASE, Machine
from tests.support.xenstored import DEADLINE, needs, preloaded, program, start
from tests.xenstore.daemon.test_process import tool

from xenbus.errors import NoEntry
from xenbus.xenstore.engine import Engine
from xenbus.xenstore.state.dump import Held, dump
from xenbus.xenstore.state.records import GlobalData, Ring, Socket, StateError, Writer, decode
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.unix import UnixPipe
from xenbus.xenstore.wire import CODECS, Op, Parser, encode

pytestmark = [needs("c"), pytest.mark.slow]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def request(number: int, op: Op, *arguments: object) -> bytes:
    return encode(op, number, 0, CODECS[op].request(*arguments))


def read_all(pipe: UnixPipe, count: int) -> list[tuple[int, int, bytes]]:
    parser, got = Parser(), []
    while len(got) < count:
        got += parser.feed(pipe.receive(DEADLINE))
    return [(one.op, one.req_id, one.payload) for one in got]


def test_ours_goes_on_where_xenstored_stopped(folder: Path) -> None:
    """xenstore-control tells Debian's daemon to become ours."""
    with start("c", folder / "m") as daemon:
        store = daemon.toolstack
        guest = SyncClient(daemon.introduce(5), timeout=DEADLINE)
        store.write("/a/b", b"\0\xff")
        store.set_perms("/a/b", ["n0", "r5", "w6"])
        guest.write("x/y", "2")
        guest_watch = guest.watch("x")
        assert guest.poll_watch(DEADLINE) == (guest_watch, "x")
        watch = store.watch("/a")
        assert store.poll_watch(DEADLINE) == (watch, "/a")
        half = daemon.connect()
        whole = request(1, Op.WRITE, "/half", "z" * 100)
        half.send([whole[:50]], DEADLINE)
        store.read("/a/b")
        script = folder / "ours"
        script.write_text(
            f"#!/bin/sh\ncp {daemon.folder}/run/state_dump {folder}/dump\nunset LD_PRELOAD\n"
            f'exec {sys.executable} -m tests.support.kept_store {daemon.folder} {folder}/state "$@"\n'
        )
        script.chmod(0o755)
        before = (store.directory("/"), guest.directory("x"))
        done = subprocess.run(
            [tool("xenstore-control"), "live-update", "-t", "5", str(script)],
            env={**os.environ, "XENSTORED_RUNDIR": str(daemon.folder / "run")},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), daemon.log
        # It is ours: C has no check that says OK so.
        assert Path(f"/proc/{daemon.process.pid}/exe").resolve() == Path(sys.executable).resolve()  # type: ignore[attr-defined]
        assert store.control("check") == "OK"
        assert (store.directory("/"), guest.directory("x")) == before
        assert store.read("/a/b") == b"\0\xff"
        assert [str(perm) for perm in store.get_perms("/a/b")] == ["n0", "r5", "w6"]
        assert guest.read("x/y") == b"2"
        with pytest.raises(NoEntry):
            guest.read("x/z")
        store.write("/a/c", "")
        assert store.poll_watch(DEADLINE) == (watch, "/a/c")
        store.write("/local/domain/5/x/new", "")
        assert guest.poll_watch(DEADLINE) == (guest_watch, "x/new")
        half.send([whole[50:]], DEADLINE)
        assert read_all(half, 1) == [(Op.WRITE, 1, b"OK\0")]
        assert store.read("/half") == b"z" * 100
        fresh = SyncClient.connect(str(daemon.socket), timeout=DEADLINE)
        assert fresh.read("/a/b") == b"\0\xff"
        fresh.close()
        guest.close()
        # Nothing of it was skipped: cut off anywhere, it is refused.
        dump_ = (folder / "dump").read_bytes()
        for size in range(0, len(dump_), 7):
            with pytest.raises(StateError):
                decode(dump_[:size])


def test_xenstored_goes_on_where_ours_stopped(folder: Path) -> None:
    """`xenstored -U` with a stream of ours: version 1, for 4.17 knows no other."""
    machine = Machine(folder / "m")
    run = machine.folder / "run"
    engine = Engine()
    dom0 = Talk(engine)
    machine.create(5)
    dom0.ask(Op.INTRODUCE, 5, 1, 1)
    guest = Talk(engine, 5)
    dom0.write("/local/domain/5", "")
    dom0.ask(Op.SET_PERMS, "/local/domain/5", ["n5"])
    dom0.write("/a/b", b"\0\xff")
    dom0.ask(Op.SET_PERMS, "/a/b", ["n0", "r5", "w6"])
    dom0.write("/big", "y" * 1000)
    guest.ask(Op.WATCH, "x", "t")
    dom0.ask(Op.WATCH, "/a", "t")
    guest.write("x/y", "2")
    # An answer is half sent, another waits; half a request was read.
    whole = request(1, Op.WRITE, "/half", "z" * 100)
    unsent = request(8, Op.READ, "/a")
    answer = encode(Op.READ, 7, 0, b"y" * 1000)
    ours, theirs = socket.socketpair()
    client = UnixPipe(ours)
    theirs.send(answer[:300])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(run / "socket"))
    listener.listen(5)
    evtchn = os.open(machine.folder / "evtchn", os.O_RDWR | os.O_NONBLOCK)
    held = [
        # Of domain 0's kernel: xenstored has it always, and takes the nodes of an unknown domain badly.
        Held(engine.connect(0), Ring(0, None, PORT_BASE)),
        Held(dom0.conn, Socket(theirs.fileno()), whole[:50], answer[300:] + unsent, 716),
        # xenstored's own port, which goes on with its descriptor.
        Held(guest.conn, Ring(5, None, PORT_BASE + 5)),
    ]
    writer = Writer(1)
    records = [GlobalData(listener.fileno(), evtchn), *dump(engine, held, transactions=False)]
    (run / "state_dump").write_bytes(b"".join(writer.stream(records)))
    path = program("c")
    assert path is not None
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [path, "--no-fork", "-U"],
            env=preloaded(machine.folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(), listener.fileno(), evtchn),
        )
        ring = machine.guest(5)
        try:
            theirs.close()
            listener.close()
            os.close(evtchn)
            assert read_all(client, 2) == [(Op.READ, 7, b"y" * 1000), (Op.READ, 8, b"/a\0")]
            client.send([whole[50:]], DEADLINE)
            assert read_all(client, 1) == [(Op.WRITE, 1, b"OK\0")]
            store = SyncClient.connect(str(run / "socket"), timeout=DEADLINE)
            assert store.read("/half") == b"z" * 100
            assert store.read("/a/b") == b"\0\xff"
            assert [str(perm) for perm in store.get_perms("/a/b")] == ["n0", "r5", "w6"]
            assert store.directory("/") == ["tool", "local", "a", "big", "half"]
            assert store.is_introduced(5)
            store.write("/a/c", "")
            assert read_all(client, 1) == [(Op.WATCH_EVENT, 0, b"/a/c\0t\0")]
            store.write("/local/domain/5/x/new", "")
            parser, got = Parser(), []
            while not got:
                got += parser.feed(ring.receive(DEADLINE))
            assert [one.payload for one in got] == [b"x/new\0t\0"]
            ring.send([request(1, Op.READ, "x/y")], DEADLINE)
            while len(got) < 2:
                got += parser.feed(ring.receive(DEADLINE))
            assert got[1].payload == b"2"
            assert store.control("check") == "OK"
            store.close()
        finally:
            process.kill()
            process.wait()
            client.close()
            ring.close()
            machine.close()
