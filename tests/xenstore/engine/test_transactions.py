"""Transactions: what conflicts and what does not, one rule a test; then serialisability as a property."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_talk import Talk, guest

from xenbus.errors import Conflict, NoEntry
from xenbus.xenstore.engine import Engine, Quotas
from xenbus.xenstore.wire import Op


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    talk = Talk(engine)
    talk.write("/a", "1")
    talk.write("/b", "1")
    return talk


@pytest.fixture
def other(engine: Engine) -> Talk:
    return Talk(engine)


def test_nothing_is_seen_outside_before_the_end(dom0: Talk, other: Talk) -> None:
    tx = dom0.start()
    dom0.write("/a", "2", tx)
    dom0.write("/new/deep", "3", tx)
    dom0.ask(Op.RM, "/b", tx=tx)
    assert (dom0.read("/a", tx), dom0.read("/new/deep", tx)) == (b"2", b"3")
    assert dom0.error(Op.READ, "/b", tx=tx) == "ENOENT"
    assert dom0.ls("/", tx) == ["tool", "a", "new"]
    assert other.read("/a") == other.read("/b") == b"1"
    assert other.error(Op.READ, "/new") == "ENOENT"
    assert dom0.end(tx) == ""
    assert other.read("/a") == b"2"
    assert other.ls("/") == ["tool", "a", "new"]


def test_abort_leaves_nothing(dom0: Talk, engine: Engine) -> None:
    generation = engine.nodes[b"/a"].generation
    tx = dom0.start()
    dom0.write("/a", "2", tx)
    dom0.write("/c/d", "", tx)
    assert dom0.end(tx, commit=False) == ""
    assert dom0.read("/a") == b"1"
    assert engine.nodes[b"/a"].generation == generation
    assert engine.check() == []


def act_read(talk: Talk, tx: int) -> None:
    talk.read("/a", tx)


def act_list(talk: Talk, tx: int) -> None:
    talk.ls("/a", tx)


def act_perms(talk: Talk, tx: int) -> None:
    talk.perms("/a", tx)


def act_write(talk: Talk, tx: int) -> None:
    talk.write("/a", "mine", tx)


def act_miss(talk: Talk, tx: int) -> None:
    assert talk.error(Op.READ, "/a/none", tx=tx) == "ENOENT"


def act_create(talk: Talk, tx: int) -> None:
    talk.write("/a/mine", "", tx)


@pytest.mark.parametrize("act", [act_read, act_list, act_perms, act_write])
@pytest.mark.parametrize("outside", ["write", "same", "perms", "rm", "rm-and-write", "child"])
def test_any_change_from_outside_of_a_node_touched_inside(dom0: Talk, other: Talk, act, outside: str) -> None:
    tx = dom0.start()
    act(dom0, tx)
    {
        "write": lambda: other.write("/a", "2"),
        "same": lambda: other.write("/a", "1"),
        "perms": lambda: other.chmod("/a", "n0"),
        "rm": lambda: other.ask(Op.RM, "/a"),
        "rm-and-write": lambda: (other.ask(Op.RM, "/a"), other.write("/a", "1")),
        "child": lambda: other.write("/a/child"),
    }[outside]()
    assert dom0.end(tx) == "EAGAIN"
    assert dom0.end(tx) == "ENOENT", "a transaction that failed is over"


def test_a_node_missed_inside_and_made_outside(dom0: Talk, other: Talk) -> None:
    tx = dom0.start()
    act_miss(dom0, tx)
    other.write("/a/none")
    assert dom0.end(tx) == "EAGAIN"


def test_siblings_made_inside_and_outside(dom0: Talk, other: Talk) -> None:
    tx = dom0.start()
    act_create(dom0, tx)
    other.write("/a/theirs")
    assert dom0.end(tx) == "EAGAIN"
    assert dom0.ls("/a") == ["theirs"]


def test_an_unrelated_write_outside_does_no_harm(dom0: Talk, other: Talk) -> None:
    tx = dom0.start()
    act_read(dom0, tx)
    act_create(dom0, tx)
    other.write("/b", "2")
    other.write("/b/child", "2")
    assert dom0.end(tx) == ""
    assert dom0.read("/b") == b"2"


def test_a_node_first_touched_after_a_write_outside_shows_the_new_value(dom0: Talk, other: Talk) -> None:
    tx = dom0.start()
    dom0.read("/b", tx)
    other.write("/a", "2")
    assert dom0.read("/a", tx) == b"2"
    assert dom0.end(tx) == ""


def test_a_node_touched_before_keeps_showing_what_it_was(dom0: Talk, other: Talk) -> None:
    dom0.write("/a/child", "1")
    tx = dom0.start()
    assert (dom0.read("/a", tx), dom0.ls("/a", tx), dom0.perms("/a", tx)) == (b"1", ["child"], "n0")
    other.write("/a", "2")
    other.write("/a/more", "2")
    other.chmod("/a", "r0")
    assert (dom0.read("/a", tx), dom0.ls("/a", tx), dom0.perms("/a", tx)) == (b"1", ["child"], "n0")
    other.ask(Op.RM, "/a")
    assert (dom0.read("/a", tx), dom0.ls("/a", tx)) == (b"1", ["child"])
    assert dom0.end(tx) == "EAGAIN"


def test_two_transactions_the_first_to_end_wins(dom0: Talk, other: Talk) -> None:
    first, second = dom0.start(), other.start()
    dom0.write("/a", "first", first)
    other.write("/a", "second", second)
    assert other.end(second) == ""
    assert dom0.end(first) == "EAGAIN"
    assert dom0.read("/a") == b"second"


def test_two_readers_do_not_disturb_each_other(dom0: Talk, other: Talk) -> None:
    first, second = dom0.start(), other.start()
    assert dom0.read("/a", first) == other.read("/a", second) == b"1"
    assert dom0.end(first) == other.end(second) == ""


def test_made_and_removed_inside(dom0: Talk, engine: Engine) -> None:
    dom0.watch("/")
    tx = dom0.start()
    dom0.write("/t/x", "", tx)
    dom0.ask(Op.RM, "/t", tx=tx)
    assert dom0.end(tx) == ""
    assert dom0.ls("/") == ["tool", "a", "b"]
    assert dom0.seen() == []
    assert engine.check() == []


def test_removed_and_made_again_inside(dom0: Talk, engine: Engine) -> None:
    dom0.write("/a/child", "1")
    tx = dom0.start()
    dom0.ask(Op.RM, "/a", tx=tx)
    dom0.write("/a", "again", tx)
    assert dom0.end(tx) == ""
    assert dom0.read("/a") == b"again"
    assert dom0.ls("/a") == []
    assert engine.check() == []


def test_rm_of_a_tree_conflicts_with_a_change_below(dom0: Talk, other: Talk) -> None:
    dom0.write("/a/deep/er", "1")
    tx = dom0.start()
    dom0.ask(Op.RM, "/a", tx=tx)
    other.write("/a/deep/er", "2")
    assert dom0.end(tx) == "EAGAIN"
    assert dom0.read("/a/deep/er") == b"2"


# ---- ids and errors ----


def test_ids(dom0: Talk, other: Talk) -> None:
    first, second = dom0.start(), dom0.start()
    assert 0 not in (first, second)
    assert first != second
    assert dom0.error(Op.READ, "/a", tx=first + 1000) == "ENOENT"
    third = other.start()
    assert third == first, "ids belong to a connection"
    assert other.end(second) == "ENOENT"
    assert dom0.error(Op.TRANSACTION_START, tx=first) == "EBUSY"
    assert dom0.error(Op.TRANSACTION_END, True) == "ENOENT"
    for payload in (b"", b"\0", b"X\0", b"T", b"T\0T\0"):
        assert dom0.raw_error(Op.TRANSACTION_END, payload, first) == "EINVAL"
    assert dom0.end(first) == "" and dom0.end(second) == ""


def test_start_accepts_an_empty_payload(dom0: Talk) -> None:
    assert dom0.payload(Op.TRANSACTION_START, b"") > 0


def test_the_id_wraps_and_skips_those_in_use(dom0: Talk) -> None:
    held = dom0.start()
    dom0.conn.next_tx = 0xFFFF_FFFF
    assert [dom0.start() for _ in range(2)] == [0xFFFF_FFFF, held + 1]


def test_watch_ignores_the_id(dom0: Talk) -> None:
    assert dom0.raw_error(Op.WATCH, b"/a\0t\0", 77) == ""
    assert dom0.raw_error(Op.UNWATCH, b"/a\0t\0", 77) == ""


def test_disconnecting_aborts(dom0: Talk, other: Talk, engine: Engine) -> None:
    tx = other.start()
    other.write("/a", "2", tx)
    engine.disconnect(other.conn)
    assert dom0.read("/a") == b"1"
    assert engine.domain(0).transactions == 0
    assert all(node.snaps == 0 for node in engine.nodes.values())
    assert engine.check() == []


# ---- events ----


def test_events_come_at_the_end_once_a_node_in_order_of_first_access(dom0: Talk, other: Talk) -> None:
    other.watch("/")
    tx = dom0.start()
    dom0.read("/b", tx)
    dom0.write("/a", "2", tx)
    dom0.write("/b", "2", tx)
    dom0.write("/a", "3", tx)
    dom0.write("/c/d", "3", tx)
    assert other.seen() == []
    assert dom0.end(tx) == ""
    assert other.seen() == ["/b", "/a", "/c/d"]


def test_no_events_of_what_failed(dom0: Talk, other: Talk) -> None:
    dom0.watch("/a")
    tx = dom0.start()
    dom0.write("/a", "2", tx)
    other.ask(Op.RM, "/a")
    assert dom0.seen() == ["/a"]
    assert dom0.end(tx) == "EAGAIN"
    assert dom0.seen() == []


def test_rm_inside_fires_at_its_root_and_for_watches_inside_at_their_own_path(
    dom0: Talk, other: Talk
) -> None:
    dom0.write("/a/b/c")
    other.watch("/", "top")
    other.watch("/a/b/c", "inside")
    tx = dom0.start()
    dom0.ask(Op.RM, "/a", tx=tx)
    assert dom0.end(tx) == ""
    other.take()
    assert sorted(other.events) == [("/a", "top"), ("/a/b/c", "inside")]


# ---- a guest's limits, and death ----


def test_nodes_touched_in_a_transaction(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    engine.domain(5).quotas.set("transaction-nodes", 4)
    for name in "abcde":
        five.write(name)
    tx = five.start()
    for name in "abcd":
        five.read(name, tx)
    five.write("a", "2", tx)
    assert five.error(Op.READ, "e", tx=tx) == "ENOSPC"
    assert five.end(tx) == "ENOMEM"
    assert five.read("a") == b""
    assert engine.check() == []


def test_the_node_quota_holds_at_the_end(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    have = engine.domain(5).nodes
    engine.domain(5).quotas.set("nodes", have + 3)
    tx = five.start()
    for name in "abc":
        five.write(name, "", tx)
    assert five.end(tx) == "ENOSPC", "the last one is to be had outside of transactions alone"
    assert engine.domain(5).nodes == have
    tx = five.start()
    for name in "ab":
        five.write(name, "", tx)
    assert five.end(tx) == ""
    five.write("c")
    tx = five.start()
    assert five.error(Op.WRITE, "d", "", tx=tx) == "ENOSPC", "no room for one"
    five.ask(Op.RM, "a", tx=tx)
    five.ask(Op.RM, "b", tx=tx)
    assert five.end(tx) == ""
    assert engine.domain(5).nodes == have + 1
    assert engine.check() == []


def test_memory_of_open_transactions_is_counted_and_given_back(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    before = engine.domain(5).memory
    tx = five.start()
    five.write("a", "x" * 500, tx)
    assert engine.domain(5).memory >= before + 500
    assert engine.check() == []
    five.end(tx, commit=False)
    assert engine.domain(5).memory == before


def test_a_transaction_too_large_for_its_owners_memory_fails_and_does_not_stall(
    engine: Engine, dom0: Talk
) -> None:
    five = guest(engine, dom0, 5)
    for number in range(20):
        five.write(f"n{number}", "x" * 500)
    engine.domain(5).quotas.set("memory", engine.domain(5).memory + 5000)
    tx = five.start()
    errors = [five.error(Op.WRITE, f"n{number}", "y" * 500, tx=tx) for number in range(20)]
    assert errors[0] == "" and errors[-1] == "ENOMEM"
    assert five.conn.may_send
    assert five.end(tx) == "ENOMEM"
    assert five.read("n0") == b"x" * 500
    assert engine.check() == []


def test_a_dead_domain_does_not_come_back_by_a_transaction(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    dom0.write("/x")
    tx = dom0.start()
    dom0.chmod("/x", "n5", tx)
    engine.domain_died(5)
    assert dom0.end(tx) == "ENOMEM"
    assert dom0.perms("/x") == "n0"


def test_its_transactions_die_with_a_domain(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    tx = five.start()
    five.write("a", "", tx)
    engine.domain_died(5)
    assert all(node.snaps == 0 for node in engine.nodes.values())
    assert engine.check() == []


# ---- as a property ----

NAMES = ["/s/a", "/s/b", "/s/c", "/s/a/x"]
STEP = st.tuples(st.sampled_from(["read", "write", "rm", "ls"]), st.sampled_from(NAMES))
PROGRAM = st.lists(STEP, min_size=1, max_size=4)


def run_step(talk: Talk, step: tuple[str, str], tag: str, tx: int) -> object:
    verb, path = step
    try:
        if verb == "read":
            return talk.read(path, tx)
        if verb == "write":
            return talk.write(path, tag, tx)
        if verb == "ls":
            return sorted(talk.ls(path, tx))
        return talk.ask(Op.RM, path, tx=tx)
    except NoEntry:
        return "ENOENT"


def dump(engine: Engine) -> dict[bytes, bytes]:
    return {path: node.value for path, node in engine.nodes.items()}


def fresh() -> Engine:
    engine = Engine(Quotas())
    talk = Talk(engine)
    talk.write("/s/a", "0")
    talk.write("/s/b", "0")
    return engine


@settings(max_examples=80, deadline=None)
@given(st.lists(PROGRAM, min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_committed_transactions_have_a_serial_order(programs: list, random) -> None:
    """Interleave whole programs; those that commit must see and leave what some serial order gives."""
    engine = fresh()
    talks = [Talk(engine) for _ in programs]
    txs = [talk.start() for talk in talks]
    results: list[list[object]] = [[] for _ in programs]
    turns = [index for index, program in enumerate(programs) for _ in range(len(program) + 1)]
    random.shuffle(turns)
    committed: list[int] = []
    for index in turns:
        done = len(results[index])
        if done < len(programs[index]):
            step = programs[index][done]
            results[index].append(run_step(talks[index], step, f"t{index}s{done}", txs[index]))
        else:
            try:
                talks[index].ask(Op.TRANSACTION_END, True, tx=txs[index])
                committed.append(index)
            except Conflict:
                pass
    assert committed, "the first to end always commits"
    assert engine.check() == []
    assert all(node.snaps == 0 for node in engine.nodes.values())
    final = dump(engine)
    for order in itertools.permutations(committed):
        replay = fresh()
        talk = Talk(replay)
        same = all(
            run_step(talk, step, f"t{index}s{at}", 0) == results[index][at]
            for index in order
            for at, step in enumerate(programs[index])
        )
        if same and dump(replay) == final:
            return
    raise AssertionError("no serial order explains what was seen")
