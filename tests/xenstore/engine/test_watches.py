"""Watches: what fires, for whom, in which order, and what it costs."""

from __future__ import annotations

import time

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import CODECS, Message, Op


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    talk = Talk(engine)
    talk.write("/a/b/c", "1")
    return talk


def kinds(messages: list[Message]) -> list[int]:
    return [message.op for message in messages]


def test_the_ack_comes_before_the_first_event_which_always_fires(engine: Engine, dom0: Talk) -> None:
    assert kinds(dom0.raw(Op.WATCH, b"/a\0t\0")) == [Op.WATCH, Op.WATCH_EVENT]
    assert kinds(dom0.raw(Op.WATCH, b"/missing\0t\0")) == [Op.WATCH, Op.WATCH_EVENT]
    five = guest(engine, dom0, 5)
    assert kinds(five.raw(Op.WATCH, b"/a/b\0t\0")) == [Op.WATCH, Op.WATCH_EVENT], "unreadable too"
    assert five.events == [("/a/b", "t")]


def test_ones_own_write_brings_the_event_before_the_reply(dom0: Talk) -> None:
    dom0.watch("/a")
    assert kinds(dom0.raw(Op.WRITE, b"/a/b\x002")) == [Op.WATCH_EVENT, Op.WRITE]


@pytest.mark.parametrize(
    ("op", "arguments", "path"),
    [
        (Op.WRITE, ("/a/b", "2"), "/a/b"),
        (Op.WRITE, ("/a/b", "1"), "/a/b"),
        (Op.WRITE, ("/a/x/y/z", ""), "/a/x/y/z"),
        (Op.MKDIR, ("/a/x/y",), "/a/x/y"),
        (Op.SET_PERMS, ("/a/b/c", ["r0"]), "/a/b/c"),
        (Op.RM, ("/a/b",), "/a/b"),
        (Op.RM, ("/a",), "/a"),
    ],
)
def test_a_change_fires_once_for_its_path(
    engine: Engine, dom0: Talk, op: Op, arguments: tuple, path: str
) -> None:
    watcher = Talk(engine)
    watcher.watch("/a")
    dom0.ask(op, *arguments)
    assert watcher.seen() == [path]


def test_what_changes_nothing_fires_nothing(engine: Engine, dom0: Talk) -> None:
    dom0.watch("/")
    dom0.ask(Op.MKDIR, "/a/b")
    dom0.ask(Op.RM, "/a/none")
    dom0.read("/a/b")
    dom0.error(Op.WRITE, "/a//b", "")
    assert dom0.seen() == []


def test_only_ancestors_and_the_node_itself(dom0: Talk) -> None:
    for path in ("/", "/a", "/a/b", "/a/b/c", "/a/bc", "/a/b/c/d", "/b"):
        dom0.ask(Op.WATCH, path, path)
    dom0.take()
    dom0.events.clear()
    dom0.write("/a/b/c", "2")
    dom0.take()
    assert dom0.events == [("/a/b/c", token) for token in ("/", "/a", "/a/b", "/a/b/c")]


def test_rm_fires_at_its_root_and_inside_at_the_watches_own_paths(dom0: Talk) -> None:
    dom0.write("/a/b/d")
    for path in ("/", "/a/b", "/a/b/c", "/a/b/d", "/a/b/none"):
        dom0.ask(Op.WATCH, path, "at " + path)
    dom0.take()
    dom0.events.clear()
    dom0.ask(Op.RM, "/a")
    dom0.take()
    assert dom0.events == [
        ("/a/b/c", "at /a/b/c"),
        ("/a/b/d", "at /a/b/d"),
        ("/a/b", "at /a/b"),
        ("/a", "at /"),
    ]


@pytest.mark.parametrize(
    ("watched", "depth", "heard"),
    [
        ("/", 0, []),
        ("/", 1, ["/a"]),
        ("/", 2, ["/a", "/a/b"]),
        ("/a", 0, ["/a"]),
        ("/a", 1, ["/a", "/a/b"]),
        ("/a", 2, ["/a", "/a/b", "/a/b/c"]),
        ("/a", None, ["/a", "/a/b", "/a/b/c"]),
    ],
)
def test_depth(dom0: Talk, watched: str, depth: int | None, heard: list[str]) -> None:
    dom0.watch(watched, "t", depth)
    for path in ("/a", "/a/b", "/a/b/c"):
        dom0.write(path, "2")
    assert dom0.seen() == heard


