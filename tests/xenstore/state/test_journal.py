"""A store's file: the stream and the batches behind it amount to the store, wherever the file ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_talk import Talk

from xenbus.xenstore.engine import Engine, profile_of
from xenbus.xenstore.state.dump import Held
from xenbus.xenstore.state.journal import FIRST_BATCH, FRAME, Journal, JournaledEngine, frame, replay
from xenbus.xenstore.state.load import load
from xenbus.xenstore.state.records import Ring, RingPosition, StateError, Writer, encode
from xenbus.xenstore.wire import CODECS, Op


class Kept:
    """A store with domains 5 and 6, and its file as bytes."""

    def __init__(self, profile: str = "xenstored") -> None:
        self.engine = JournaledEngine(profile=profile_of(profile))
        self.talks = [Talk(self.engine)]
        self.journal = Journal(self.engine, self)
        self.file = self.journal.snapshot()
        self.number = FIRST_BATCH
        self.ends = [len(self.file)]
        for domid in (5, 6):
            self.talks[0].ask(Op.INTRODUCE, domid, 1, 1)
            self.talks.append(Talk(self.engine, domid))
            self.talks[0].write(f"/local/domain/{domid}", "")
            self.talks[0].ask(Op.SET_PERMS, f"/local/domain/{domid}", [f"n{domid}"])
        self.engine.relisted = True  # the rings came after the introduction
        self.turn()

    # What the daemon is to a journal.

    def held(self, domid: int) -> Held | None:
        for talk in self.talks[1:]:
            if talk.conn.domid == domid and not talk.conn.closed:
                return Held(talk.conn, Ring(domid, talk.conn.domain.target, 1))
        return None

    def all_held(self) -> list[Held]:
        return [one for one in map(self.held, (5, 6)) if one is not None]

    def position(self, domid: int) -> RingPosition | None:
        return RingPosition(domid, 7, 9)

    def loaded(self) -> Engine:
        found = replay(self.file)
        assert (found.good, found.torn) == (len(self.file), "")
        engine = load(found.image, lambda: Engine(profile=self.engine.profile)).engine
        assert engine.check() == []
        return engine

    def turn(self) -> None:
        if self.journal.dirty:
            self.file += frame(self.number, self.journal.batch())
            self.number += 1
            self.ends.append(len(self.file))

    def do(self, step: tuple[Any, ...]) -> None:
        who, op, *arguments, slot = step
        talk = self.talks[who]
        if talk.conn.closed:
            return
        if op is Op.TRANSACTION_END:
            arguments = [True]
        elif op is Op.TRANSACTION_START:
            slot = 0
        tx = list(talk.conn.transactions)[:1] if slot else []
        talk.raw(op, CODECS[op].request(*arguments), tx[0] if tx else 0)


def told(engine: Engine) -> dict[str, Any]:
    """What a file keeps."""
    return {
        "nodes": {
            path: (node.value, node.perms, list(node.children or ())) for path, node in engine.nodes.items()
        },
        "domains": {
            domid: (one.introduced, one.target, one.features, one.quotas.as_dict())
            for domid, one in engine.domains.items()
            if one.introduced and domid
        },
        "quotas": engine.quotas.as_dict(),
        "watches": [
            (watch.conn.domid, watch.path, watch.token, watch.depth, watch.prefix)
            for bucket in sorted(engine.watches.by_path.items())
            for watch in sorted(bucket[1], key=lambda watch: watch.conn.domid)
            if watch.conn.guest
        ],
    }


PATHS = st.sampled_from(
    ["/a", "/a/b", "/a/b/c", "/d", "/local/domain/5/x", "/local/domain/5/x/y", "x", "x/z"]
)
TOKEN = st.sampled_from(["t", "u"])
STEP = st.one_of(
    st.tuples(st.just(Op.WRITE), PATHS, st.sampled_from([b"", b"1", b"22"])),
    st.tuples(st.sampled_from([Op.MKDIR, Op.RM, Op.READ]), PATHS),
    st.tuples(st.just(Op.SET_PERMS), PATHS, st.sampled_from([["n0"], ["b5"], ["n5", "r6"], ["r6", "w5"]])),
    st.tuples(st.sampled_from([Op.WATCH, Op.UNWATCH]), PATHS, TOKEN),
    st.tuples(st.sampled_from([Op.TRANSACTION_START, Op.TRANSACTION_END])),
    st.tuples(st.just(Op.SET_TARGET), st.just(6), st.just(5)),
    st.tuples(st.sampled_from([Op.RELEASE, Op.INTRODUCE]), st.just(6)),
    st.tuples(st.just(Op.SET_QUOTA), st.just("nodes"), st.integers(500, 502), st.sampled_from([None, 5])),
    st.tuples(st.just(Op.CONTROL), st.just("quota"), st.just("set"), st.just("watches"), st.just("99")),
).flatmap(lambda step: st.tuples(st.just(step), st.integers(0, 2), st.integers(0, 1))).map(
    lambda drawn: (drawn[1], *drawn[0], drawn[2])
)  # fmt: skip


def complete(step: tuple[Any, ...]) -> tuple[Any, ...]:
    who, op, *arguments, slot = step
    if op is Op.INTRODUCE:
        arguments += [1, 1]
    return (who, op, *arguments, slot)


@pytest.mark.parametrize("profile", ["xenstored", "oxenstored"])
@given(steps=st.lists(st.tuples(STEP.map(complete), st.booleans()), min_size=3, max_size=30))
@settings(max_examples=120, deadline=None)
def test_the_file_is_the_store_after_every_turn(
    profile: str, steps: list[tuple[tuple[Any, ...], bool]]
) -> None:
    """Several requests make a turn; transactions, removals and what is made again included."""
    kept = Kept(profile)
    for step, turn in steps:
        kept.do(step)
        if turn:
            kept.turn()
            assert told(kept.loaded()) == told(kept.engine)


W, R, RM, START, END = Op.WRITE, Op.READ, Op.RM, Op.TRANSACTION_START, Op.TRANSACTION_END


@pytest.mark.parametrize(
    "turns",
    [
        # Written, removed with its parent and made again, all in one turn.
        [[(W, "/a/b", "1")], [(W, "/a/b", "2"), (RM, "/a"), (W, "/a/b", "3"), (W, "/a/c", "4")]],
        # Came and went, with what is above it.
        [[(W, "/p/q", ""), (RM, "/p"), (W, "/z", "")]],
        [[(W, "/p/q/r", ""), (W, "/p/s", "")], [(RM, "/p/q"), (W, "/p/q", "")]],
        # The same in a transaction: looked for in another order than made.
        [[(START,), (R, "/t/one"), (W, "/t/two", ""), (W, "/t/one/deep", ""), (W, "/t/three", ""), (END,)]],
        [[(W, "/t/one", "")], [(START,), (RM, "/t"), (END,)]],
        [[(W, "/t/one", "")], [(START,), (RM, "/t"), (W, "/t/two", ""), (END,)]],
        [[(W, "/t/one", "1"), (START,), (W, "/t/one", "2"), (END,), (RM, "/t/one"), (W, "/t/one", "3")]],
    ],
)
@pytest.mark.parametrize("profile", ["xenstored", "oxenstored"])
def test_much_in_one_turn(profile: str, turns: list[list[tuple[Any, ...]]]) -> None:
    kept = Kept(profile)
    for turn in turns:
        for step in turn:
            kept.do((0, *step, 1))
        kept.turn()
        assert told(kept.loaded()) == told(kept.engine)


def test_a_file_that_ends_anywhere_is_the_store_as_it_was_then() -> None:
    kept = Kept()
    stores = {kept.ends[-1]: told(kept.engine)}
    for number in range(4):
        kept.talks[0].write(f"/n/{number}", "x" * number)
        kept.turn()
        stores[len(kept.file)] = told(kept.engine)
    first = kept.ends[1]
    for size in range(first, len(kept.file) + 1):
        found = replay(kept.file[:size])
        assert found.good == max(end for end in stores if end <= size)
        assert bool(found.torn) == (found.good != size)
        assert told(load(found.image, Engine).engine) == stores[found.good]
    for size in range(kept.ends[0] - 2 * FRAME.size - 8):
        with pytest.raises(StateError):
            replay(kept.file[:size])


def test_damage_in_the_middle_is_not_a_torn_end() -> None:
    kept = Kept()
    for number in range(3):
        kept.talks[0].write(f"/n/{number}", "value")
        kept.turn()
    at = kept.ends[-2] - 5
    damaged = bytearray(kept.file)
    damaged[at] ^= 1
    with pytest.raises(StateError, match=rf"at byte {kept.ends[-3]}: damaged, but batch 5 at byte") as caught:
        replay(bytes(damaged))
    assert caught.value.offset == kept.ends[-3]
    # The last one, and what a power cut leaves behind: zeros.
    for tail in (bytes(damaged[: kept.ends[-2]]), kept.file[: kept.ends[-3]] + bytes(512)):
        found = replay(tail)
        assert found.good == kept.ends[-3]
        assert "is not whole" in found.torn
    damaged = bytearray(kept.file)
    damaged[100] ^= 1
    with pytest.raises(StateError):
        replay(bytes(damaged))


def test_nonsense_with_a_right_checksum_is_refused() -> None:
    kept = Kept()
    stray = kept.file + frame(kept.number, encode([])[16:] + bytes(8))
    with pytest.raises(StateError, match="8 bytes after END"):
        replay(stray)
    position = Writer().record(RingPosition(5, 1, 2))
    with pytest.raises(StateError, match=r"RING_POSITION.*no such record"):
        replay(encode([])[:-8] + position + bytes(8))


def test_where_a_ring_stood_is_kept_with_its_connection() -> None:
    kept = Kept()
    assert replay(kept.file).image.positions[5] == RingPosition(5, 7, 9)
    assert replay(kept.journal.snapshot()).image.positions[6] == RingPosition(6, 7, 9)


def test_a_stream_alone_is_a_file() -> None:
    assert replay(encode([])).torn == ""
