"""The profile `oxenstored`, without I/O: snapshots, merging, doing again, what stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.errors import UsageError
from xenbus.xenstore.engine import OXENSTORED, Engine, Hooks, profile_of
from xenbus.xenstore.wire import Op


@pytest.fixture
def engine() -> Engine:
    return Engine(profile=OXENSTORED)


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    return Talk(engine)


@pytest.fixture
def other(engine: Engine) -> Talk:
    return Talk(engine)


def test_a_transaction_sees_the_tree_as_it_was_when_it_started(dom0: Talk, other: Talk) -> None:
    dom0.write("/a/x", "old")
    first = dom0.start()
    other.write("/a/x", "middle")
    other.write("/a/y", "")
    second = dom0.start()
    other.write("/a/x", "new")
    other.ask(Op.RM, "/a/y")
    assert (dom0.read("/a/x", first), dom0.ls("/a", first)) == (b"old", ["x"])
    assert (dom0.read("/a/x", second), dom0.ls("/a", second)) == (b"middle", ["x", "y"])
    assert (dom0.read("/a/x"), dom0.ls("/a")) == (b"new", ["x"])
    assert dom0.end(first) == ""
    assert dom0.read("/a/x", second) == b"middle", "one that ends takes nothing from another"


def test_one_that_only_reads_never_fails(dom0: Talk, other: Talk) -> None:
    dom0.write("/a", "1")
    tx = dom0.start()
    dom0.read("/a", tx)
    other.write("/a", "2")
    assert dom0.end(tx) == ""


@pytest.mark.parametrize(
    ("inside", "outside", "answer"),
    [
        # Where it wrote nothing else happened: merged.
        ([("write", "/a/x", "1")], ("write", "/b/x", "1"), ""),
        # Both write the same node blindly: done again, with the same answers.
        ([("write", "/a/x", "1")], ("write", "/a/x", "2"), ""),
        ([("write", "/a/new", "1")], ("write", "/a/other", "2"), ""),
        # It read what was changed since.
        ([("read", "/a/x"), ("write", "/b/x", "1")], ("write", "/a/x", "2"), "EAGAIN"),
        ([("ls", "/a"), ("write", "/b/x", "1")], ("write", "/a/new", "2"), "EAGAIN"),
        # It read the same value again.
        ([("read", "/a/x"), ("write", "/b/x", "1")], ("write", "/a/x", "0"), ""),
        # A node that it missed is only looked at if it has to be done again.
        ([("missing", "/a/new"), ("write", "/b/x", "1")], ("write", "/a/new", "2"), ""),
        ([("missing", "/a/new"), ("write", "/a/mine", "1")], ("write", "/a/new", "2"), "EAGAIN"),
        # The entries of a node above.
        ([("write", "/a/x", "1")], ("chmod", "/a", "r0"), ""),
    ],
)
def test_the_end(
    dom0: Talk, other: Talk, inside: list[tuple[str, ...]], outside: tuple[str, ...], answer: str
) -> None:
    for path in ("/a/x", "/b/x"):
        dom0.write(path, "0")
    tx = dom0.start()
    for what, *arguments in inside:
        if what == "missing":
            assert dom0.error(Op.READ, *arguments, tx=tx) == "ENOENT"
        else:
            getattr(dom0, what)(*arguments, tx=tx)
    getattr(other, outside[0])(*outside[1:])
    assert dom0.end(tx) == answer


def test_nothing_is_kept_without_a_transaction(engine: Engine, dom0: Talk) -> None:
    dom0.write("/a", "0")
    ids = [dom0.start() for _ in range(3)]
    dom0.write("/a", "1")
    ids.append(dom0.start())
    dom0.write("/a", "2")
    assert engine.beside.history.newest is not None
    for tx in (ids[1], ids[3], ids[0]):
        dom0.end(tx)
    dom0.ask(Op.RESET_WATCHES)
    assert engine.beside.history.newest is None
    assert engine.check() == []


def test_nothing_is_kept_of_a_watch(engine: Engine, dom0: Talk) -> None:
    for path in ("/a/b/c", "/a/b", "/", "/a/d", "@releaseDomain"):
        dom0.watch(path)
    for path in ("/a/b", "/a/b/c", "@releaseDomain", "/", "/a/d"):
        dom0.ask(Op.UNWATCH, path, "t")
    assert (engine.watches.by_path, engine.watches._below) == ({}, {})  # type: ignore[attr-defined]


def test_short_transactions_beside_a_long_one_leave_nothing(engine: Engine, dom0: Talk, other: Talk) -> None:
    dom0.start()
    for number in range(100):
        tx = other.start()
        other.write("/a", str(number), tx)
        assert other.end(tx) == ""
    epochs, epoch = 0, engine.beside.history.newest
    while epoch is not None:
        epochs, epoch = epochs + 1, epoch.prev
    assert epochs == 1


def test_a_death_goes_without_events_and_no_transaction_merges(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 1).write("data", "1")
    dom0.write("/x", "")
    dom0.watch("/local/domain/1")
    tx = dom0.start()
    dom0.write("/x", "1", tx)
    dom0.read("/x", tx)
    assert dom0.ask(Op.RELEASE, 1) is None
    assert dom0.seen() == []
    assert dom0.error(Op.READ, "/local/domain/1") == "ENOENT"
    assert dom0.end(tx) == "", "done again"
    assert engine.check() == []


def test_quotas_go_by_their_own_names_too() -> None:
    quotas = OXENSTORED.parse_quotas(["quota-maxentity=5", "path-max=7"])
    assert (quotas.nodes, quotas.path_max, quotas.watches) == (5, 7, 100)
    with pytest.raises(UsageError, match="no quota 'maxentity'"):
        OXENSTORED.parse_quotas(["maxentity=5"])
    with pytest.raises(UsageError, match="no profile 'oxen'; there are xenstored, oxenstored"):
        profile_of("oxen")


class Ticks:
    """The hooks that a conflict needs: a clock that a test turns."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        assert seconds == 0.05
        self.waiting.append(callback)

    def introduce(self, domid: int, gfn: int, port: int, done: Callable[[str | None], None]) -> None:
        done(None)

    def release(self, domid: int) -> None:
        pass

    def tick(self) -> None:
        (callback,) = self.waiting
        self.waiting.clear()
        callback()