def test_relative_watches_get_relative_events(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.raw(Op.WATCH, b"data\0t\0")
    assert five.events == [("data", "t")]
    five.events.clear()
    five.write("/local/domain/5/data/x")
    assert five.seen() == ["data/x"]
    assert five.error(Op.WATCH, "/local/domain/5/data", "t") == "EEXIST", "it is the same node"
    assert five.error(Op.UNWATCH, "/local/domain/5/data", "t") == ""


def test_same_path_and_token_again(dom0: Talk) -> None:
    dom0.watch("/a", "t")
    assert dom0.error(Op.WATCH, "/a", "t") == "EEXIST"
    assert dom0.error(Op.WATCH, "/a", "u") == ""
    assert dom0.error(Op.UNWATCH, "/a", "v") == "ENOENT"
    assert dom0.error(Op.UNWATCH, "/a", "t") == ""
    assert dom0.error(Op.UNWATCH, "/a", "t") == "ENOENT"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"/a\0",
        b"/a",
        b"/a//b\0t\0",
        b"/a\0t\0x\0",
        b"/a\0t\0-1\0",
        b"/a\0t\x001\x002\0",
        b"/a b\0t\0",
    ],
)
def test_malformed_watches(dom0: Talk, payload: bytes) -> None:
    assert dom0.raw_error(Op.WATCH, payload) == "EINVAL"


@pytest.mark.parametrize("payload", [b"", b"/a\0", b"/a\0t\0x\0"])
def test_malformed_unwatches(dom0: Talk, payload: bytes) -> None:
    assert dom0.raw_error(Op.UNWATCH, payload) == "EINVAL"
    assert dom0.raw_error(Op.UNWATCH, b"/a//\0t\0") == "ENOENT", "as 4.17 says it"


def test_a_guest_without_the_feature_knows_no_depth(engine: Engine, dom0: Talk) -> None:
    dom0.raw(Op.GET_QUOTA, b"\0")
    Talk(engine, 5)
    dom0.ask(Op.SET_FEATURE, 5, 2)
    five = guest(engine, dom0, 5)
    assert five.error(Op.WATCH, "data", "t", 1) == "EINVAL"
    assert five.error(Op.WATCH, "data", "t") == ""


# ---- identical events ----


def test_an_identical_event_still_queued_is_not_queued_twice(engine: Engine, dom0: Talk) -> None:
    watcher = Talk(engine)
    watcher.watch("/a", "t")
    watcher.ask(Op.WATCH, "/a", "u")
    watcher.take()
    watcher.events.clear()
    for value in "123":
        dom0.write("/a/b", value)
    dom0.write("/a", "x")
    watcher.take()
    assert watcher.events == [("/a/b", "t"), ("/a/b", "u"), ("/a", "t"), ("/a", "u")]
    watcher.events.clear()
    dom0.write("/a/b", "4")
    assert watcher.seen() == ["/a/b", "/a/b"], "once taken, it is queued anew"


def test_merging_holds_when_part_of_the_queue_was_taken(engine: Engine, dom0: Talk) -> None:
    watcher = Talk(engine)
    watcher.watch("/a", "t")
    for path in ("/a/1", "/a/2", "/a/1", "/a/3", "/a/2"):
        dom0.write(path, "")
    first = watcher.conn.take(1)
    assert b"/a/1" in first and b"/a/2" not in first
    dom0.write("/a/1", "")
    dom0.write("/a/2", "")
    assert watcher.seen() == ["/a/2", "/a/3", "/a/1"]
    assert watcher.conn.queued == 0 and not watcher.conn.events


def test_special_events_are_never_merged(engine: Engine, dom0: Talk) -> None:
    watcher = Talk(engine)
    watcher.watch("@introduceDomain")
    for domid in (5, 6, 7):
        dom0.ask(Op.INTRODUCE, domid, 1, 1)
    assert watcher.seen() == ["@introduceDomain"] * 3


# ---- who may hear ----


@pytest.mark.parametrize(
    ("parent", "node", "hears"),
    [
        ("n0", "n0", False),
        ("n0", "n0 r5", True),
        ("n0", "n0 w5", False),
        ("n0 r5", "n0", True),
        ("r0", "n0 n5", True),
        ("n0", "n5", True),
    ],
)
def test_the_node_or_its_parent_is_readable(
    engine: Engine, dom0: Talk, parent: str, node: str, hears: bool
) -> None:
    five = guest(engine, dom0, 5)
    dom0.chmod("/a/b", parent)
    dom0.chmod("/a/b/c", node)
    five.watch("/a/b/c")
    dom0.write("/a/b/c", "2")
    assert five.seen() == (["/a/b/c"] if hears else [])
    dom0.ask(Op.RM, "/a/b/c")
    assert five.seen() == (["/a/b/c"] if hears else [])


