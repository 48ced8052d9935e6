"""Every operation with every wrong argument, from domain 0 and from a guest, in and out of transactions.

The table says what an operation takes; the wrong payloads are made from it. An operation that is not in it
fails a test. What is refused changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.support.engine_talk import Talk, guest

from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import Message, Op, parse_error

LONG = b"/" + b"x" * 2049

# What is wrong for a word of each kind, whoever sends it.
PATHS = [
    b"",
    b"//",
    b"/a//b",
    b"/a/",
    b"a/",
    b"/a b",
    b"/\xff",
    b"/..",
    b"../6",
    b"/a/./b",
    b"@",
    b"@x/",
    b"/a\n",
]
NUMBERS = [b"", b"-1", b"65536", b"4294967296", b"9" * 30, b"9" * 3900, b"5x", b"x", "٥".encode(), b"5\xb2"]
WRONG: dict[str, list[bytes]] = {
    "path": [*PATHS, b"@releaseDomain"],
    "special": PATHS,
    "value": [],
    "token": [],
    "name": [b"", b"Nodes", b"no-such-quota", b"\xff"],
    "domid": NUMBERS,
    "port": [b"0", *NUMBERS[1:2], *NUMBERS[3:]],
    "gfn": [b"", b"x", b"--1", b"1x"],
    "number": [b"", b"x", b"-1", b"4294967296", b"9" * 30],
    "offset": [b"", b"x", b"-1", "٥".encode()],
    "perm": [b"", b"x5", b"5", b"n", b"n-1", b"n65536", b"rw5", b"N5", b"n" + b"9" * 3000, "n٥".encode()],
    "answer": [b"", b"t", b"TF", b"1", b"\xff"],
    "command": [b"", b"no-such-command", b"\xff", b"CHECK"],
}


@dataclass(frozen=True)
class Takes:
    """words: (kind, a right value) each. more: further words are let pass. terminated: the last NUL is
    needed. fewer: counts of words that are right, too. names: what else than EINVAL a wrong one may bring."""

    words: tuple[tuple[str, bytes], ...] = ()
    more: bool = False
    terminated: bool = True
    fewer: tuple[int, ...] = ()
    privileged: bool = False
    names: frozenset[str] = frozenset()


A = ("path", b"data/a")
NO_DOMAIN = frozenset({"ENOENT"})
TABLE: dict[Op, Takes] = {
    Op.CONTROL: Takes((("command", b"check"),), privileged=True),
    Op.DIRECTORY: Takes((A,)),
    Op.READ: Takes((A,)),
    Op.GET_PERMS: Takes((("special", b"data/a"),)),
    Op.WATCH: Takes((("special", b"data/a"), ("token", b"new"))),
    # Whatever cannot be a watch is a watch that is not there.
    Op.UNWATCH: Takes((("special", b"data/a"), ("token", b"old")), names=frozenset({"ENOENT"})),
    Op.TRANSACTION_START: Takes(),
    Op.TRANSACTION_END: Takes((("answer", b"F"),)),
    Op.INTRODUCE: Takes((("domid", b"7"), ("gfn", b"1"), ("port", b"1")), more=True, privileged=True),
    Op.RELEASE: Takes((("domid", b"6"),), privileged=True),
    Op.GET_DOMAIN_PATH: Takes((("domid", b"6"),)),
    Op.WRITE: Takes((A, ("value", b"1")), more=True, terminated=False, fewer=(1,)),
    Op.MKDIR: Takes((("path", b"data/new"),)),
    Op.RM: Takes((A,)),
    Op.SET_PERMS: Takes((("special", b"data/a"), ("perm", b"n5"))),
    Op.IS_DOMAIN_INTRODUCED: Takes((("domid", b"6"),), privileged=True),
    Op.RESUME: Takes((("domid", b"6"),), privileged=True),
    Op.SET_TARGET: Takes((("domid", b"6"), ("domid", b"5")), more=True, privileged=True, names=NO_DOMAIN),
    Op.RESET_WATCHES: Takes(),
    # The node is looked for before the offset, which is read as atoi does: no word is wrong.
    Op.DIRECTORY_PART: Takes((A, ("offset", b"0")), names=frozenset({""})),
    Op.GET_FEATURE: Takes(),
    Op.SET_FEATURE: Takes((("domid", b"7"), ("number", b"2")), privileged=True, names=NO_DOMAIN),
    Op.GET_QUOTA: Takes((("domid", b"6"), ("name", b"nodes")), privileged=True, fewer=(0,), names=NO_DOMAIN),
    Op.SET_QUOTA: Takes(
        (("domid", b"6"), ("name", b"nodes"), ("number", b"9")), privileged=True, names=NO_DOMAIN
    ),
}  # fmt: skip
NOT_FOR_CLIENTS = (Op.WATCH_EVENT, Op.ERROR, Op.RESTRICT)
NO_TRANSACTION = (Op.WATCH, Op.UNWATCH)


class Scene:
    """Domain 0, guests 5 and 6; 7 is known but not introduced. The sender has a transaction of its own."""

    def __init__(self, sender: int) -> None:
        self.engine = Engine()
        self.dom0 = Talk(self.engine)
        self.six = guest(self.engine, self.dom0, 6)
        five = guest(self.engine, self.dom0, 5)
        self.engine.domain(7)
        self.talk = five if sender else Talk(self.engine)
        for domid in (0, 5, 6):
            self.dom0.write(f"/local/domain/{domid}/data/a/child", "1")
        self.talk.watch("data/a", "old")
        self.six.watch("data", "six")
        self.foreign = [self.six.start() for _ in range(3)][-1]
        self.live = self.talk.start()

    def state(self) -> object:
        """All that a request can change, save what a transaction remembers of what it looked at."""
        engine, domains = self.engine, self.engine.domains.values()
        watches = [watch for bucket in engine.watches.by_path.values() for watch in bucket]
        tx = self.talk.conn.transactions.get(self.live)
        return (
            {path: (node.value, node.perms) for path, node in engine.nodes.items()},
            sorted((watch.path, watch.token, watch.conn.domid) for watch in watches),
            sorted((one.domid, sorted(conn.transactions)) for one in domains for conn in one.connections),
            [(one.domid, one.introduced, one.target, one.features) for one in domains],
            [one.as_dict() for one in (engine.quotas, *(one.quotas for one in domains))],
            [] if tx is None else [path for path, entry in tx.accessed.items() if entry.modified],
        )

    def answer(self, op: int, payload: bytes, tx: int) -> str:
        """The error's name, "" if it was done."""
        message = Message(op, 77, tx, payload)
        self.engine.handle(self.talk.conn, message)
        replies = [one for one in self.talk.take() if one.op != Op.WATCH_EVENT]
        assert [(one.req_id, one.tx_id) for one in replies] == [(77, tx)]
        assert replies[0].op in (op, Op.ERROR)
        return parse_error(replies[0].payload) if replies[0].op == Op.ERROR else ""


