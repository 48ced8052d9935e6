"""A store saved and loaded in the middle of its life: nobody sees a difference."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_talk import Talk

from xenbus.errors import StoreError
from xenbus.xenstore.engine import Engine
from xenbus.xenstore.state.dump import Held, dump
from xenbus.xenstore.state.load import load, read
from xenbus.xenstore.state.records import (
    ConnectionData,
    GlobalQuotaData,
    NodeData,
    Record,
    Ring,
    Socket,
    StateError,
    TransactionData,
    WatchData,
    encode,
)
from xenbus.xenstore.wire import Op

ROOT = ((0, 0),)


def saved(engine: Engine, held: list[Held], version: int = 2) -> bytes:
    return encode(dump(engine, held), version)


def everything(engine: Engine) -> dict[str, Any]:
    """What can be told of a store from outside, and what is counted."""
    return {
        "nodes": {
            path: (node.value, node.perms, list(node.children or ())) for path, node in engine.nodes.items()
        },
        "domains": {
            domid: (one.introduced, one.target, one.features, one.quotas.as_dict(), one.nodes, one.watches)
            for domid, one in engine.domains.items()
        },
        "quotas": engine.quotas.as_dict(),
        "watches": sorted(
            (watch.path, watch.token, watch.depth, watch.prefix, watch.conn.domid)
            for bucket in engine.watches.by_path.values()
            for watch in bucket
        ),
    }


class Clients:
    """Two connections of domain 0 and one of domain 5, which can move into a loaded store."""

    def __init__(self) -> None:
        self.engine = Engine()
        dom0 = Talk(self.engine)
        dom0.ask(Op.INTRODUCE, 5, 1, 1)
        self.talks = [dom0, Talk(self.engine), Talk(self.engine, 5)]
        dom0.write("/local/domain/5", "")
        dom0.ask(Op.SET_PERMS, "/local/domain/5", ["n5"])
        self.open: dict[tuple[int, int], int] = {}

    def move(self, version: int = 2) -> None:
        specs: list[Socket | Ring] = [Socket(3), Socket(4), Ring(5, None, 1)]
        held = [Held(talk.conn, spec) for talk, spec in zip(self.talks, specs, strict=True)]
        before = everything(self.engine)
        stream = saved(self.engine, held, version)
        store = load(read(stream), Engine)
        self.engine = store.engine
        for talk, restored in zip(self.talks, store.connections, strict=True):
            talk.engine, talk.conn = store.engine, restored.conn
        assert store.engine.check() == []
        assert everything(store.engine) == before
        # And once more: nothing is lost by it.
        again = [Held(talk.conn, spec) for talk, spec in zip(self.talks, specs, strict=True)]
        assert saved(self.engine, again, version) == stream

    def do(self, step: tuple[Any, ...]) -> object:
        who, name, *rest = step
        talk = self.talks[who]
        if name == "take":
            return talk.take()
        *arguments, slot = rest
        tx = self.open.get((who, slot), 0)
        try:
            if name is Op.TRANSACTION_START:
                self.open[who, slot] = talk.ask(name)
                return None
            if name is Op.TRANSACTION_END:
                self.open.pop((who, slot), None)
            answer: object = talk.ask(name, *arguments, tx=tx)
        except StoreError as error:
            answer = error.name
        events, talk.events = talk.events, []
        return answer, events


PATHS = st.sampled_from(
    ["/a", "/a/b", "/a/b/c", "/d", "/local/domain/5/x", "/local/domain/5/x/y", "x", "x/z"]
)
VALUES = st.sampled_from([b"", b"1", b"22"])
STEP = st.one_of(
    st.tuples(st.just(Op.WRITE), PATHS, VALUES),
    st.tuples(st.just(Op.MKDIR), PATHS),
    st.tuples(st.just(Op.RM), PATHS),
    st.tuples(st.sampled_from([Op.READ, Op.DIRECTORY, Op.GET_PERMS]), PATHS),
    st.tuples(st.just(Op.SET_PERMS), PATHS, st.sampled_from([["n0"], ["b5"], ["n5", "r7"], ["r0", "w5"]])),
    st.tuples(st.just(Op.WATCH), PATHS, st.sampled_from(["t", "u"])),
    st.tuples(st.just(Op.UNWATCH), PATHS, st.sampled_from(["t", "u"])),
    st.tuples(st.just(Op.TRANSACTION_START)),
    st.tuples(st.just(Op.TRANSACTION_END), st.booleans()),
).flatmap(lambda step: st.tuples(st.just(step), st.integers(0, 2), st.integers(0, 1))).map(
    lambda drawn: (drawn[1], *drawn[0], drawn[2])
) | st.integers(0, 2).map(lambda who: (who, "take"))  # fmt: skip


@given(st.lists(STEP, min_size=4, max_size=30), st.data())
@settings(max_examples=150, deadline=None)
def test_a_store_that_moves_in_between_answers_as_one_that_stays(
    steps: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    """The same requests to two stores; one is saved and loaded somewhere, once or twice. Transactions stay
    open, watches set and events queued meanwhile."""
    stays, moves = Clients(), Clients()
    moments = data.draw(st.sets(st.integers(0, len(steps)), min_size=1, max_size=2))
    for number, step in enumerate(steps):
        if number in moments:
            moves.move()
        assert moves.do(step) == stays.do(step), step
    for one, other in zip(moves.talks, stays.talks, strict=True):
        assert one.take() == other.take()
    assert moves.engine.check() == []
    assert everything(moves.engine)["nodes"] == everything(stays.engine)["nodes"]


def test_transactions_go_on_and_conflicts_stay_conflicts() -> None:
    clients = Clients()
    dom0, other, _ = clients.talks
    dom0.write("/a/one", "1")
    dom0.ask(Op.WATCH, "/", "all")
    dom0.take()
    dom0.events.clear()
    good, bad, blind = (other.ask(Op.TRANSACTION_START) for _ in range(3))
    other.write("/a/two/deep", "2", tx=good)
    other.ask(Op.RM, "/a/one", tx=good)
    assert other.ls("/a", tx=good) == ["two"]
    other.read("/tool", tx=bad)
    dom0.write("/tool", "")  # the same value, written again
    other.read("/a/one", tx=blind)
    clients.move()
    assert other.ls("/a", tx=good) == ["two"]
    assert dom0.ls("/a") == ["one"]
    assert other.error(Op.TRANSACTION_END, True, tx=bad) == "EAGAIN"
    dom0.events.clear()
    assert other.error(Op.TRANSACTION_END, True, tx=good) == ""
    dom0.take()
    assert sorted(path for path, _ in dom0.events) == ["/a/one", "/a/two/deep"]
    assert other.error(Op.TRANSACTION_END, True, tx=blind) == "EAGAIN"


@pytest.mark.parametrize("first", [True, False])
def test_what_was_removed_before_its_parent_is_told_by_itself(first: bool) -> None:
    clients = Clients()
    dom0, other, _ = clients.talks
    dom0.write("/a/b", "1")
    dom0.ask(Op.WATCH, "/a", "t")
    tx = other.ask(Op.TRANSACTION_START)
    if first:
        other.ask(Op.RM, "/a/b", tx=tx)
    other.ask(Op.RM, "/a", tx=tx)
    clients.move()
    dom0.take()
    dom0.events.clear()
    other.ask(Op.TRANSACTION_END, True, tx=tx)
    dom0.take()
    assert [path for path, _ in dom0.events] == (["/a/b", "/a"] if first else ["/a"])


def test_events_that_wait_are_still_merged_and_counted() -> None:
    clients = Clients()
    dom0, _, guest = clients.talks
    guest.ask(Op.WATCH, "x", "t")
    dom0.write("/local/domain/5/x", "1")
    dom0.write("/local/domain/5/x", "2")
    assert len(guest.conn.out) == 1
    clients.move()
    dom0.write("/local/domain/5/x", "3")
    assert [message.payload for message in guest.take()] == [b"x\0t\0"]
    assert clients.engine.check() == []


def test_version_1_has_neither_depths_nor_features() -> None:
    clients = Clients()
    dom0 = clients.talks[0]
    dom0.ask(Op.SET_FEATURE, 6, 4) if 6 in clients.engine.domains else clients.engine.domain(6)
    dom0.ask(Op.SET_FEATURE, 6, 4)
    dom0.ask(Op.WATCH, "/a", "t", 1)
    specs = [Held(talk.conn, Socket(0)) for talk in clients.talks[:2]]
    for version, depth, features in ((2, 1, 4), (1, -1, 14)):
        engine = load(read(saved(clients.engine, specs, version)), Engine).engine
        (watch,) = engine.watches.by_path[b"/a"]
        assert (watch.depth, engine.domains[6].features) == (depth, features)


def node(path: bytes, conn: int = 0, tx: int = 0, perms: Any = ROOT, **more: Any) -> NodeData:
    return NodeData(path, perms=perms, conn_id=conn, tx_id=tx, **more)


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([node(b"/a/b")], r"record 0 \(NODE_DATA\) at byte 16: node b'/a/b' without a parent"),
        ([node(b"/a"), node(b"/a")], r"record 1 .*is there already"),
        ([node(b"//a")], "node at b'//a'"),
        ([node(b"/" + b"a" * 5000)], "node at"),
        ([node(b"/a", perms=())], "without an owner"),
        ([WatchData(1, b"/a", b"t")], "no connection 1"),
        ([ConnectionData(1, Socket(3)), WatchData(1, b"/a/", b"t")], "record 1 .*watch at b'/a/'"),
        ([ConnectionData(1, Socket(3))] + [WatchData(1, b"/a", b"t")] * 2, "record 2 .*is there already"),
        ([ConnectionData(1, Socket(3))] * 2, "connection 1 was there already"),
        ([ConnectionData(1, Ring(5, None, 1)), ConnectionData(2, Ring(5, None, 1))], "has a ring already"),
        ([ConnectionData(1, Ring(0x7FF0, None, 1))], "domain 32752"),
        ([ConnectionData(1, Socket(3), b"", b"abc")], "outbound data: 3 bytes where a message belongs"),
        ([ConnectionData(1, Socket(3), b"", bytes(12) + b"\xff" * 4)], "a message of 4294967295 bytes"),
        ([TransactionData(1, 1)], "no connection 1"),
        ([node(b"/a", 1, 1, access=1)], "no transaction 1 of connection 1"),
        ([ConnectionData(1, Socket(3)), TransactionData(1, 1)] + [node(b"/", 1, 1, access=1)] * 2, "already"),
        ([GlobalQuotaData({"nodes": 0xFFFF_FFFF})], "record 0 .*quota nodes"),
        ([GlobalQuotaData(), GlobalQuotaData()], "one already"),
    ],
)  # fmt: skip
def test_a_stream_that_refers_to_nothing_is_refused(records: list[Record], text: str) -> None:
    with pytest.raises(StateError, match=text):
        load(read(encode(records)), Engine)


def test_what_is_not_in_the_stream_is_as_in_a_new_store() -> None:
    engine = load(read(encode([])), Engine).engine
    assert set(engine.nodes) == {b"/", b"@introduceDomain", b"@releaseDomain"}
    assert engine.check() == []
    engine = load(read(encode([GlobalQuotaData({"unheard-of": 3, "nodes": 7})])), Engine).engine
    assert engine.quotas.nodes == 7