def test_who_loses_the_right_is_told_once_more(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.chmod("/a/b", "n0")
    dom0.chmod("/a/b/c", "n0 r5")
    five.watch("/a/b/c")
    dom0.chmod("/a/b/c", "n0")
    assert five.seen() == ["/a/b/c"]
    dom0.write("/a/b/c", "2")
    assert five.seen() == []
    dom0.chmod("/a/b/c", "n0 r5")
    assert five.seen() == ["/a/b/c"]


def test_losing_it_in_a_transaction_is_told_too(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.chmod("/a/b", "n0")
    dom0.chmod("/a/b/c", "n0 r5")
    five.watch("/a/b/c")
    tx = dom0.start()
    dom0.chmod("/a/b/c", "n0", tx)
    assert dom0.end(tx) == ""
    assert five.seen() == ["/a/b/c"]


# ---- special paths ----


def test_introduce_and_release(engine: Engine, dom0: Talk) -> None:
    plain, named, only7, zero = (Talk(engine) for _ in range(4))
    for talk, depth in ((plain, None), (named, 1), (zero, 0)):
        talk.watch("@introduceDomain", "i", depth)
        talk.watch("@releaseDomain", "r", depth)
    only7.watch("@releaseDomain/7", "r")
    for domid in (7, 8):
        dom0.ask(Op.INTRODUCE, domid, 1, 1)
    dom0.ask(Op.INTRODUCE, 7, 1, 2)
    assert plain.seen() == ["@introduceDomain"] * 2, "introducing again fires nothing"
    assert named.seen() == ["@introduceDomain/7", "@introduceDomain/8"]
    dom0.ask(Op.RELEASE, 8)
    engine.domain_died(7)
    engine.domain_died(7)
    assert plain.seen() == ["@releaseDomain"] * 2
    assert named.seen() == ["@releaseDomain/8", "@releaseDomain/7"]
    assert only7.seen() == ["@releaseDomain/7"]
    assert zero.seen() == []


def test_a_guest_hears_special_events_by_their_permissions(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.watch("@releaseDomain")
    dom0.ask(Op.INTRODUCE, 6, 1, 1)
    dom0.ask(Op.RELEASE, 6)
    assert five.seen() == []
    dom0.chmod("@releaseDomain", "n0 r5")
    five.seen()
    dom0.ask(Op.INTRODUCE, 6, 1, 1)
    dom0.ask(Op.RELEASE, 6)
    assert five.seen() == ["@releaseDomain"]


def test_shutdown_fires_once_until_resume(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    watcher = Talk(engine)
    watcher.watch("@releaseDomain")
    engine.domain_shutdown(5)
    engine.domain_shutdown(5)
    assert watcher.seen() == ["@releaseDomain"]
    dom0.ask(Op.RESUME, 5)
    engine.domain_shutdown(5)
    assert watcher.seen() == ["@releaseDomain"]


# ---- the end of watches, and the cost ----


def test_reset_watches_drops_watches_and_transactions(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.watch("data")
    tx = five.start()
    five.write("data", "1", tx)
    assert five.raw_error(Op.RESET_WATCHES, b"") == ""
    assert five.error(Op.READ, "data", tx=tx) == "ENOENT"
    dom0.write("/local/domain/5/data")
    assert five.seen() == []
    assert (engine.domain(5).watches, engine.domain(5).transactions) == (0, 0)
    assert engine.check() == []


def test_disconnecting_drops_watches(engine: Engine, dom0: Talk) -> None:
    watcher = Talk(engine)
    watcher.watch("/a")
    engine.disconnect(watcher.conn)
    dom0.write("/a", "2")
    assert not watcher.conn.out
    assert not engine.watches.by_path
    assert engine.check() == []


def test_others_are_marked_dirty_and_the_asker_is_not(engine: Engine, dom0: Talk) -> None:
    watcher = Talk(engine)
    watcher.watch("/a")
    dom0.watch("/a")
    engine.take_dirty()
    dom0.raw(Op.WRITE, b"/a\x002")
    assert engine.take_dirty() == {watcher.conn}
    assert engine.take_dirty() == set()


def test_a_write_asks_no_watch_that_lies_elsewhere(engine: Engine, dom0: Talk) -> None:
    """By the time it takes: a list of 1000 would cost a hundred times more than the index."""
    message = Message(Op.WRITE, 1, 0, CODECS[Op.WRITE].request("/a/b/c", "2"))

    def seconds() -> float:
        best = 1.0
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(200):
                engine.handle(dom0.conn, message)
            best = min(best, time.perf_counter() - begin)
            dom0.conn.take()
        return best

    before = seconds()
    watcher = Talk(engine)
    for number in range(1000):
        watcher.watch(f"/elsewhere/{number}/state")
    assert seconds() < before * 4
