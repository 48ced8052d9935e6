"""A guest's side of too much: watches, transactions, nodes, events that it does not take.

Its quotas bound what is counted for it, and that bounds the memory that there really is (tracemalloc); others
are served meanwhile, and when it dies all of it comes back.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import OXENSTORED, PROFILES, XENSTORED, Engine, Profile
from xenbus.xenstore.wire import CODECS, Message, Op, parse_error

KIB, MIB = 1024, 1024 * 1024
HOME = "/local/domain/5"


class Flood:
    """An engine with domain 0, guest 5 that floods and guest 6 that works. `real()`: the memory of it all."""

    def __init__(self, profile: Profile) -> None:
        self.engine = Engine(profile=profile)
        self.dom0 = Talk(self.engine)
        self.five = guest(self.engine, self.dom0, 5)
        self.six = guest(self.engine, self.dom0, 6)
        self.quotas = self.engine.domain(5).quotas
        self.six.write("n", "0")
        self.six.watch("n")
        self.rounds = 0
        gc.collect()
        self.began = tracemalloc.get_traced_memory()[0]
        self.counts = self.count()

    def real(self) -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self.began

    def count(self) -> dict[str, int]:
        domain = self.engine.domain(5)
        known = "nodes watches transactions memory".split()
        return {name: getattr(domain, name) for name in known}

    def ask(self, op: Op, *arguments: object, tx: int = 0) -> str:
        """The error's name, "" if there is none."""
        self.engine.handle(self.five.conn, Message(op, 1, tx, CODECS[op].request(*arguments)))
        (reply,) = [one for one in self.five.take() if one.op != Op.WATCH_EVENT]
        self.five.events.clear()
        return parse_error(reply.payload) if reply.op == Op.ERROR else ""

    def others(self) -> None:
        self.rounds += 1
        value = b"%d" % self.rounds
        self.six.write("n", value)
        assert self.six.seen() == ["n"]
        assert self.six.read("n") == value

    def over(self) -> None:
        """The guest goes, and all that it had."""
        assert self.count()["memory"] <= self.quotas.memory
        assert self.engine.check() == []
        self.others()
        self.engine.domain_died(5)
        self.five.events.clear()
        assert self.engine.check() == []
        assert self.real() < 256 * KIB, "nothing of it is left"


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start(1)
    yield
    tracemalloc.stop()


pytestmark = [
    pytest.mark.usefixtures("traced"),
    pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES),
]


def test_watches(profile: Profile) -> None:
    flood = Flood(profile)
    said = [flood.ask(Op.WATCH, f"{n}/" + "w" * 900, "t" * 2000) for n in range(1000)]
    assert set(said[200:]) <= {"E2BIG", "ENOMEM", "EQUOTA"}, "it ends by name"
    assert flood.count()["watches"] <= flood.quotas.watches + 1
    # 129 watches of 3 KiB at most.
    assert flood.real() < MIB
    assert {flood.ask(Op.UNWATCH, f"{n}/" + "w" * 900, "t" * 2000) for n in range(1000)} == {"", "ENOENT"}
    assert flood.count() == flood.counts
    flood.over()


def test_nodes(profile: Profile) -> None:
    """As many and as large as they may be, below each other as well."""
    flood = Flood(profile)
    said = {flood.ask(Op.WRITE, f"n{n}", b"v" * 1900) for n in range(1500)}
    said |= {flood.ask(Op.WRITE, f"s{n}", b"") for n in range(1500)}
    said |= {flood.ask(Op.MKDIR, "/".join(["d"] * n)) for n in range(1, 500)}
    assert said - {""} <= {"ENOMEM", "ENOSPC", "EQUOTA"} and "" in said
    assert flood.count()["nodes"] <= flood.quotas.nodes
    assert flood.count()["memory"] <= flood.quotas.memory
    # What is counted, and an object with its tables for each of a thousand nodes.
    assert flood.real() < flood.quotas.memory + 1000 * KIB
    flood.others()
    flood.over()


def test_nodes_too_large_for_all_of_them(profile: Profile) -> None:
    """Memory is what ends it, long before the number of nodes does; oxenstored counts nodes alone."""
    flood = Flood(profile)
    flood.quotas.set("memory", 600_000)
    said = [flood.ask(Op.WRITE, f"n{n}", b"v" * 1900) for n in range(900)]
    assert said[0] == "" and set(said[400:]) == ({"ENOMEM"} if profile is XENSTORED else {""})
    if profile is XENSTORED:
        assert flood.real() < flood.quotas.memory + 400 * KIB
    flood.others()
    flood.over()


def test_transactions_that_read_and_write_all_they_can(profile: Profile) -> None:
    """Nodes that are not there cost as well: a transaction remembers their names."""
    flood, opened, nodes = Flood(profile), 0, 200
    flood.quotas.set("transaction-nodes", nodes)
    flood.quotas.set("memory", 600_000)
    while flood.ask(Op.TRANSACTION_START) == "":
        opened += 1
        assert opened < 30
    for tx in range(1, opened + 1):
        for n in range(nodes + 20):
            flood.ask(Op.READ, f"{n}-{tx}/" + "x" * 900, tx=tx)
            flood.ask(Op.WRITE, f"w{n}", b"v" * 1900, tx=tx)
        flood.others()
    assert flood.count()["transactions"] <= flood.quotas.transactions + 1
    # What is counted, and for each node of each transaction an entry; the other one keeps requests instead,
    # and counts them alone.
    each = 400 if profile is XENSTORED else 3 * KIB
    assert flood.count()["memory"] <= flood.quotas.memory
    assert flood.real() < flood.quotas.memory + opened * nodes * each
    for tx in range(1, opened + 1):
        flood.ask(Op.TRANSACTION_END, False, tx=tx)
    if profile is OXENSTORED:
        # There a full transaction can't even be ended.
        flood.ask(Op.RESET_WATCHES)
    assert flood.count() == flood.counts
    flood.over()


def test_events_that_it_does_not_take(profile: Profile) -> None:
    flood = Flood(profile)
    flood.dom0.write("/open", "")
    flood.dom0.chmod("/open", "r0")
    flood.five.ask(Op.WATCH, "/open", "t" * 2000)
    writers = [flood.dom0, flood.six]
    flood.dom0.write("/open/six", "")
    flood.dom0.chmod("/open/six", "r6")
    for n in range(3000):
        writers[n % 2].write(f"/open/six/{n % 300}", str(n))
        if n % 100 == 0:
            flood.others()
    assert flood.count()["memory"] <= flood.quotas.memory
    assert flood.real() < 2 * flood.quotas.memory + MIB
    assert flood.engine.check() == []
    flood.five.take()
    assert flood.five.conn.queued == 0
    flood.dom0.ask(Op.RM, "/open")
    flood.over()