def conflict(victim: Talk, guilty: Talk) -> None:
    """`guilty` makes a commit of `victim` fail."""
    victim.write("/shared/x", "0")
    tx = victim.start()
    victim.read("/shared/x", tx)
    victim.write("/shared/y", "1", tx)
    guilty.write("/shared/x", "1")
    assert victim.end(tx) == "EAGAIN"


def test_who_makes_others_fail_has_to_wait() -> None:
    ticks = Ticks()
    engine = Engine(hooks=cast(Hooks, ticks), profile=OXENSTORED)
    dom0 = Talk(engine)
    guests = [guest(engine, dom0, domid) for domid in (1, 2, 3)]
    victim, guilty, other = guests
    dom0.write("/shared")
    dom0.chmod("/shared", "b0")
    for _ in range(4):
        conflict(victim, guilty)
        assert guilty.conn.may_send
    conflict(victim, other)
    assert all(one.conn.may_send for one in guests)
    conflict(victim, guilty)
    conflict(victim, guilty)
    assert [one.conn.may_send for one in guests] == [True, False, True]
    conflict(victim, dom0)
    conflict(dom0, other)
    ticks.tick()
    assert not guilty.conn.may_send, "it was one below nothing"
    ticks.tick()
    assert guilty.conn.may_send
    while ticks.waiting:
        ticks.tick()
    assert engine.beside.history.newest is None, "nothing is kept"
    for _ in range(4):
        conflict(victim, guilty)
    assert guilty.conn.may_send, "all credit was given back"


def test_a_transaction_that_is_old_blames_nobody() -> None:
    ticks = Ticks()
    engine = Engine(hooks=cast(Hooks, ticks), profile=OXENSTORED)
    dom0 = Talk(engine)
    victim, guilty = guest(engine, dom0, 1), guest(engine, dom0, 2)
    dom0.write("/shared")
    dom0.chmod("/shared", "b0")
    for _ in range(10):
        tx = victim.start()
        victim.error(Op.READ, "/shared/x", tx=tx)
        victim.write("/shared/y", "1", tx)
        ticks.tick()
        ticks.tick()
        guilty.write("/shared/x", "1")
        assert victim.end(tx) == "EAGAIN"
        guilty.ask(Op.RM, "/shared/x")
    assert guilty.conn.may_send
