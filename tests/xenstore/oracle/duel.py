"""Two daemons side by side: each request goes to both, and answers, events and their order must be equal.

Knows bytes on the wire, and what INTRODUCE, RELEASE and a transaction's ends mean for who is connected. After
each request every client asks for something that always has an answer: what came before that answer is all
there was to come. Nothing sleeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.xenstored import DEADLINE, Xenstored, start

from xenbus.xenstore.transport import Pipe
from xenbus.xenstore.wire import HEADER, Message, Op, Parser, op_name

_BARRIER = b"0\0"
# xenstored lets a guest write 200 times a second: its clock goes faster here.
HURRY = 1000


class Divergence(AssertionError):
    """The daemons differ after `actions`; its text says how."""

    def __init__(self, actions: Sequence[Action], what: str) -> None:
        steps = "\n  ".join(map(str, actions))
        super().__init__(f"after\n  {steps}\n{what}")
        self.actions = actions


class Answer(NamedTuple):
    """What a daemon made of one request: events that its client got before the reply, and the reply."""

    before: tuple[bytes, ...]
    op: int
    payload: bytes

    def __str__(self) -> str:
        events = "".join(f"event {event!r}, then " for event in self.before)
        return f"{events}{op_name(self.op)} {self.payload!r}"


class Line:
    """One client of one daemon. transactions: its ids, by the handles that both daemons' share."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.transactions: dict[int, int] = {}
        self._parser = Parser(limit=1 << 20)
        self._messages: list[Message] = []
        self._req_id = 0

    def ask(self, op: int, payload: bytes, transaction: int = 0) -> Answer:
        self._req_id += 1
        tx_id = self.transactions.get(transaction, transaction)
        # Not `encode`, which would refuse what a daemon must be able to take.
        self.pipe.send([HEADER.pack(op, self._req_id, tx_id, len(payload)) + payload], DEADLINE)
        events = []
        while (message := self._receive()).op == Op.WATCH_EVENT:
            assert (message.req_id, message.tx_id) == (0, 0), message
            events.append(message.payload)
        assert (message.req_id, message.tx_id) == (self._req_id, tx_id), message
        return Answer(tuple(events), message.op, message.payload)

    def events(self) -> tuple[bytes, ...]:
        """All that were queued until now."""
        return self.ask(Op.GET_DOMAIN_PATH, _BARRIER).before

    def _receive(self) -> Message:
        while not self._messages:
            data = self.pipe.receive(DEADLINE)
            if not data:
                raise ConnectionError("the daemon has closed the connection")
            self._messages = self._parser.feed(data)
        return self._messages.pop(0)


@dataclass(slots=True, frozen=True)
class Request:
    """client: a name; `guestN` is domain N on its ring
    transaction: a handle; 0 for none. handle: the one that TRANSACTION_START is to bring
    ordered: whether events of this client come before or after the reply is compared, too"""

    client: str
    op: int
    payload: bytes
    transaction: int = 0
    handle: int = 0
    ordered: bool = True

    def __str__(self) -> str:
        within = f" in {self.transaction}" * bool(self.transaction)
        made = f" -> {self.handle}" * bool(self.handle)
        return f"{self.client}: {op_name(self.op)} {self.payload!r}{within}{made}"


@dataclass(slots=True, frozen=True)
class Connect:
    """A client on the socket connects, or does so anew."""

    client: str

    def __str__(self) -> str:
        return f"{self.client} connects"


@dataclass(slots=True, frozen=True)
class Fate:
    """What becomes of a domain: it `begins`, `dies`, shuts down (`s`), crashes (`c`)."""

    domid: int
    what: str

    def __str__(self) -> str:
        return f"domain {self.domid}: {self.what}"


Action = Request | Connect | Fate


def _compared(op: int, payload: bytes) -> bytes:
    """Transaction ids, generation counts and bytes of memory are the daemon's own business."""
    if op == Op.CONTROL:
        return b"\n".join(line for line in payload.split(b"\n") if not line.startswith(b"memory"))
    if op == Op.TRANSACTION_START:
        return b"<id>"
    if op == Op.DIRECTORY_PART:
        return payload.partition(b"\0")[2]
    return payload


def _doomed(request: Request, theirs: Answer, ours: Answer) -> bool:
    """RM within a transaction, of a tree that has lost a node outside, or below a parent that has come since:
    xenstored stumbles over it (EIO, EINVAL), ours goes on and says EAGAIN at the end. Or of too many nodes:
    EIO, and xenstored has removed some. Or a node that was removed outside is made again: xenstored lists it
    twice. Known differences, in transactions that can only fail."""
    if not request.transaction:
        return False
    if request.op in (Op.DIRECTORY, Op.DIRECTORY_PART):
        names = theirs.payload.split(b"\0")[:-1]
        return len(set(names)) < len(names)
    if request.op != Op.RM or theirs.op != Op.ERROR:
        return False
    return theirs.payload == b"EIO\0" or (theirs.payload == b"EINVAL\0" and ours.op == Op.RM)


