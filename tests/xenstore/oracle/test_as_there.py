"""What random actions do not come to, asked of Debian's C xenstored and of ours: each test holds for both."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.machine import GuestRing
from tests.support.xenstored import DEADLINE, Xenstored, needs, start
from tests.xenstore.oracle.duel import Line

from xenbus.errors import StoreError
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.ringpage import RingFault
from xenbus.xenstore.wire import HEADER, Op, parse_error

REQ_CONS, REQ_PROD, RSP_CONS = 2048, 2052, 2056


@pytest.fixture(params=[pytest.param("c", marks=needs("c")), "ours"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Xenstored]:
    with start(request.param, tmp_path) as daemon:
        yield daemon


def answer(daemon: Xenstored, op: int, payload: bytes) -> str:
    """To domain 0: the reply as text, or an error's name."""
    reply = Line(daemon.connect()).ask(op, payload)
    return parse_error(reply.payload) if reply.op == Op.ERROR else reply.payload.decode()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("check", "OK\0"),
        ("check x", "EINVAL"),
        ("print x", "OK\0"),
        ("print", "EINVAL"),
        ("log on", "OK\0"),
        ("log off", "OK\0"),
        ("log maybe", "EINVAL"),
        ("quota set nodes 20", "OK\0"),
        ("quota set permissions 7", "OK\0"),
        ("quota set nodes 0", "EINVAL"),
        ("quota set nodes", "EINVAL"),
        ("quota set nonsense 1", "EINVAL"),
        ("quota-soft set memory 20000", "OK\0"),
        ("quota-soft set nodes 20", "EINVAL"),
        ("quota-soft 1", "EINVAL"),
        ("quota 999", "ENOENT"),
        ("help x", "EINVAL"),
        ("nonsense", "EINVAL"),
        ("memreport /nowhere/at/all", "EINVAL"),
    ],
)
def test_control(daemon: Xenstored, words: str, expected: str) -> None:
    assert answer(daemon, Op.CONTROL, words.replace(" ", "\0").encode() + b"\0") == expected


def test_what_control_counts(daemon: Xenstored) -> None:
    guest = Line(daemon.introduce(1))
    guest.ask(Op.WRITE, b"a\x0012345")
    guest.ask(Op.WATCH, b"a\0token\0")
    guest.events()
    assert answer(daemon, Op.CONTROL, b"quota\0001\0") == (
        "Domain 1:\n"
        "nodes           :        2\n"
        "watches         :        1\n"
        "transactions    :        0\n"
        "outstanding     :        0\n"
        "memory          :      125\n\0"
    )


def test_a_list_too_long_for_one_message(daemon: Xenstored) -> None:
    store = daemon.toolstack
    names = [f"{number:040d}" for number in range(250)]
    for name in names:
        store.write(f"/long/{name}", "")
    assert answer(daemon, Op.DIRECTORY, b"/long\0") == "E2BIG"
    assert store.directory("/long") == names
    chunk = answer(daemon, Op.DIRECTORY_PART, b"/long\0000\0").split("\0")
    # As many whole names as 4096 bytes hold, behind the generation; no empty word as long as there are more.
    assert chunk[1:] == [*names[:99], ""]
    last = answer(daemon, Op.DIRECTORY_PART, b"/long\x00%d\0" % (249 * 41)).split("\0")
    assert last[1:] == [names[249], "", ""]


def test_each_domain_that_dies_is_told_of(daemon: Xenstored) -> None:
    """Equal events are one, but not these."""
    for domid in (1, 2):
        daemon.introduce(domid)
    line = Line(daemon.connect())
    line.ask(Op.WATCH, b"@releaseDomain\0t\0")
    assert len(line.events()) == 1
    for domid in (1, 2):
        daemon.machine.remove(domid)
    daemon.machine.settle()
    assert line.events() == (b"@releaseDomain\0t\0",) * 2


# ---- rings ----


def put(ring: GuestRing, data: bytes) -> None:
    """Into the request ring, whatever it is."""
    (produced,) = struct.unpack_from("<I", ring.view, REQ_PROD)
    for at, byte in enumerate(data):
        ring.view[(produced + at) % 1024] = byte
    set_word(ring, REQ_PROD, produced + len(data))


def set_word(ring: GuestRing, offset: int, value: int) -> None:
    struct.pack_into("<I", ring.view, offset, value)


def settle(daemon: Xenstored, ring: GuestRing) -> None:
    """Until the daemon has looked at that ring: kicks are dealt with in order, and rings when they are."""
    daemon.machine.raise_port(16 + ring.domid)
    daemon.machine.settle()
    for _ in range(3):
        daemon.toolstack.get_domain_path(0)


def request(payload: bytes) -> bytes:
    return HEADER.pack(Op.READ, 1, 0, len(payload)) + payload


@pytest.mark.parametrize("end", ["too long", "requests", "replies"])
def test_a_ring_is_stopped_and_the_error_word_says_why(daemon: Xenstored, end: str) -> None:
    ring = daemon.introduce(1)
    if end == "too long":
        put(ring, HEADER.pack(Op.READ, 1, 0, 4097))
        why = RingFault.PROTO
    elif end == "requests":
        set_word(ring, REQ_PROD, 1025)
        why = RingFault.RINGIDX
    else:
        set_word(ring, RSP_CONS, 5)
        put(ring, request(b"/\0"))
        why = RingFault.RINGIDX
    settle(daemon, ring)
    assert ring.page.error == why
    before = bytes(ring.view[REQ_CONS : REQ_CONS + 4])
    set_word(ring, REQ_PROD, struct.unpack("<I", before)[0])
    put(ring, request(b"/\0"))
    settle(daemon, ring)
    assert bytes(ring.view[REQ_CONS : REQ_CONS + 4]) == before, "nothing is taken any more"
    assert daemon.toolstack.is_introduced(1)
    daemon.kill(1)
    assert not daemon.toolstack.is_introduced(1)


def test_a_message_too_long_on_the_socket_ends_the_connection(daemon: Xenstored) -> None:
    pipe = daemon.connect()
    pipe.send([HEADER.pack(Op.READ, 1, 0, 4097)], DEADLINE)
    assert pipe.receive(DEADLINE) == b""


def test_a_guest_that_asked_for_a_reconnection_is_told(daemon: Xenstored) -> None:
    ring = daemon.introduce(1)
    ring.page.connection = 1
    daemon.toolstack.introduce(1, 1, 1)
    assert ring.page.connection == 0
    store = SyncClient(ring, DEADLINE)
    with pytest.raises(StoreError):
        store.read("nothing")
