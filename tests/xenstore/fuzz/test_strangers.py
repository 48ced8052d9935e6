"""A guest that tries every path of another's, in every spelling and by every operation: nothing is seen and
nothing changed. Their numbers are prefixes of each other (1, 10), as their homes are then."""

from __future__ import annotations

from itertools import product

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import PROFILES, XENSTORED, Engine, Profile
from xenbus.xenstore.wire import CODECS, Message, Op, encode_event, parse_error

# In every name and every value that the intruder must not see.
SECRET = b"sEcrEt"
HOME = "/local/domain/10"
NAMES = ["", "/sEcrEt", "/sEcrEt/b", "/sEcrEt/sEcrEt-child", "/none", "/sEcrEt/none/below"]
TOPS = [
    "/",
    "/local",
    "/local/domain",
    "/tool",
    "/sEcrEt-top",
    "/vm",
    "/libxl/10",
    "@introduceDomain",
    "@releaseDomain",
]


def spellings(path: str) -> list[bytes]:
    """The path, and what a naive daemon might take for it."""
    tail = path.removeprefix("/local/domain/")
    plain = [path, path + "/", path + "//", "/" + path, path.replace("/", "//", 1), path + "/.", path + "/..",
             f"/local/domain/1/../{tail}", f"../{tail}", f"../../domain/{tail}", f"/local/domain/1{tail[1:]}",
             f"/local/domain/010{tail[2:]}", f"/local/domain/1/{tail}", tail, tail[1:], path.lstrip("/"),
             f"./{tail}", f"@{tail}", f"@releaseDomain/{tail}", path + " ", path + "\n", path + "%00",
             path.upper(), path + "/" + "x" * 2048, path + "/" + "x" * 3000]  # fmt: skip
    odd = [b"/local/domain/1\0" + path.encode(), path.encode() + b"\0\0", b"\0" + path.encode(),
           path.encode() + b"\xff", b"\xc0\xaf".join(path.encode().split(b"/"))]  # fmt: skip
    return [one.encode() for one in plain] + odd


PATHS = sorted({one for name in NAMES for one in spellings(HOME + name)} | {top.encode() for top in TOPS})
# What follows the path's NUL, by operation; all others take a domain's number or nothing.
PAYLOADS: dict[Op, list[bytes]] = {
    Op.READ: [b""],
    Op.DIRECTORY: [b""],
    Op.DIRECTORY_PART: [b"0\0", b"1\0"],
    Op.GET_PERMS: [b""],
    Op.WRITE: [b"mine", b""],
    Op.MKDIR: [b""],
    Op.RM: [b""],
    Op.SET_PERMS: [b"n1\0", b"b1\0", b"n10\0b1\0", b"n0\0r1\0", b"r32752\0"],
    Op.WATCH: [b"t\0", b"t2\0001\0", b"t3\x000\0"],
    Op.UNWATCH: [b"theirs\0"],
    Op.CONTROL: [b"", b"quota\0", b"check\0"],
}
NUMBERS: dict[Op, list[bytes]] = {
    Op.INTRODUCE: [b"10\x001\x001\0", b"1\x001\x001\0"],
    Op.RELEASE: [b"10\0", b"0\0"],
    Op.RESUME: [b"10\0"],
    Op.SET_TARGET: [b"1\x0010\0", b"10\x001\0", b"1\x000\0"],
    Op.IS_DOMAIN_INTRODUCED: [b"10\0"],
    Op.GET_FEATURE: [b"10\0", b"\0"],
    Op.SET_FEATURE: [b"10\x000\0"],
    Op.GET_QUOTA: [b"10\0nodes\0", b"nodes\0", b"\0"],
    Op.SET_QUOTA: [b"10\0nodes\x001\0", b"nodes\x001\0"],
    Op.GET_DOMAIN_PATH: [b"10\0"],
    Op.RESET_WATCHES: [b"\0"],
    Op.TRANSACTION_START: [b"\0"],
    Op.TRANSACTION_END: [b"T\0", b"F\0"],
}


