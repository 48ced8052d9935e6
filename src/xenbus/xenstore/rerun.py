"""A recording's requests, sent to a store: does it answer as the recorded one did?

Knows records, pipes and the frame of messages. Blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xenbus.errors import LinkDown
from xenbus.xenstore.transport import Pipe
from xenbus.xenstore.transport.recording import Record
from xenbus.xenstore.wire.message import REPLY_CAP, Message, Op, Parser, encode

# Seconds that the store has for what the recorded one sent.
PATIENCE = 5.0
# What no two stores have the same: only that there is such an answer is compared.
_OWN = frozenset((int(Op.TRANSACTION_START), int(Op.CONTROL)))


@dataclass(slots=True, frozen=True)
class Difference:
    """Where a store first answers otherwise. `got` is None: nothing came within PATIENCE seconds, or
    (`closed`) it hung up."""

    record: Record
    got: Message | None
    closed: bool = False


class _Connection:
    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self._parser = Parser(REPLY_CAP)
        # By request id; libxenstore has but one.
        self._replies: dict[int, deque[Message]] = {}
        self._events: deque[Message] = deque()
        # Ids of transactions: the recorded one's, and this store's.
        self._transactions: dict[int, int] = {}

    def send(self, message: Message) -> None:
        tx_id = self._transactions.get(message.tx_id, message.tx_id)
        self.pipe.send([encode(message.op, message.req_id, tx_id, message.payload)], PATIENCE)

    def expect(self, recorded: Message) -> Message | None:
        """What this store has in the place of `recorded`; None if nothing comes."""
        until = time.monotonic() + PATIENCE
        while True:
            if recorded.op == Op.WATCH_EVENT:
                if self._events:
                    return self._events.popleft()
            elif replies := self._replies.get(recorded.req_id):
                found = replies.popleft()
                if recorded.op == found.op == Op.TRANSACTION_START:
                    self._learn(recorded.payload, found.payload)
                return found
            left = until - time.monotonic()
            if left <= 0:
                return None
            try:
                self._take(self.pipe.receive(left))
            except TimeoutError:
                return None

    def _learn(self, theirs: bytes, ours: bytes) -> None:
        try:
            self._transactions[int(theirs.rstrip(b"\0"))] = int(ours.rstrip(b"\0"))
        except ValueError:
            pass

    def _take(self, data: bytes) -> None:
        if not data:
            raise LinkDown("it closed the connection")
        for message in self._parser.feed(data):
            if message.op == Op.WATCH_EVENT:
                self._events.append(message)
            else:
                self._replies.setdefault(message.req_id, deque()).append(message)


def rerun(records: Iterable[Record], dial: Callable[[], Pipe]) -> tuple[int, Difference | None]:
    """(messages compared, the first difference). Each recorded connection is one from `dial`, from its
    first message to its last; requests go out in the recorded order, after the answers recorded before.

    Replies are compared as they are, but for ids of transactions, generations of lists and CONTROL;
    events of one connection in their order, wherever they come between the replies. LinkDown if nobody is
    there.
    """
    everything = list(records)
    last = {record.connection: place for place, record in enumerate(everything)}
    open_: dict[int, _Connection] = {}
    compared = 0
    try:
        for place, record in enumerate(everything):
            if record.connection not in open_:
                open_[record.connection] = _Connection(dial())
            connection = open_[record.connection]
            try:
                if record.outgoing:
                    connection.send(record.message)
                else:
                    got = connection.expect(record.message)
                    if got is None or not _same(record.message, got):
                        return compared, Difference(record, got)
                    compared += 1
            except (LinkDown, OSError):
                return compared, Difference(record, None, closed=True)
            if last[record.connection] == place:
                open_.pop(record.connection).pipe.close()
    finally:
        for connection in open_.values():
            connection.pipe.close()
    return compared, None


def _same(recorded: Message, got: Message) -> bool:
    if recorded.op != got.op:
        return False
    if recorded.op in _OWN:
        return True
    if recorded.op == Op.DIRECTORY_PART:
        return recorded.payload.partition(b"\0")[2] == got.payload.partition(b"\0")[2]
    return recorded.payload == got.payload
