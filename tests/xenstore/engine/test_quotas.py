"""Every limit of a guest: where it stops, with which error, and that dom0 is exempt."""

from __future__ import annotations

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.errors import UsageError
from xenbus.xenstore.engine import QUOTAS, Engine, Quotas
from xenbus.xenstore.wire import CODECS, Message, Op


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    return Talk(engine)


@pytest.fixture
def five(engine: Engine, dom0: Talk) -> Talk:
    return guest(engine, dom0, 5)


def test_nodes(engine: Engine, dom0: Talk, five: Talk) -> None:
    number = 0
    while engine.domain(5).nodes < 998:
        five.write(f"d{number // 100}/n{number}")
        number += 1
    while engine.domain(5).nodes < 1000:
        five.write(f"d0/last{engine.domain(5).nodes}")
    assert five.error(Op.WRITE, "more", "") == "ENOSPC"
    assert five.error(Op.MKDIR, "more") == "ENOSPC"
    assert five.error(Op.WRITE, "d0/n0", "x") == "", "what is there may change"
    five.ask(Op.RM, "d0/n0")
    assert five.error(Op.WRITE, "deep/er", "") == "ENOSPC", "two at once"
    assert five.error(Op.READ, "deep") == "ENOENT", "nothing of it was made"
    assert five.error(Op.WRITE, "more", "") == ""
    dom0.write("/local/domain/5/from/dom0")
    assert engine.domain(5).nodes == 1002, "dom0 is exempt, and the nodes are the guest's"
    assert engine.check() == []


def test_watches(five: Talk, dom0: Talk) -> None:
    # 4.17 compares with > and says E2BIG.
    for number in range(129):
        assert five.error(Op.WATCH, "data", str(number)) == ""
    assert five.error(Op.WATCH, "data", "more") == "E2BIG"
    five.ask(Op.UNWATCH, "data", "0")
    assert five.error(Op.WATCH, "data", "more") == ""
    for number in range(200):
        assert dom0.error(Op.WATCH, "/data", str(number)) == ""


def test_transactions(five: Talk, dom0: Talk) -> None:
    # 4.17 compares with >.
    open_ = [five.start() for _ in range(11)]
    assert five.error(Op.TRANSACTION_START) == "ENOSPC"
    five.end(open_[0])
    assert five.error(Op.TRANSACTION_START) == ""
    assert len({dom0.start() for _ in range(50)}) == 50


def test_node_size_counts_header_permissions_value_and_child_names(five: Talk, dom0: Talk) -> None:
    room = 2048 - 24 - 8 - 1
    assert five.error(Op.WRITE, "data", "x" * room) == ""
    assert five.error(Op.WRITE, "data", "x" * (room + 1)) == "ENOSPC"
    assert five.error(Op.WRITE, "other", "x" * (room + 1)) == "ENOSPC"
    assert five.error(Op.WRITE, "data/c", "") == "ENOSPC", "no room for the name"
    assert five.error(Op.SET_PERMS, "data", ["n5", "r0"]) == "ENOSPC"
    five.write("data", "x" * (room - 2))
    assert five.error(Op.WRITE, "data/c", "") == ""
    assert five.error(Op.WRITE, "data", "x" * (room - 1)) == "ENOSPC"
    assert dom0.error(Op.WRITE, "/local/domain/5/data", "x" * 4000) == ""


def test_permission_entries(five: Talk, dom0: Talk) -> None:
    five.write("data")
    assert five.error(Op.SET_PERMS, "data", ["n5", "r0", "r0", "r0", "r0"]) == ""
    assert five.error(Op.SET_PERMS, "data", ["n5", "r0", "r0", "r0", "r0", "r0"]) == "ENOSPC"
    assert dom0.error(Op.SET_PERMS, "/tool", ["n0"] * 20) == ""


def test_memory(engine: Engine, dom0: Talk, five: Talk) -> None:
    engine.domain(5).quotas.set("memory", 20_000)
    made = 0
    while five.error(Op.WRITE, f"n{made}", "x" * 1000) == "":
        made += 1
        assert made < 20
    assert 10 < made < 20
    assert five.error(Op.WRITE, f"n{made}", "x" * 1000) == "ENOMEM"
    for number in range(30):
        error = five.error(Op.WATCH, "data", str(number) + "t" * 100)
        if error:
            break
    assert error == "ENOMEM"
    five.ask(Op.RM, "n0")
    assert five.error(Op.WRITE, "n0", "y" * 1000) in ("", "ENOMEM")
    assert engine.domain(5).memory <= 20_100
    assert engine.check() == []


def test_events_beyond_the_memory_of_a_guest_are_dropped(engine: Engine, dom0: Talk, five: Talk) -> None:
    engine.domain(5).quotas.set("memory", 10_000)
    five.watch("data")
    for number in range(1000):
        dom0.write(f"/local/domain/5/data/{number}", "")
    assert engine.domain(5).memory - engine.nodes[b"/local/domain/5"].size >= 0
    assert five.conn.queued <= 10_000
    five.take()
    assert engine.check() == []


