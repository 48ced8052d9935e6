"""Every operation with every wrong argument (the table of fuzz/test_arguments.py) beside the C daemon, from a
socket and from a guest's ring: the same error."""

from __future__ import annotations

import pytest
from tests.support.xenstored import DEADLINE, Xenstored
from tests.xenstore.fuzz.test_arguments import TABLE, wrong
from tests.xenstore.peers.conftest import Both

from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport import Pipe
from xenbus.xenstore.wire import CODECS, Message, Op, Parser, encode, parse_error

SENDERS = (0, 5)
# C reads a number as atoi does: "x" is 0, "5x" is 5, -1 is the highest. Here a number is a number.
LAX = {"domid", "port", "gfn", "number", "offset", "perm"}
# Known to 4.17.
OLD = [op for op in TABLE if op <= Op.DIRECTORY_PART]


class Asker:
    """A client that sends what it likes. Events are skipped."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe, self.parser = pipe, Parser()
        self.waiting: list[Message] = []

    def ask(self, op: int, payload: bytes, tx: int = 0) -> str:
        """The error, or OK and what there is of a reply."""
        self.pipe.send([encode(op, 77, tx, payload)], DEADLINE)
        while True:
            for message in self.parser.feed(self.pipe.receive(DEADLINE)):
                if message.op != Op.WATCH_EVENT:
                    assert (message.req_id, message.tx_id) == (77, tx)
                    return parse_error(message.payload) if message.op == Op.ERROR else "OK"


def answers(daemon: Xenstored) -> dict[tuple[int, str, str, bytes], str]:
    """(who, operation, what is wrong, payload) -> the answer."""
    toolstack: SyncClient = daemon.toolstack
    ends = {0: daemon.connect(), 5: daemon.introduce(5)}
    daemon.introduce(6)
    for domid in (0, 5, 6):
        toolstack.write(f"/local/domain/{domid}/data/a/child", "1")
    toolstack.set_perms("/local/domain/5/data/a", ["n5"])
    found = {}
    for sender in SENDERS:
        asker = Asker(ends[sender])
        for op in OLD:
            for kind, payload in wrong(op, sender):
                if op in (Op.INTRODUCE, Op.RELEASE, Op.SET_TARGET) and payload.startswith(b"5"):
                    continue  # what C takes for domain 5, whom we still need
                tx = 0
                if op == Op.TRANSACTION_END:
                    tx = toolstack_tx(asker)
                found[sender, op.name, kind, payload] = asker.ask(op, payload, tx)
                if tx:
                    asker.ask(Op.TRANSACTION_END, b"F\0", tx)
    for domid in (5, 6):
        daemon.kill(domid)
    return found


def toolstack_tx(asker: Asker) -> int:
    asker.pipe.send([encode(Op.TRANSACTION_START, 1, 0, b"\0")], DEADLINE)
    while True:
        for message in asker.parser.feed(asker.pipe.receive(DEADLINE)):
            if message.op == Op.TRANSACTION_START:
                number: int = CODECS[Op.TRANSACTION_START].parse_reply(message.payload)
                return number


@pytest.mark.slow
def test_the_same_errors(both: Both) -> None:
    theirs, ours = answers(both.theirs), answers(both.ours)
    differ = {key: (theirs[key], ours[key]) for key in theirs if theirs[key] != ours[key]}
    unknown = {}
    for key, (said, here) in differ.items():
        _, op, kind, payload = key
        strict = kind in LAX and here in ("EINVAL", "ENOENT")
        # Where it finds no word, it answers whatever error it had before.
        earlier = kind == "words" and here == "EINVAL" and said != "OK"
        # A watch on a special name that is none is taken there, and hears nothing.
        special = op == "WATCH" and payload.startswith(b"@") and here == "EINVAL"
        if not (strict or earlier or special):
            unknown[key] = (said, here)
    assert unknown == {}
