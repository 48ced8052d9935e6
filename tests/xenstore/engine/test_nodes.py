"""Operations on nodes and permissions: what each answers, and each error."""

from __future__ import annotations

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import Engine, Quotas
from xenbus.xenstore.wire import PAYLOAD_MAX, Op


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def dom0(engine: Engine) -> Talk:
    return Talk(engine)


def test_a_new_store_is_as_xenstored_leaves_it(dom0: Talk) -> None:
    assert dom0.ls("/") == ["tool"]
    assert dom0.ls("/tool") == ["xenstored"]
    for path in ("/", "/tool", "@introduceDomain", "@releaseDomain"):
        assert dom0.perms(path) == "n0"


def test_write_makes_parents_and_reads_back_any_bytes(dom0: Talk) -> None:
    value = bytes(range(256))
    dom0.write("/a/b/c", value)
    assert dom0.read("/a/b/c") == value
    assert dom0.read("/a") == dom0.read("/a/b") == b""
    assert dom0.ls("/a") == ["b"]
    dom0.write("/a/b/c", b"")
    assert dom0.read("/a/b/c") == b""


def test_mkdir_keeps_what_is_there(dom0: Talk) -> None:
    dom0.write("/a/b", "value")
    dom0.watch("/a")
    dom0.ask(Op.MKDIR, "/a/b")
    assert dom0.read("/a/b") == b"value"
    assert dom0.seen() == []
    dom0.ask(Op.MKDIR, "/a/c/d")
    assert dom0.ls("/a") == ["b", "c"]
    assert dom0.seen() == ["/a/c/d"]


def test_rm_takes_the_subtree(dom0: Talk) -> None:
    dom0.write("/a/b/c")
    dom0.write("/a/x")
    dom0.ask(Op.RM, "/a/b")
    assert dom0.ls("/a") == ["x"]
    assert dom0.error(Op.READ, "/a/b/c") == "ENOENT"


def test_rm_of_what_is_not_there(dom0: Talk) -> None:
    dom0.write("/a")
    assert dom0.error(Op.RM, "/a/b") == ""
    assert dom0.error(Op.RM, "/a/b/c") == "ENOENT"
    assert dom0.error(Op.RM, "/") == "EINVAL"


def test_relative_paths_begin_at_home(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    five.write("data/x", "1")
    assert dom0.read("/local/domain/5/data/x") == b"1"
    dom0.write("me", "0")
    assert dom0.read("/local/domain/0/me") == b"0"


@pytest.mark.parametrize("op", [Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM])
@pytest.mark.parametrize(
    "payload",
    [b"", b"\0", b"/a", b"/a\0b\0", b"/a//b\0", b"/a/\0", b"//\0", b"/a b\0", b"/a.b\0", b"/\xff\0", b"@\0"],
)
def test_malformed_paths_are_einval(dom0: Talk, op: Op, payload: bytes) -> None:
    dom0.write("/a")
    assert dom0.raw_error(op, payload) == "EINVAL"


@pytest.mark.parametrize("op", [Op.READ, Op.DIRECTORY, Op.MKDIR, Op.RM, Op.WRITE])
def test_special_paths_are_no_nodes(dom0: Talk, op: Op) -> None:
    assert dom0.raw_error(op, b"@releaseDomain\0") == "EINVAL"


@pytest.mark.parametrize("payload", [b"", b"/a", b"\0value", b"/a//\0value", b"/a\x01\0"])
def test_malformed_writes(dom0: Talk, payload: bytes) -> None:
    assert dom0.raw_error(Op.WRITE, payload) == "EINVAL"


@pytest.mark.parametrize("op", [Op.RESTRICT, Op.WATCH_EVENT, Op.ERROR, 27, 0xFFFF, 0xFFFFFFFF])
def test_operations_that_are_none(dom0: Talk, op: int) -> None:
    assert dom0.raw_error(op, b"/\0") == "ENOSYS"


def test_missing_nodes(dom0: Talk) -> None:
    for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS):
        assert dom0.error(op, "/none/of/that") == "ENOENT"
    assert dom0.error(Op.SET_PERMS, "/none", ["n0"]) == "ENOENT"
    assert dom0.error(Op.GET_PERMS, "@none") == "ENOENT"


# ---- directories ----