class Scene:
    """Guest 10 with secrets, a watch and an open transaction; guest 1, who must hear nothing of it."""

    def __init__(self, profile: Profile = XENSTORED) -> None:
        self.engine = Engine(profile=profile)
        self.dom0 = Talk(self.engine)
        self.victim = guest(self.engine, self.dom0, 10)
        self.intruder = guest(self.engine, self.dom0, 1)
        secret = SECRET.decode()
        for path in (f"{secret}/{secret}-child", f"{secret}/b", "plain"):
            self.victim.write(path, SECRET)
        # For two others, whose numbers begin with the intruder's too.
        self.dom0.chmod(f"{HOME}/{secret}/b", "n10 r11 b100")
        for path in (f"/{secret}-top/{secret}", f"/vm/{secret}", f"/libxl/10/{secret}"):
            self.dom0.write(path, SECRET)
        self.victim.watch(secret, "theirs")
        self.tx = self.victim.start()
        self.victim.write("in-transaction", SECRET, self.tx)
        self.heard = bytearray()

    def dump(self) -> object:
        """All but the intruder's home."""
        engine = self.engine
        nodes = {
            path: (node.value, node.perms, list(node.children or ()))
            for path, node in engine.nodes.items()
            if path != b"/local/domain/1" and not path.startswith(b"/local/domain/1/")
        }
        known = "introduced shutdown target features nodes watches transactions memory".split()
        domains = [[getattr(engine.domain(domid), name) for name in known] for domid in (0, 10)]
        quotas = [engine.quotas.as_dict(), *(one.quotas.as_dict() for one in engine.domains.values())]
        return nodes, domains, quotas, sorted(engine.domains), engine.domain(1).target

    def attack(self, op: Op, payload: bytes, tx: int = 0) -> str:
        self.engine.handle(self.intruder.conn, Message(op, 1, tx, payload))
        messages = self.intruder.take()
        self.heard += b"".join(one.payload for one in messages if one.op != Op.WATCH_EVENT)
        (reply,) = [one for one in messages if one.op != Op.WATCH_EVENT]
        return parse_error(reply.payload) if reply.op == Op.ERROR else ""


def test_every_operation_is_tried() -> None:
    assert set(PAYLOADS) | set(NUMBERS) == set(CODECS)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a transaction"])
@pytest.mark.parametrize("op", PAYLOADS, ids=lambda op: op.name)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_nothing_of_anothers_is_seen_or_changed(profile: Profile, op: Op, inside: bool) -> None:
    scene = Scene(profile)
    scene.engine.domain(1).quotas.set("transaction-nodes", 0)  # or it would soon be all that is seen
    tx = scene.intruder.start() if inside else 0
    before = scene.dump()
    for path, rest in product(PATHS, PAYLOADS[op]):
        if len(path) + 1 + len(rest) <= 4096:
            scene.attack(op, path + b"\0" + rest, tx)
    if inside:
        assert scene.attack(Op.TRANSACTION_END, b"T\0", tx) in ("", "ENOSPC", "ENOMEM")
    assert SECRET not in scene.heard
    assert scene.dump() == before
    assert scene.engine.check() == []
    assert scene.victim.read("plain") == SECRET
    if profile is XENSTORED:  # the other one's conflicts are coarser
        assert scene.victim.end(scene.tx) == "", "nor does it stand in the way of others' transactions"


def test_domains_are_not_a_guests_to_change_or_ask_about() -> None:
    scene = Scene()
    before = scene.dump()
    own = {Op.GET_DOMAIN_PATH, Op.RESET_WATCHES, Op.TRANSACTION_START, Op.TRANSACTION_END}
    for op, payloads in NUMBERS.items():
        for payload in payloads:
            said = scene.attack(op, payload)
            if op not in own and not (op == Op.GET_FEATURE and payload == b"\0"):
                assert said == "EACCES", (op, payload)
    assert scene.dump() == before
    assert SECRET not in scene.heard


def test_the_transactions_of_others_by_their_numbers() -> None:
    scene = Scene()
    before = scene.dump()
    for tx in range(1, 20):
        for op in (Op.READ, Op.WRITE, Op.RM, Op.DIRECTORY, Op.SET_PERMS):
            payload = b"/local/domain/10/in-transaction\0" + PAYLOADS[op][0]
            assert scene.attack(op, payload, tx) in ("ENOENT", "EACCES")
        for answer in (b"T\0", b"F\0"):
            assert scene.attack(Op.TRANSACTION_END, answer, tx) == "ENOENT"
    assert scene.dump() == before
    assert scene.victim.end(scene.tx) == ""
    assert scene.victim.read("in-transaction") == SECRET