def test_outstanding_requests(engine: Engine, five: Talk) -> None:
    message = Message(Op.READ, 1, 0, CODECS[Op.READ].request("/local/domain/5"))
    for number in range(20):
        assert five.conn.may_send, number
        engine.handle(five.conn, message)
    assert not five.conn.may_send
    assert five.conn.outstanding == 20
    five.conn.take(1)
    assert five.conn.may_send
    five.conn.take()
    assert five.conn.outstanding == 0


def test_events_that_others_do_not_take_are_outstanding_too(engine: Engine, dom0: Talk, five: Talk) -> None:
    six = guest(engine, dom0, 6)
    five.write("shared")
    five.chmod("shared", "n5 r6")
    six.watch("/local/domain/5/shared")
    for number in range(20):
        assert five.conn.may_send, number
        five.write(f"shared/{number}")
    assert five.conn.outstanding == 20
    assert not five.conn.may_send
    assert six.conn.drop_events() == 20
    assert five.conn.outstanding == 0
    five.write("shared/again")
    assert five.conn.outstanding == 1
    engine.disconnect(six.conn)
    assert five.conn.outstanding == 0


def test_dom0_who_does_not_read_is_given_up(engine: Engine, dom0: Talk) -> None:
    deaf = engine.connect(0, queue_limit=10_000)
    engine.handle(deaf, Message(Op.WATCH, 1, 0, b"/\0t\0"))
    for number in range(1000):
        dom0.write(f"/a/{number}")
    assert deaf.overflow
    assert deaf.queued <= 10_000
    assert dom0.read("/a/999") == b""


def test_zero_is_no_limit(engine: Engine, dom0: Talk) -> None:
    for name in QUOTAS:
        dom0.ask(Op.SET_QUOTA, name, 0)
    five = guest(engine, dom0, 5)
    for number in range(1100):
        five.write(f"n{number}", "x" * 3000)
        assert five.error(Op.WATCH, "data", str(number)) == ""
    assert five.error(Op.SET_PERMS, "n0", ["n5"] * 30) == ""
    assert five.error(Op.WRITE, "x" * 3000, "") == ""


# ---- set and ask ----


def test_constructor_and_command_line() -> None:
    engine = Engine(Quotas(nodes=7, node_size=9))
    assert Talk(engine).ask(Op.GET_QUOTA, "nodes") == "7"
    assert Quotas({"node-size": 9}).as_dict()["node-size"] == 9
    assert Quotas.parse(["nodes=10", "path-max=5"]).nodes == 10
    for words in (["nodes"], ["nodes="], ["nodes=-1"], ["nodes=x"], ["what=5"], ["nodes=99999999999"]):
        with pytest.raises(UsageError):
            Quotas.parse(words)


def test_get_and_set_quota(engine: Engine, dom0: Talk, five: Talk) -> None:
    names = dom0.ask(Op.GET_QUOTA).split()
    assert names == list(QUOTAS)
    assert {"nodes", "watches", "transactions", "node-size", "node-permissions"} <= set(names)
    assert dom0.payload(Op.GET_QUOTA, b"").split() == names
    dom0.ask(Op.SET_QUOTA, "nodes", 3, 5)
    assert dom0.ask(Op.GET_QUOTA, "nodes", 5) == "3"
    assert dom0.ask(Op.GET_QUOTA, "nodes") == "1000"
    assert five.error(Op.WRITE, "a/b/c/d", "") == "ENOSPC"
    dom0.ask(Op.SET_QUOTA, "nodes", 2)
    assert dom0.ask(Op.GET_QUOTA, "nodes", 5) == "3", "those that are there keep theirs"
    guest(engine, dom0, 6)
    assert dom0.ask(Op.GET_QUOTA, "nodes", 6) == "2"


@pytest.mark.parametrize(
    ("op", "payload", "error"),
    [
        (Op.GET_QUOTA, b"what\0", "EINVAL"),
        (Op.GET_QUOTA, b"77\0nodes\0", "ENOENT"),
        (Op.GET_QUOTA, b"x\0nodes\0", "EINVAL"),
        (Op.GET_QUOTA, b"1\x002\0nodes\0", "EINVAL"),
        (Op.SET_QUOTA, b"nodes\0", "EINVAL"),
        (Op.SET_QUOTA, b"what\x001\0", "EINVAL"),
        (Op.SET_QUOTA, b"nodes\0x\0", "EINVAL"),
        (Op.SET_QUOTA, b"nodes\x004294967295\0", "EINVAL"),
        (Op.SET_QUOTA, b"77\0nodes\x001\0", "ENOENT"),
    ],
)
def test_malformed_quota_requests(dom0: Talk, op: Op, payload: bytes, error: str) -> None:
    assert dom0.raw_error(op, payload) == error