def test_a_directory_that_does_not_fit_is_e2big_and_comes_in_parts(dom0: Talk) -> None:
    names = [f"child-{number:05d}" for number in range(1000)]
    for name in names:
        dom0.write(f"/big/{name}")
    assert dom0.error(Op.DIRECTORY, "/big") == "E2BIG"
    got, generations, parts = b"", set(), 0
    while not got.endswith(b"\0\0"):
        generation, chunk = dom0.ask(Op.DIRECTORY_PART, "/big", len(got))
        assert 0 < len(chunk) + len(generation) + 1 <= PAYLOAD_MAX
        got += chunk
        generations.add(generation)
        parts += 1
    assert got[:-2].decode().split("\0") == names
    assert len(generations) == 1
    assert parts == 3
    dom0.write("/big/more")
    assert dom0.ask(Op.DIRECTORY_PART, "/big", 0)[0] not in generations


def test_a_directory_of_just_the_payload_fits(dom0: Talk) -> None:
    for number in range(64):
        dom0.write(f"/full/{number:063d}")
    assert len(dom0.ls("/full")) == 64
    dom0.write("/full/x")
    assert dom0.error(Op.DIRECTORY, "/full") == "E2BIG"


def test_directory_part_at_its_edges(dom0: Talk) -> None:
    dom0.write("/a/b")
    assert dom0.ask(Op.DIRECTORY_PART, "/a", 0)[1] == b"b\0\0"
    assert dom0.ask(Op.DIRECTORY_PART, "/a", 2)[1] == b"\0"
    assert dom0.ask(Op.DIRECTORY_PART, "/a/b", 0)[1] == b"\0"
    assert dom0.ask(Op.DIRECTORY_PART, "/a", "x")[1] == b"b\0\0", "read as atoi does"
    assert dom0.ask(Op.DIRECTORY_PART, "/a", "-1")[1] == b"\0"
    for payload in (b"/a\0", b"/a\x000\x000\0"):
        assert dom0.raw_error(Op.DIRECTORY_PART, payload) == "EINVAL"


# ---- permissions ----


