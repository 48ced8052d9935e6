"""Scripts of requests to a store daemon, and what it answers, as text.

A line is `client OPERATION words`: clients are A and B on sockets, 1 and 2 on rings. `A@t` is in the
transaction that `A START t` began. Words are NUL-terminated, but for the value of a WRITE; `=` before the
only word takes that as it is; `x*9` is xxxxxxxxx. A number is an operation without a name here.

The answer has all that the client got until then, in order: `OK`, a value, `ENOENT`, `event /path token`;
and of others `2: event ...`. Of a header, only what is not as it should be is shown: `(tx 0)`.
"""

from __future__ import annotations

import re
from copy import copy

from tests.support.machine import GuestRing
from tests.support.xenstored import DEADLINE, Xenstored
from xenbus.xenstore.transport import Pipe
from xenbus.xenstore.wire import HEADER, Message, Op, Parser, parse_error, parse_event

_NAMES = {
    "START": Op.TRANSACTION_START,
    "END": Op.TRANSACTION_END,
    "INTRODUCED": Op.IS_DOMAIN_INTRODUCED,
    "RESET": Op.RESET_WATCHES,
}


class _Line:
    """A client: what it got is kept until somebody asks."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.transactions: dict[str, int] = {}
        self._parser = Parser(limit=1 << 20)
        self._messages: list[Message] = []
        self._req_id = 0

    def send(self, op: int, tx_id: int, payload: bytes) -> int:
        self._req_id += 1
        self.pipe.send([HEADER.pack(op, self._req_id, tx_id, len(payload)) + payload], DEADLINE)
        return self._req_id

    def until(self, req_id: int) -> list[Message]:
        """All messages up to the reply to that request."""
        while not any(one.req_id == req_id and one.op != Op.WATCH_EVENT for one in self._messages):
            data = self.pipe.receive(DEADLINE)
            assert data, "the daemon has closed the connection"
            self._messages += self._parser.feed(data)
        got, self._messages = self._messages, []
        return got

    def rest(self) -> list[Message]:
        """All else that was there to come: before the reply to something harmless."""
        return self.until(self.send(Op.GET_DOMAIN_PATH, 0, b"0\0"))[:-1]


class Probe:
    """A daemon and its clients; domains 1 and 2 are introduced."""

    def __init__(self, daemon: Xenstored) -> None:
        self._deaf: frozenset[str] = frozenset()
        self.rings: dict[int, GuestRing] = {}
        self._lines = {"A": _Line(daemon.connect()), "B": _Line(daemon.connect())}
        for domid in (1, 2):
            ring = self.rings[domid] = daemon.introduce(domid)
            self._lines[str(domid)] = _Line(ring)

    def without(self, client: str) -> Probe:
        """The same, but that client is never looked at, unless it asks something itself."""
        other = copy(self)
        other._deaf = self._deaf | {client}
        return other

    def post(self, request: str) -> None:
        """Send one line of a script, and wait for nothing."""
        self._send(*self._parse(request)[:-1])

    def ask(self, request: str) -> str:
        """What came of one line of a script."""
        line, op, tx_id, words, begins = self._parse(request)
        got = line.until(self._send(line, op, tx_id, words))
        (reply,) = [one for one in got if one.op != Op.WATCH_EVENT]
        if begins and reply.op == op:
            line.transactions[begins] = int(reply.payload[:-1])
            reply.payload = b"a transaction"
        got += line.rest()
        said = [_said(one, tx_id) for one in got]
        if op == Op.RELEASE and reply.op == op:
            self._lines.pop(words[0], None)
        for other, its in self._lines.items():
            if its is not line and other not in self._deaf:
                said += [f"{other}: {_said(one, 0)}" for one in its.rest()]
        return ", ".join(said)

    def _parse(self, request: str) -> tuple[_Line, int, int, list[str], str]:
        """Client, operation, transaction, words, and the name of the transaction that it begins."""
        who, name, *words = request.split(" ")
        who, _, transaction = who.partition("@")
        line = self._lines[who]
        tx_id = line.transactions.get(transaction) or int(transaction or 0)
        op = int(name) if name.isdigit() else _NAMES.get(name) or Op[name]
        begins = words.pop() if op == Op.TRANSACTION_START and len(words) == 1 else ""
        return line, op, tx_id, words, begins

    def _send(self, line: _Line, op: int, tx_id: int, words: list[str]) -> int:
        return line.send(op, tx_id, _payload(op, words))


def _payload(op: int, words: list[str]) -> bytes:
    data = [_word(word) for word in words] or [b""]
    if len(data) == 1 and data[0][:1] == b"=":
        return data[0][1:]
    return b"\0".join(data) + b"\0" * (op != Op.WRITE or len(data) == 1)


def _word(word: str) -> bytes:
    return re.sub(r"(\w|\w/)\*(\d+)", lambda found: found[1] * int(found[2]), word).encode()


def _said(message: Message, tx_id: int) -> str:
    if message.op == Op.WATCH_EVENT:
        return "event " + " ".join(map(_short, parse_event(message.payload)))
    wrong = f" (tx {message.tx_id})" * (message.tx_id != tx_id)
    if message.op == Op.ERROR:
        return parse_error(message.payload) + wrong
    text = message.payload.removesuffix(b"\0").replace(b"\0", b" ").decode()
    return (_short(text) or "nothing") + wrong


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{len(text)} bytes"