def test_watches_on_anothers_nodes_hear_only_that_they_were_set() -> None:
    scene = Scene()
    paths = [f"{HOME}{name}" for name in NAMES] + ["/", "/local", "/local/domain", "/sEcrEt-top", "/vm"]
    for number, path in enumerate(paths):
        assert scene.attack(Op.WATCH, CODECS[Op.WATCH].request(path, str(number))) == ""
    scene.intruder.seen()
    secret = SECRET.decode()
    scene.victim.write(f"{secret}/new", "1")
    scene.victim.write(f"{secret}/b", "2")
    scene.victim.chmod(f"{secret}/b", "n10")
    scene.victim.ask(Op.RM, secret)
    scene.dom0.write(f"/{secret}-top/x", "1")
    scene.dom0.ask(Op.RM, f"/{secret}-top")
    scene.dom0.ask(Op.RM, HOME)
    assert scene.intruder.seen() == []
    scene.dom0.write("/open", "")
    scene.dom0.chmod("/open", "n0 r1")
    assert scene.intruder.seen() == ["/open"], "they do hear of what they may read"


def test_the_right_to_write_is_neither_that_to_read_nor_that_to_give_away() -> None:
    scene = Scene()
    scene.dom0.write(f"{HOME}/drop", SECRET)
    for perms in ("n10 w1", "w10"):
        scene.dom0.chmod(f"{HOME}/drop", perms)
        for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS):
            assert scene.attack(op, f"{HOME}/drop\0".encode()) == "EACCES"
        for word in (b"b1\0", b"n10\0b1\0", b"b10\0"):
            assert scene.attack(Op.SET_PERMS, f"{HOME}/drop\0".encode() + word) == "EACCES"
        assert scene.attack(Op.WRITE, f"{HOME}/drop\0mine".encode()) == ""
        assert scene.victim.read("drop") == b"mine"
        scene.victim.write("drop", SECRET)
    assert SECRET not in scene.heard


def test_a_missing_node_and_a_hidden_one_are_the_same_to_a_stranger() -> None:
    scene = Scene()
    for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.RM, Op.MKDIR, Op.WRITE):
        rest = PAYLOADS[op][0]
        hidden = scene.attack(op, b"/local/domain/10/sEcrEt\0" + rest)
        missing = scene.attack(op, b"/local/domain/10/none\0" + rest)
        assert hidden == missing == "EACCES", op


def test_the_event_of_another_is_not_in_ones_own_queue() -> None:
    """Not even with the same token, path and a watch of one's own beside it."""
    scene = Scene()
    scene.intruder.watch("sEcrEt", "theirs")
    scene.victim.write("sEcrEt/b", "3")
    assert scene.victim.seen() == ["sEcrEt/b"]
    scene.intruder.take()
    assert scene.intruder.events == []
    scene.intruder.write("sEcrEt/b", "1")
    assert scene.intruder.seen() == ["sEcrEt/b"]
    assert scene.victim.seen() == []
    assert encode_event("sEcrEt/b", "theirs") not in bytes(scene.heard)


def test_the_target_of_a_guest_lends_its_rights_and_only_its() -> None:
    scene = Scene()
    third = guest(scene.engine, scene.dom0, 11)
    third.write("mine", SECRET)
    scene.dom0.ask(Op.SET_TARGET, 1, 10)
    assert scene.intruder.read(f"{HOME}/plain") == SECRET
    assert scene.attack(Op.READ, b"/local/domain/11/mine\0") == "EACCES"
    scene.dom0.ask(Op.RELEASE, 10)
    assert scene.attack(Op.READ, HOME.encode() + b"/plain\0") in ("EACCES", "ENOENT")
    again = guest(scene.engine, scene.dom0, 10)
    again.write("plain", SECRET)
    assert scene.attack(Op.READ, HOME.encode() + b"/plain\0") == "EACCES", (
        "a new domain of that number is nobody's"
    )