@dataclass(slots=True)
class Pair:
    """What is compared.

    reference: the kind of daemon that is right (`start` of tests/support/xenstored.py)
    ours:      the kind that is tried
    quotas:    of both, small enough to be met
    without:   what makes no sense for this pair, by names that `script.py` knows
    compared:  of a reply's operation and payload, what has to be equal
    doomed:    whether a transaction cannot be compared any more after such answers to a request in it: they
               may differ, and it is aborted
    """

    reference: str = "c"
    ours: str = "ours"
    quotas: Mapping[str, int] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    compared: Callable[[int, bytes], bytes] = _compared
    doomed: Callable[[Request, Answer, Answer], bool] = _doomed


class Duel:
    """Both daemons with the same clients. `close()` ends them.

    history: what was done
    compared: answers compared so far, in all duels of this process
    """

    compared = 0

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.history: list[Action] = []
        self._folder = tempfile.TemporaryDirectory(prefix="xenbus-duel-")
        self.daemons: list[Xenstored] = []
        self.lines: dict[str, list[Line]] = {}
        self.sockets: set[str] = set()
        try:
            for kind in (pair.reference, pair.ours):
                folder = Path(self._folder.name) / str(len(self.daemons))
                self.daemons.append(start(kind, folder, quotas=pair.quotas, hurry=HURRY))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.stop()
        self._folder.cleanup()

    def __enter__(self) -> Duel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def do(self, action: Action) -> bytes:
        """The reply's payload, if there is one; for an ERROR, `!` and its name. Divergence."""
        self.history.append(action)
        reply = b""
        if isinstance(action, Request):
            reply = self._ask(action)
        elif isinstance(action, Connect):
            self._hang_up(action.client)
            self.sockets.add(action.client)
            self.lines[action.client] = [Line(daemon.connect()) for daemon in self.daemons]
        else:
            self._befall(action)
        self._compare_events()
        return reply

    def ask(self, client: str, op: int, payload: bytes, transaction: int = 0) -> bytes:
        """A request that is written down more shortly."""
        return self.do(Request(client, op, payload, transaction))

    # ---- requests ----

    def _ask(self, request: Request) -> bytes:
        lines = self.lines.get(request.client)
        if lines is None:
            return b""
        if request.op == Op.INTRODUCE and request.client in self.sockets:
            # What its rings hold, and they themselves, start anew.
            self._hang_up(_guest_of(request.payload))
        answers = []
        for line in lines:
            answer = line.ask(request.op, request.payload, request.transaction)
            if not request.ordered:
                answer = answer._replace(before=answer.before + line.events())
            answers.append(answer)
        said = [
            (answer.before, answer.op, self.pair.compared(answer.op, answer.payload)) for answer in answers
        ]
        if self.pair.doomed(request, *answers):
            for line in lines:
                line.ask(Op.TRANSACTION_END, b"F\0", request.transaction)
                line.transactions.pop(request.transaction, None)
            return b""
        if said[0] != said[1]:
            raise self._divergence("answers", answers)
        Duel.compared += 1
        self._follow(request, lines, answers)
        answer = answers[0]
        return b"!" + answer.payload if answer.op == Op.ERROR else answer.payload

    def _follow(self, request: Request, lines: Sequence[Line], answers: Sequence[Answer]) -> None:
        """Who is connected, and what a handle stands for."""
        if answers[0].op == Op.ERROR:
            return
        if request.op in (Op.INTRODUCE, Op.RESUME) and request.client in self.sockets:
            # It runs: with others shut down from before, how often xenstored tells at its next look at all
            # domains is a matter of their order.
            for daemon in self.daemons:
                daemon.machine.resume(int(_guest_of(request.payload)[5:]))
        if request.op == Op.INTRODUCE:
            name = _guest_of(request.payload)
            self.lines[name] = [Line(daemon.guest(int(name[5:]))) for daemon in self.daemons]
        elif request.op == Op.RELEASE:
            self._hang_up(_guest_of(request.payload))
        elif request.op == Op.TRANSACTION_START and request.handle:
            for line, answer in zip(lines, answers, strict=True):
                line.transactions[request.handle] = int(answer.payload[:-1])

    def _hang_up(self, client: str) -> None:
        for line in self.lines.pop(client, ()):
            line.pipe.close()

    # ---- domains ----

    def _befall(self, fate: Fate) -> None:
        if fate.what == "dies":
            self._hang_up(f"guest{fate.domid}")
        for daemon in self.daemons:
            if fate.what == "begins":
                daemon.machine.create(fate.domid)
            elif fate.what == "dies":
                daemon.kill(fate.domid)
            else:
                daemon.shutdown(fate.domid, fate.what)

    # ---- comparing ----

    def _compare_events(self) -> None:
        """Every client has got the same events, in the same order."""
        for name, lines in self.lines.items():
            events = [line.events() for line in lines]
            if events[0] != events[1]:
                raise self._divergence(f"events of {name}", events)

    def _divergence(self, what: str, sides: Sequence[object]) -> Divergence:
        names = (self.pair.reference, self.pair.ours)
        said = "\n".join(f"{name:>5}: {side}" for name, side in zip(names, sides, strict=True))
        return Divergence(self.history, f"the {what} differ:\n{said}")


def _guest_of(payload: bytes) -> str:
    return f"guest{int(payload.split(bytes(1))[0] or 0)}"
