"""What xenstored 4.17 does and nobody would guess. The oracle (`tests/xenstore/oracle`) compares with the
real one; here it is written down one by one, so that it holds where the real one is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import Op


class Toolstack:
    """Hooks of a machine where domain 7 is there without having been introduced."""

    def introduce(self, domid: int, gfn: int, port: int, done: Callable[[str | None], None]) -> None:
        done(None)

    def release(self, domid: int) -> None:
        pass

    def domain_exists(self, domid: int) -> bool:
        return domid == 7

    def log(self, text: str) -> None:
        pass

    def write_report(self, name: str, text: str) -> bool:
        return False


@pytest.fixture
def engine() -> Engine:
    return Engine(hooks=Toolstack())


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    return Talk(engine)


# ---- transactions ----


def test_rm_in_a_transaction_fires_parents_first_and_siblings_in_order(dom0: Talk) -> None:
    for name in ("a", "a/x", "b", "b/y"):
        dom0.write(f"/t/{name}")
    for name in ("/t", "/t/a", "/t/a/x", "/t/b", "/t/b/y"):
        dom0.watch(name)
    tx = dom0.start()
    dom0.ask(Op.RM, "/t", tx=tx)
    dom0.end(tx)
    assert dom0.seen() == ["/t", "/t/a", "/t/a/x", "/t/b", "/t/b/y"]
    for name in ("a", "a/x", "b", "b/y"):
        dom0.write(f"/t/{name}")
    dom0.seen()
    dom0.ask(Op.RM, "/t")
    assert dom0.seen() == ["/t/a/x", "/t/a", "/t/b/y", "/t/b", "/t"], "outside: children first"


def test_who_may_hear_is_judged_while_the_end_is_under_way(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.write("/x")
    five.watch("/x")
    tx = dom0.start()
    dom0.write("/x/p/q", "", tx)
    dom0.chmod("/x/p", "r0", tx)
    dom0.end(tx)
    # q came first, when its parent p, which is readable, was not there yet.
    assert five.seen() == ["/x/p"]


def test_a_node_too_large_spoils_its_transaction(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    tx = five.start()
    assert five.error(Op.WRITE, "a", "x" * 3000, tx=tx) == "ENOSPC"
    assert five.end(tx) == "ENOMEM"


def test_a_node_that_could_not_be_made_brings_the_quota_to_the_end(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    for name in "abc":
        five.write(name)
    engine.domain(5).quotas.set("nodes", 3)
    tx = five.start()
    five.ask(Op.RM, "a", tx=tx)
    assert five.end(tx) == "", "it makes none: no quota is looked at"
    tx = five.start()
    five.ask(Op.RM, "b", tx=tx)
    assert five.error(Op.MKDIR, "d", tx=tx) == "ENOSPC"
    engine.domain(5).quotas.set("nodes", 2)
    assert five.end(tx) == "ENOSPC", "two are left, and that is the limit already"


def test_rm_past_the_nodes_of_a_transaction_is_eio(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    for number in range(5):
        five.write(f"a/{number}")
    engine.domain(5).quotas.set("transaction-nodes", 4)
    tx = five.start()
    assert five.error(Op.RM, "a", tx=tx) == "EIO"
    assert five.end(tx) == "ENOMEM"


def test_nodes_for_a_domain_that_is_gone_are_enomem(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    tx = dom0.start()
    dom0.write("/local/domain/5/a", "", tx)
    engine.domain_died(5)
    dom0.write("/local/domain/5/b", "", tx)
    assert dom0.end(tx) == "ENOMEM", "and not the EAGAIN that comes after it"
    assert 5 not in engine.domains


# ---- the end of a domain ----


def test_its_nodes_go_in_the_order_of_the_tree(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    for path in ("/t/deep/er/five", "/t/a/five", "/t/five", "/t/deep/five"):
        dom0.write(path)
        dom0.chmod(path, "n5")
    dom0.watch("/t")
    engine.domain_died(5)
    assert dom0.seen() == ["/t/deep/er/five", "/t/deep/five", "/t/a/five", "/t/five"]
    assert engine.check() == []


def test_its_entries_stay_and_mean_nothing_and_change_no_node(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    dom0.write("/x")
    dom0.chmod("/x", "n0 b5")
    looked, wrote = dom0.start(), dom0.start()
    dom0.read("/x", looked)
    dom0.write("/x", "1", wrote)
    engine.domain_died(5)
    assert dom0.end(looked) == "", "its generation is the same"
    assert dom0.end(wrote) == ""
    assert dom0.perms("/x") == "n0 b5"
    again = guest(engine, dom0, 5)
    assert again.error(Op.READ, "/x") == "EACCES"
    dom0.chmod("/x", "n0 b5")
    assert again.error(Op.READ, "/x") == ""


def test_a_domain_that_was_never_introduced_is_known_once_it_is_named(engine: Engine, dom0: Talk) -> None:
    dom0.write("/x")
    dom0.chmod("/x", "n0 b7")
    assert 7 in engine.domains
    engine.domain_died(7)
    assert guest(engine, dom0, 7).error(Op.READ, "/x") == "EACCES"


def test_a_guest_names_one(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.write("a")
    five.chmod("a", "n5 b7")
    engine.domain_died(7)
    assert guest(engine, dom0, 7).error(Op.READ, "/local/domain/5/a") == "EACCES"


def test_an_entry_that_is_wrong_makes_nobody_known(engine: Engine, dom0: Talk) -> None:
    dom0.write("/x")
    assert dom0.raw_error(Op.SET_PERMS, b"/x\0n7\0r\0") == "EINVAL"
    assert 7 not in engine.domains


def test_introduced_again_it_is_still_shut_down(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 5)
    dom0.watch("@releaseDomain")
    engine.domain_shutdown(5)
    dom0.ask(Op.INTRODUCE, 5, 1, 1)
    engine.domain_shutdown(5)
    assert dom0.seen() == ["@releaseDomain"]
    dom0.ask(Op.RESUME, 5)
    engine.domain_shutdown(5)
    assert dom0.seen() == ["@releaseDomain"]


# ---- @introduceDomain, @releaseDomain ----


def test_entries_of_the_special_ones(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.watch("@introduceDomain")
    dom0.watch("@introduceDomain")
    tx = dom0.start()
    dom0.chmod("@introduceDomain", "n5", tx)
    dom0.end(tx, commit=False)
    assert dom0.seen() == [], "nobody is told"
    assert dom0.perms("@introduceDomain") == "n5", "at once, whatever becomes of the transaction"
    assert five.error(Op.SET_PERMS, "@introduceDomain", ["n0"]) == "", "the owner may give it away"
    assert five.error(Op.SET_PERMS, "@introduceDomain", ["n5"]) == "EACCES"
    assert dom0.error(Op.SET_PERMS, "@else", ["n0"]) == "EINVAL"


def test_the_roots_entries_do_not_open_the_special_ones(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.watch("@introduceDomain")
    dom0.chmod("/", "r0")
    guest(engine, dom0, 6)
    assert five.seen() == []
    dom0.chmod("@introduceDomain", "n0 r5")
    guest(engine, dom0, 8)
    assert five.seen() == ["@introduceDomain"]