def joined(words: list[bytes]) -> bytes:
    return b"".join(word + b"\0" for word in words)


def right(op: Op) -> bytes:
    takes = TABLE[op]
    data = joined([value for _, value in takes.words]) or b"\0"
    return data if takes.terminated else data[:-1]


def wrong(op: Op, sender: int) -> Iterator[tuple[str, bytes]]:
    """What is wrong (a kind of word, or "words": their number), and a payload that must be refused for it."""
    takes = TABLE[op]
    words = [value for _, value in takes.words]
    if not words:
        return
    if 0 not in takes.fewer:
        yield "words", b"\xff" * 4096
    for count in range(len(words)):
        if count not in takes.fewer:
            yield "words", joined(words[:count])
    if not takes.more:
        yield "words", joined([*words, b"", b"1"])
    if takes.terminated:
        yield "words", joined(words)[:-1]
    for at, (kind, _) in enumerate(takes.words):
        bad = list(WRONG[kind])
        if kind in ("path", "special"):
            bad += [LONG, b"x" * 2049]
        for value in bad:
            data = joined([*words[:at], value, *words[at + 1 :]])
            if len(data) <= 4096:
                yield kind, data


def test_no_operation_is_forgotten() -> None:
    assert set(TABLE) | set(NOT_FOR_CLIENTS) == set(Op)
    assert {kind for takes in TABLE.values() for kind, _ in takes.words} <= set(WRONG)


@pytest.mark.parametrize("sender", [0, 5])
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_the_right_arguments_are_taken(op: Op, sender: int) -> None:
    """Otherwise the rest of this table would prove nothing."""
    takes, scene = TABLE[op], Scene(sender)
    tx = scene.live if op == Op.TRANSACTION_END else 0
    if takes.privileged and sender:
        before = scene.state()
        assert scene.answer(op, right(op), tx) == "EACCES"
        assert scene.state() == before
    else:
        assert scene.answer(op, right(op), tx) == ""
    assert scene.engine.check() == []


@pytest.mark.parametrize("sender", [0, 5])
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_wrong_arguments_are_refused_by_name_and_change_nothing(op: Op, sender: int) -> None:
    takes, scene = TABLE[op], Scene(sender)
    allowed = {"EACCES"} if takes.privileged and sender else {"EINVAL"} | takes.names
    before = scene.state()
    for _, payload in wrong(op, sender):
        tx = scene.live if op == Op.TRANSACTION_END else 0
        assert scene.answer(op, payload, tx) in allowed, payload
        assert scene.state() == before, payload
    assert scene.engine.check() == []


@pytest.mark.parametrize("sender", [0, 5])
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_a_transaction_that_is_not_ones_own(op: Op, sender: int) -> None:
    """Unknown numbers, and the number of another client's transaction, which is not reached by it."""
    takes, scene = TABLE[op], Scene(sender)
    before = scene.state()
    for tx in (scene.foreign, 99, 2**31, 2**32 - 1):
        for payload in (right(op), *(payload for _, payload in wrong(op, sender))):
            if op in NO_TRANSACTION:
                continue
            expected = "EACCES" if takes.privileged and sender else "ENOENT"
            assert scene.answer(op, payload, tx) == expected, (tx, payload)
            assert scene.state() == before, (tx, payload)
    assert scene.engine.check() == []


@pytest.mark.parametrize("sender", [0, 5])
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_wrong_arguments_in_a_transaction(op: Op, sender: int) -> None:
    takes, scene = TABLE[op], Scene(sender)
    allowed = {"EACCES"} if takes.privileged and sender else {"EINVAL"} | takes.names
    before = scene.state()
    for _, payload in wrong(op, sender):
        assert scene.answer(op, payload, scene.live) in allowed, payload
        assert scene.state() == before, payload
    assert scene.answer(Op.TRANSACTION_START, b"\0", scene.live) == "EBUSY"
    assert scene.answer(Op.TRANSACTION_END, b"T\0", scene.live) == "", "it can still be committed"
    assert scene.engine.check() == []


@pytest.mark.parametrize("sender", [0, 5])
def test_what_is_no_request(sender: int) -> None:
    scene = Scene(sender)
    before = scene.state()
    for op in (*NOT_FOR_CLIENTS, *range(max(Op) + 1, 64), 255, 65535, 2**31, 2**32 - 1):
        for payload in (b"", b"\0", b"data/a\0", joined([b"5", b"1", b"1"])):
            for tx in (0, scene.live, scene.foreign):
                assert scene.answer(op, payload, tx) == "ENOSYS"
    assert scene.state() == before