def test_what_dom0_makes_under_a_guest_is_the_guests(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    before = engine.domain(5).nodes
    dom0.write("/local/domain/5/device/vbd")
    assert dom0.perms("/local/domain/5/device/vbd") == "n5"
    assert engine.domain(5).nodes == before + 2
    five.write("device/vbd", "mine")


def test_a_guest_owns_what_it_makes_and_keeps_the_other_entries(engine: Engine, dom0: Talk) -> None:
    guest(engine, dom0, 6)
    five = guest(engine, dom0, 5)
    dom0.write("/shared")
    dom0.chmod("/shared", "n0 b5 r6")
    five.write("/shared/mine")
    assert dom0.perms("/shared/mine") == "n5 b5 r6"


@pytest.mark.parametrize(
    ("perms", "may_read", "may_write"),
    [
        ("n0", False, False),
        ("n0 r5", True, False),
        ("n0 w5", False, True),
        ("n0 b5", True, True),
        ("r0", True, False),
        ("w0", False, True),
        ("b0", True, True),
        ("b0 n5", False, False),
        ("r0 w5", False, True),
        ("n0 n5 b5", False, False),
        ("n5", True, True),
        ("n0 b32757", True, True),
        ("n32757", True, True),
    ],
)
def test_entries(engine: Engine, dom0: Talk, perms: str, may_read: bool, may_write: bool) -> None:
    five = guest(engine, dom0, 5)
    dom0.write("/node", "value")
    dom0.chmod("/node", perms)
    assert five.error(Op.READ, "/node") == ("" if may_read else "EACCES")
    assert five.error(Op.DIRECTORY, "/node") == ("" if may_read else "EACCES")
    assert five.error(Op.GET_PERMS, "/node") == ("" if may_read else "EACCES")
    assert five.error(Op.WRITE, "/node", "x") == ("" if may_write else "EACCES")
    assert five.error(Op.MKDIR, "/node/child") == ("" if may_write else "EACCES")
    assert dom0.read("/node") == (b"x" if may_write else b"value")


def test_a_missing_node_is_eacces_under_an_unreadable_parent(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.write("/open")
    dom0.chmod("/open", "r0")
    assert five.error(Op.READ, "/open/none") == "ENOENT"
    assert five.error(Op.READ, "/none") == "EACCES"
    assert five.error(Op.RM, "/open/none") == "EACCES"
    assert five.error(Op.WRITE, "/open/none", "") == "EACCES"


def test_rm_of_ones_own_node_under_a_parent_one_cannot_write(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    dom0.write("/dir/mine/child")
    dom0.chmod("/dir/mine", "n5")
    assert five.error(Op.WRITE, "/dir/other", "") == "EACCES"
    assert five.error(Op.RM, "/dir/mine") == ""
    assert dom0.ls("/dir") == []


def test_only_the_owner_sets_permissions(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    guest(engine, dom0, 6)
    dom0.write("/node")
    dom0.chmod("/node", "n0 b5")
    assert five.error(Op.SET_PERMS, "/node", ["n0", "b5", "b6"]) == "EACCES"
    five.write("mine")
    assert five.error(Op.SET_PERMS, "mine", ["n5", "r6"]) == ""
    assert five.error(Op.SET_PERMS, "mine", ["n6"]) == "EPERM"
    assert five.error(Op.SET_PERMS, "mine", ["n7"]) == "ENOENT"
    assert dom0.error(Op.SET_PERMS, "/node", ["n7"]) == "ENOENT"


@pytest.mark.parametrize(
    "payload", [b"", b"/a\0", b"/a\0n0", b"/a\0q0\0", b"/a\0n\0", b"/a\0n-1\0", b"/a\0n65536\0"]
)
def test_malformed_set_perms(dom0: Talk, payload: bytes) -> None:
    dom0.write("/a")
    assert dom0.raw_error(Op.SET_PERMS, payload) == "EINVAL"


def test_an_entry_for_a_domain_that_is_not_there_is_shown_but_never_used(engine: Engine, dom0: Talk) -> None:
    dom0.write("/node")
    dom0.chmod("/node", "n0 r5")
    five = guest(engine, dom0, 5)
    assert dom0.perms("/node") == "n0 r5"
    assert five.error(Op.READ, "/node") == "EACCES"
    dom0.chmod("/node", "n0 r5")
    assert five.error(Op.READ, "/node") == ""


def test_set_target_lends_the_targets_rights(engine: Engine, dom0: Talk) -> None:
    stub, hvm = guest(engine, dom0, 9), guest(engine, dom0, 5)
    hvm.write("secret", "1")
    dom0.write("/node")
    dom0.chmod("/node", "n0 r5")
    assert stub.error(Op.READ, "/local/domain/5/secret") == "EACCES"
    dom0.ask(Op.SET_TARGET, 9, 5)
    assert stub.read("/local/domain/5/secret") == b"1"
    stub.write("/local/domain/5/secret", "2")
    assert stub.error(Op.READ, "/node") == ""
    assert hvm.error(Op.READ, "/local/domain/9") == "EACCES"
    engine.domain_died(5)
    assert stub.error(Op.READ, "/node") == "EACCES"


def test_permissions_of_special_paths(engine: Engine, dom0: Talk) -> None:
    five = guest(engine, dom0, 5)
    assert five.error(Op.GET_PERMS, "@releaseDomain") == "EACCES"
    dom0.chmod("@releaseDomain", "n0 r5")
    assert five.perms("@releaseDomain") == "n0 r5"
    assert five.error(Op.SET_PERMS, "@releaseDomain", ["n0", "b5"]) == "EACCES"


def test_a_guest_cannot_see_another(engine: Engine, dom0: Talk) -> None:
    five, six = guest(engine, dom0, 5), guest(engine, dom0, 6)
    five.write("data", "1")
    for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM):
        assert six.error(op, "/local/domain/5/data") == "EACCES"
        assert six.error(op, "/local/domain/5") == "EACCES"
    assert six.error(Op.WRITE, "/local/domain/5/data", "2") == "EACCES"
    assert six.error(Op.SET_PERMS, "/local/domain/5/data", ["n6"]) == "EACCES"
    assert five.read("data") == b"1"


# ---- paths of a guest ----


def test_length_of_a_path(engine: Engine, dom0: Talk) -> None:
    quotas = Quotas(memory=0, node_size=0)
    engine.domain(5).quotas = quotas
    five = guest(engine, dom0, 5)
    name = "x" * 2048
    assert five.error(Op.WRITE, name, "") == ""
    assert five.error(Op.WRITE, "/local/domain/5/" + name, "") == ""
    assert five.error(Op.WRITE, name + "x", "") == "EINVAL"
    # The one limit that domain 0 has, too.
    assert dom0.error(Op.WRITE, "/" + "y" * 2047, "") == ""
    assert dom0.error(Op.WRITE, "/local/domain/77/" + "y" * 2048, "") == ""
    for op in (Op.WRITE, Op.READ, Op.MKDIR, Op.RM, Op.DIRECTORY):
        assert dom0.error(op, "/" + "y" * 2048, *[""] * (op == Op.WRITE)) == "EINVAL"
    quotas.set("path-max", 10)
    assert five.error(Op.READ, "x" * 11) == "EINVAL"
