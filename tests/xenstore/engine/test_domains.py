"""Domains: introduction, release, death, features, CONTROL; and what a guest may not ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import CODECS, Op


class RecordingHooks:
    """What the engine asks of its daemon, kept; INTRODUCE is answered when a test says so."""

    def __init__(self) -> None:
        self.introducing: list[tuple[int, int, int, Callable[[str | None], None]]] = []
        self.released: list[int] = []
        self.lines: list[str] = []
        self.reports: dict[str, str] = {}

    def introduce(self, domid: int, gfn: int, port: int, done: Callable[[str | None], None]) -> None:
        self.introducing.append((domid, gfn, port, done))

    def release(self, domid: int) -> None:
        self.released.append(domid)

    def domain_exists(self, domid: int) -> bool:
        return domid == 70

    def log(self, text: str) -> None:
        self.lines.append(text)

    def trouble(self) -> list[str]:
        return []

    def write_report(self, name: str, text: str) -> bool:
        self.reports[name] = text
        return name.startswith("/")


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    return Talk(engine)


def test_is_introduced_and_path(engine: Engine, dom0: Talk) -> None:
    assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, 5) is False
    dom0.ask(Op.INTRODUCE, 5, 1, 1)
    assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, 5) is True
    assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, 0) is True
    assert dom0.ask(Op.GET_DOMAIN_PATH, 77) == "/local/domain/77"
    assert Talk(engine, 5).ask(Op.GET_DOMAIN_PATH, 77) == "/local/domain/77"
    dom0.ask(Op.RELEASE, 5)
    assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, 5) is False


@pytest.mark.parametrize(
    ("op", "payload", "error"),
    [
        (Op.INTRODUCE, b"", "EINVAL"),
        (Op.INTRODUCE, b"5\x001\0", "EINVAL"),
        (Op.INTRODUCE, b"x\x001\x001\0", "EINVAL"),
        (Op.INTRODUCE, b"0\x001\x001\0", "EINVAL"),
        (Op.INTRODUCE, b"32752\x001\x001\0", "EINVAL"),
        (Op.INTRODUCE, b"65536\x001\x001\0", "EINVAL"),
        (Op.INTRODUCE, b"5\x001\x000\0", "EINVAL"),
        (Op.INTRODUCE, b"5\0x\x001\0", "EINVAL"),
        (Op.RELEASE, b"", "EINVAL"),
        (Op.RELEASE, b"0\0", "EINVAL"),
        (Op.RELEASE, b"5\0", "ENOENT"),
        (Op.RELEASE, b"five\0", "EINVAL"),
        (Op.RESUME, b"5\0", "ENOENT"),
        (Op.RESUME, b"0\0", "EINVAL"),
        (Op.IS_DOMAIN_INTRODUCED, b"", "EINVAL"),
        (Op.IS_DOMAIN_INTRODUCED, b"-1\0", "EINVAL"),
        (Op.GET_DOMAIN_PATH, b"x\0", "EINVAL"),
        (Op.GET_DOMAIN_PATH, b"", "EINVAL"),
        (Op.SET_TARGET, b"5\0", "EINVAL"),
        (Op.SET_TARGET, b"5\x006\0", "ENOENT"),
        (Op.SET_FEATURE, b"5\0", "EINVAL"),
        (Op.SET_FEATURE, b"5\x002\0", "ENOENT"),
        (Op.SET_FEATURE, b"0\x002\0", "EBUSY"),
        (Op.GET_FEATURE, b"5\0", "ENOENT"),
        (Op.GET_FEATURE, b"1\x002\0", "EINVAL"),
        (Op.CONTROL, b"", "EINVAL"),
        (Op.CONTROL, b"what\0", "EINVAL"),
    ],
)
def test_errors(dom0: Talk, op: Op, payload: bytes, error: str) -> None:
    assert dom0.raw_error(op, payload) == error


def test_a_signed_gfn_is_accepted(dom0: Talk) -> None:
    assert dom0.raw_error(Op.INTRODUCE, b"5\0-12\x001\0") == ""


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (Op.CONTROL, ("help",)),
        (Op.INTRODUCE, (6, 1, 1)),
        (Op.RELEASE, (6,)),
        (Op.RESUME, (6,)),
        (Op.IS_DOMAIN_INTRODUCED, (6,)),
        (Op.SET_TARGET, (5, 6)),
        (Op.SET_FEATURE, (6, 2)),
        (Op.GET_FEATURE, (6,)),
        (Op.GET_QUOTA, ()),
        (Op.SET_QUOTA, ("nodes", 5)),
    ],
)
def test_what_is_dom0s_alone(engine: Engine, dom0: Talk, op: Op, arguments: tuple) -> None:
    guest(engine, dom0, 6)
    assert guest(engine, dom0, 5).raw_error(op, CODECS[op].request(*arguments)) == "EACCES"


# ---- death ----


def test_nothing_of_a_dead_domain_stays(engine: Engine, dom0: Talk) -> None:
    five, six = guest(engine, dom0, 5), guest(engine, dom0, 6)
    five.write("data/deep/er", "1")
    five.watch("data")
    five.start()
    dom0.write("/local/domain/5/device/vbd/51712/state", "1")
    dom0.write("/local/domain/6/peer")
    dom0.chmod("/local/domain/6/peer", "n6 b5")
    dom0.write("/x/five")
    dom0.chmod("/x/five", "n5")
    dom0.write("/x/five/dom0s")
    dom0.chmod("/x/five/dom0s", "n0")
    watcher = Talk(engine)
    watcher.watch("/x")
    watcher.watch("@releaseDomain", "r")
    assert engine.check() == []
    engine.domain_died(5)
    assert dom0.ls("/local/domain") == ["6"]
    assert dom0.ls("/x") == [], "with their children, whoever owns those"
    assert dom0.perms("/local/domain/6/peer") == "n6 b5", "to be seen, and no more"
    assert five.conn.closed
    assert 5 not in engine.domains
    assert watcher.seen() == ["/x/five", "@releaseDomain"]
    assert engine.check() == []
    assert six.error(Op.WRITE, "still", "1") == ""
    again = guest(engine, dom0, 5)
    assert again.error(Op.READ, "/local/domain/6/peer") == "EACCES", "a new domain has none of its rights"


def test_a_dead_domains_tree_fires_at_its_root_alone(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.write("/x")
    dom0.chmod("/x", "n0 b5")
    tx = five.start()
    five.write("/x/p/q/r", "", tx)
    assert five.end(tx) == ""
    dom0.watch("/x")
    engine.domain_died(5)
    assert dom0.seen() == ["/x/p"]


def test_death_of_a_domain_never_introduced(engine: Engine, dom0: Talk) -> None:
    Talk(engine, 5)
    dom0.write("/n5")
    dom0.chmod("/n5", "n5")
    dom0.watch("@releaseDomain")
    engine.domain_died(5)
    assert dom0.seen() == []
    assert dom0.error(Op.READ, "/n5") == "ENOENT"


def test_domain_0_does_not_die(engine: Engine, dom0: Talk) -> None:
    dom0.write("/a")
    engine.domain_died(0)
    assert dom0.read("/a") == b""
    assert engine.check() == []


def test_special_paths_of_a_dead_owner_are_dom0s_again(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    dom0.chmod("@introduceDomain", "n5")
    dom0.chmod("@releaseDomain", "n0 r5")
    engine.domain_died(5)
    assert dom0.perms("@introduceDomain") == dom0.perms("@releaseDomain") == "n0"
    assert engine.check() == []


# ---- features ----


def test_features(engine: Engine, dom0: Talk) -> None:
    assert dom0.ask(Op.GET_FEATURE) == 14
    assert dom0.payload(Op.GET_FEATURE, b"") == 14
    Talk(engine, 5)
    assert dom0.ask(Op.GET_FEATURE, 5) == 14
    dom0.ask(Op.SET_FEATURE, 5, 2)
    assert dom0.ask(Op.GET_FEATURE, 5) == 2
    assert dom0.error(Op.SET_FEATURE, 5, 1) == "EINVAL", "reconnection is not supported"
    five = guest(engine, dom0, 5)
    assert five.ask(Op.GET_FEATURE) == 2
    assert dom0.error(Op.SET_FEATURE, 5, 6) == "EBUSY"
    five.write("data")
    dom0.write("/any")
    assert five.error(Op.SET_PERMS, "data", ["n5", "r32757"]) == ""
    guest(engine, dom0, 6)
    assert Talk(engine, 6).error(Op.READ, "/local/domain/5/data") == "EACCES", "not without DOMID_ANY"


# ---- hooks ----


def test_introduce_is_answered_when_the_daemon_is_done() -> None:
    hooks = RecordingHooks()
    engine = Engine(hooks=hooks)
    dom0, watcher = Talk(engine), Talk(engine)
    watcher.watch("@introduceDomain")
    assert dom0.raw(Op.INTRODUCE, b"5\0-7\x003\0") == []
    ((domid, gfn, port, done),) = hooks.introducing
    assert (domid, gfn, port) == (5, 7, 3)
    assert dom0.ask(Op.IS_DOMAIN_INTRODUCED, 5) is False
    done(None)
    assert [message.op for message in dom0.take()] == [Op.INTRODUCE]
    assert watcher.seen() == ["@introduceDomain"]
    dom0.raw(Op.INTRODUCE, b"6\x001\x003\0")
    hooks.introducing[1][3]("EPERM")
    (error,) = dom0.take()
    assert error.payload == b"EPERM\0"
    dom0.ask(Op.RELEASE, 5)
    assert hooks.released == [5]


def test_an_answer_to_who_left_is_dropped() -> None:
    hooks = RecordingHooks()
    engine = Engine(hooks=hooks)
    dom0 = Talk(engine)
    dom0.raw(Op.INTRODUCE, b"5\x001\x003\0")
    engine.disconnect(dom0.conn)
    hooks.introducing[0][3](None)
    assert not dom0.conn.out
    assert engine.domain(5).introduced


def test_a_domain_that_only_the_daemon_knows_may_own_nodes() -> None:
    dom0 = Talk(Engine(hooks=RecordingHooks()))
    dom0.write("/a")
    assert dom0.error(Op.SET_PERMS, "/a", ["n70"]) == ""
    assert dom0.error(Op.SET_PERMS, "/a", ["n71"]) == "ENOENT"
    assert dom0.error(Op.SET_FEATURE, 70, 2) == ""


# ---- CONTROL ----


def test_control_help_check_print() -> None:
    hooks = RecordingHooks()
    dom0 = Talk(Engine(hooks=hooks))
    text = dom0.ask(Op.CONTROL, "help")
    for word in ("check", "log", "memreport", "print", "quota", "live-update", "help"):
        assert word in text
    assert dom0.ask(Op.CONTROL, "check") == "OK"
    assert dom0.ask(Op.CONTROL, "print", "hello") == "OK"
    assert hooks.lines == ["control: hello"]
    assert "began no live update" in dom0.ask(Op.CONTROL, "live-update", "-s")


def test_control_check_names_what_is_wrong(engine: Engine, dom0: Talk) -> None:
    dom0.write("/a/b")
    del engine.nodes[b"/a/b"]
    text = dom0.ask(Op.CONTROL, "check")
    assert "/a" in text and "has no node" in text and "nodes counted" in text


def test_control_quota(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.write("data")
    listed = dom0.ask(Op.CONTROL, "quota")
    assert "nodes            :     1000 Nodes per domain" in listed
    assert "memory" in dom0.ask(Op.CONTROL, "quota-soft")
    assert "nodes           :        2" in dom0.ask(Op.CONTROL, "quota", "5")
    assert dom0.error(Op.CONTROL, "quota", "77") == "ENOENT"
    assert dom0.ask(Op.CONTROL, "quota", "set", "nodes", "2") == "OK"
    assert five.error(Op.WRITE, "more", "") == "ENOSPC", "for those that are there too"
    assert dom0.ask(Op.CONTROL, "quota-soft", "set", "memory", "9") == "OK"
    assert dom0.ask(Op.GET_QUOTA, "soft-memory") == "9"
    assert "nodes            :        2" in dom0.ask(Op.CONTROL, "quota", "max")
    assert "Max." in dom0.ask(Op.CONTROL, "quota", "max", "-r")
    for words in (
        ("quota", "set", "nodes"),
        ("quota", "set", "nodes", "0"),
        ("quota", "set", "what", "1"),
        ("quota", "max", "-x"),
        ("quota", "five"),
        ("quota-soft", "set", "nodes", "1"),
        ("quota-soft", "5"),
        ("check", "x"),
        ("help", "x"),
        ("print",),
        ("log", "what"),
        ("log", "on", "off"),
        ("memreport", "a", "b"),
    ):
        assert dom0.error(Op.CONTROL, *words) == "EINVAL", words


def test_control_log_and_memreport() -> None:
    hooks = RecordingHooks()
    dom0 = Talk(Engine(hooks=hooks))
    assert "io      : off" in dom0.ask(Op.CONTROL, "log")
    dom0.ask(Op.CONTROL, "log", "+io")
    dom0.ask(Op.CONTROL, "log", "on")
    hooks.lines.clear()
    dom0.write("/a", "1")
    dom0.error(Op.READ, "/none")
    assert hooks.lines == ["d0 WRITE tx 0 (/a 1) -> OK", "d0 READ tx 0 (/none ) -> ENOENT"]
    dom0.ask(Op.CONTROL, "log", "off")
    hooks.lines.clear()
    dom0.write("/a", "2")
    assert hooks.lines == []
    assert "domain 0: nodes" in dom0.ask(Op.CONTROL, "memreport")
    assert dom0.ask(Op.CONTROL, "memreport", "/report") == "OK"
    assert "generation" in hooks.reports["/report"]
    assert dom0.error(Op.CONTROL, "memreport", "nowhere") == "EINVAL"
