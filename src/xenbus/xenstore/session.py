"""The client's core without I/O: request ids, reply matching, watch demultiplexing, deadlines, retry policy.

Knows the wire, and waiters by two methods; never asyncio, sockets or threads. Whoever owns a `Session`
feeds it bytes, sends what is in `out`, and tells it the time. client.py and sync.py are thin over this.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from xenbus.errors import DeadlineError, LinkDown, PeerError, StoreError, store_error
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call
from xenbus.xenstore.wire.codecs import CODECS, parse_error
from xenbus.xenstore.wire.message import REPLY_CAP, Message, Op, Parser, ProtocolError, encode, op_name

log = logging.getLogger("xenbus.xenstore")

_ID_MASK = 0xFFFFFFFF

_WATCH_EVENT = int(Op.WATCH_EVENT)
_ERROR = int(Op.ERROR)
_WATCH = int(Op.WATCH)
_UNWATCH = int(Op.UNWATCH)
_START = int(Op.TRANSACTION_START)
_END = int(Op.TRANSACTION_END)
_ok = CODECS[Op.UNWATCH].parse_reply
# What these names mean for these operations, for people: a quota of the domain that asked (4.17, and now).
_QUOTAS = {
    (_WATCH, "E2BIG"): "the domain's quota of watches is used up",
    (_WATCH, "ENOSPC"): "the domain's quota of watches is used up",
    (_START, "ENOSPC"): "the domain's quota of open transactions is used up",
    (int(Op.WRITE), "ENOSPC"): "a quota: the owner's nodes, or the size of this one",
    (int(Op.MKDIR), "ENOSPC"): "a quota: the owner's nodes, or the size of this one",
    (_END, "ENOSPC"): "a quota: the owner's nodes",
}
# Nobody waits any more, but the store must still hear it, or it holds a watch or a transaction for ever.
_SENT_ANYWAY = frozenset((_UNWATCH, _END))


class Waiter(Protocol):
    """Whoever waits for a reply: an asyncio future, or the blocking client's slot."""

    def done(self) -> bool: ...
    def set_result(self, result: bytes, /) -> None: ...
    def set_exception(self, exception: Exception, /) -> None: ...


class _Nobody:
    """The waiter of a request whose reply interests nobody."""

    def done(self) -> bool:
        return True

    def set_result(self, result: bytes, /) -> None:
        pass

    def set_exception(self, exception: Exception, /) -> None:
        pass


NOBODY = _Nobody()


class Event(str):
    """What a watch says: the path of a node that changed, as the store sent it. It is a str."""

    __slots__ = ()
    # The watch was just set: this says nothing of a change.
    first = False
    # The connection was lost and made again, and the watch with it: anything below it may have changed.
    resync = False


class FirstEvent(Event):
    __slots__ = ()
    first = True


class ResyncEvent(Event):
    __slots__ = ()
    resync = True


class WatchRecord:
    """One watch: the least that must be kept, for there may be tens of thousands in one client.

    The store's first event comes before any other of the same watch; `kind` is what the next one is.
    """

    __slots__ = ("callback", "depth", "kind", "path", "token")

    def __init__(
        self, path: str, token: int, callback: Callable[[Event], object], depth: int | None = None
    ) -> None:
        self.path = path
        self.token = token
        self.callback = callback
        self.depth = depth
        self.kind: type[Event] = FirstEvent


@dataclass(slots=True)
class Pending:
    """A request under way, or waiting for its turn. It stays until its reply comes even if nobody waits."""

    call: Call[Any]
    tx_id: int
    waiter: Waiter
    deadline: float
    timeout: float


class Session:
    """One connection's state. Not thread-safe; `out` is emptied by whoever sends.

    peer:  who owes the replies, for DeadlineError
    limit: requests that may be unanswered at a time; more wait here in order, they do not fail
    max_watches: watches that may be set; one more is refused here, before a quota of the store is met
    """

    __slots__ = ("_last_id", "_last_token", "_last_transaction", "_misses", "_parser", "_queue", "_sent",
                 "dead", "limit", "max_watches", "out", "peer",
                 "strays", "transactions", "watches")  # fmt: skip

    def __init__(
        self, peer: str, limit: int, reply_cap: int = REPLY_CAP, max_watches: int | None = None
    ) -> None:
        self.peer = peer
        self.limit = limit
        self.max_watches = max_watches
        self.out: list[bytes] = []
        self.watches: dict[int, WatchRecord] = {}
        self.transactions: set[int] = set()
        self.dead: Exception | None = None
        # Replies nobody asked for, events of watches that are gone: dropped, and counted for people.
        self.strays = 0
        self._parser = Parser(reply_cap)
        self._sent: dict[int, Pending] = {}
        self._queue: deque[Pending] = deque()
        self._last_id = 0
        self._last_token = 0
        self._last_transaction = 0
        self._misses = 0

    # ---- requests ----

    def submit(self, call: Call[Any], waiter: Waiter, deadline: float, timeout: float) -> None:
        """A request: sent now (into `out`) or in its turn. `deadline` is a time in the owner's clock,
        `timeout` the seconds it stands for. On a dead session the waiter fails at once."""
        pending = Pending(call, call.tx_id, waiter, deadline, timeout)
        if self.dead is not None:
            waiter.set_exception(self._down(pending))
            return
        if call.op == _END:
            self.transactions.discard(call.tx_id)
        if len(self._sent) < self.limit and not self._queue:
            self._emit(pending)
        else:
            self._queue.append(pending)

    def post(self, call: Call[Any]) -> None:
        """A request whose reply interests nobody; nothing happens on a dead session."""
        if self.dead is None:
            self.submit(call, NOBODY, inf, inf)

    def abort(self, tx_id: int) -> None:
        """Nobody waits for the end of a transaction that is not committed."""
        call = calls.end(False)
        call.tx_id = tx_id
        self.post(call)

    def disown(self, call: Call[Any], payload: bytes) -> None:
        """The reply came, but whoever asked is gone: what it made is undone."""
        if call.op == _START:
            self.abort(int(call.parse(payload)))
        elif call.op == _WATCH:
            path, token = call.payload.split(b"\0", 2)[:2]
            self.post(Call(_UNWATCH, call.path, path + b"\0" + token + b"\0", _ok))

    def _emit(self, pending: Pending) -> None:
        req_id = (self._last_id + 1) & _ID_MASK
        while req_id in self._sent or not req_id:  # 0 is what events and the kernel's own replies carry
            req_id = (req_id + 1) & _ID_MASK
        self._last_id = req_id
        self._sent[req_id] = pending
        call = pending.call
        self.out.append(encode(call.op, req_id, pending.tx_id, call.payload))

    def _emit_queued(self) -> None:
        queue, sent = self._queue, self._sent
        while queue and len(sent) < self.limit:
            pending = queue.popleft()
            if _wanted(pending):
                self._emit(pending)

    # ---- replies and events ----

    def receive(self, data: bytes | memoryview) -> None:
        """Bytes from the store: waiters get their replies, watches their callbacks, here and now.

        PeerError if the store broke the protocol: the link cannot be followed any further.
        """
        try:
            messages = self._parser.feed(data)
        except ProtocolError as exc:
            for message in exc.messages:
                self._dispatch(message)
            raise
        for message in messages:
            self._dispatch(message)
        if self._queue:
            self._emit_queued()

    def _dispatch(self, message: Message) -> None:
        if message.op == _WATCH_EVENT:
            self._event(message.payload)
            return
        pending = self._sent.pop(message.req_id, None)
        if pending is None:
            pending = self._unnumbered(message)
            if pending is None:
                self.strays += 1
                log.debug("%s: stray reply %s", self.peer, message)
                return
        op, call = message.op, pending.call
        try:
            if op == call.op:
                self._answered(pending, message.payload)
            elif op != _ERROR:
                raise PeerError(f"{self.peer} answered {op_name(call.op)} with {op_name(op)}")
            elif not pending.waiter.done():
                name = parse_error(message.payload)
                words = _QUOTAS.get((call.op, name), "")
                error = store_error(name, op_name(call.op), call.path, pending.tx_id, words)
                pending.waiter.set_exception(error)
        except PeerError as exc:
            # The link goes down for this, and with it whoever is still in `_sent`: not this one any more.
            if not pending.waiter.done():
                pending.waiter.set_exception(exc)
            raise

    def _unnumbered(self, message: Message) -> Pending | None:
        """Linux answers WATCH and UNWATCH on /dev/xen/xenbus itself, in order, and older kernels leave the
        id 0 (drivers/xen/xenbus/xenbus_dev_frontend.c)."""
        if message.req_id or message.op not in (_WATCH, _UNWATCH):
            return None
        for req_id, pending in self._sent.items():
            if pending.call.op == message.op:
                return self._sent.pop(req_id)
        return None

    def _answered(self, pending: Pending, payload: bytes) -> None:
        late = pending.waiter.done()
        if pending.call.op == _START:
            tx_id = int(CODECS[_START].parse_reply(payload))
            if not 0 < tx_id <= _ID_MASK:
                raise PeerError(f"{self.peer} gave {tx_id} as a transaction's id")
            self._last_transaction = tx_id
            if not late:
                self.transactions.add(tx_id)
        if late:
            self.disown(pending.call, payload)
        else:
            pending.waiter.set_result(payload)

    def _event(self, payload: bytes) -> None:
        path, _, rest = payload.partition(b"\0")
        token = rest.partition(b"\0")[0]
        record = self.watches.get(int(token)) if token.isdigit() and len(token) < 20 else None
        if record is None:
            self.strays += 1
            return
        kind = record.kind
        record.kind = Event
        try:
            record.callback(kind(path.decode("utf-8", "surrogateescape")))
        except Exception:
            log.exception("callback of the watch on %s failed", record.path)

    # ---- watches ----

    def new_token(self) -> int:
        """Never used before on this session: an event of a closed watch cannot reach a new one."""
        self._last_token += 1
        return self._last_token

    def check_budget(self, path: str) -> None:
        """StoreError E2BIG when `max_watches` are set."""
        if self.max_watches is not None and len(self.watches) >= self.max_watches:
            detail = f"this client's own budget of {self.max_watches} watches is used up"
            raise StoreError("E2BIG", "WATCH", path, detail=detail)

    def forget(self) -> None:
        """RESET_WATCHES was asked for: no callback from now on."""
        self.watches.clear()
        self.transactions.clear()

    # ---- transactions ----

    def foresee(self) -> int:
        """The id that the next TRANSACTION_START will be answered with, or 0 where that is not known.

        Daemons count them up for each connection. Requests may be sent with it before the answer is there:
        should it be another, they meet ENOENT, for this id is nobody's. To be sure of that, no other START
        may be under way, and none of our transactions may have it.
        """
        number = (self._last_transaction + 1) & _ID_MASK
        if self.limit == 1 or self._misses > 1 or number in self.transactions:
            return 0
        if any(pending.call.op == _START for pending in (*self._sent.values(), *self._queue)):
            return 0
        return number

    def foresaw(self, number: int, tx_id: int) -> bool:
        """Whether that was right; twice in a row wrong, and nothing is foreseen any more."""
        if number:
            self._misses = 0 if number == tx_id else self._misses + 1
        return number == tx_id

    # ---- ends ----

    def expire(self, now: float) -> float:
        """Fails who waited long enough. The next deadline, or inf."""
        earliest = inf
        for pending in (*self._sent.values(), *self._queue):
            if pending.waiter.done():
                continue
            if pending.deadline > now:
                earliest = min(earliest, pending.deadline)
                continue
            what = f"the reply to {_named(pending)}"
            pending.waiter.set_exception(DeadlineError(what, self.peer, pending.timeout))
        if self._queue:
            # A store that hangs for good must not make us keep what everybody gave up.
            self._queue = deque(pending for pending in self._queue if _wanted(pending))
        return earliest

    def drop_all(self, exc: Exception, keep_watches: bool = False) -> None:
        """The link is gone: every waiter gets LinkDown, now, and so does every later request. Once.

        keep_watches: for `successor`
        """
        if self.dead is None:
            self.dead = exc
        waiting = [*self._sent.values(), *self._queue]
        self._sent.clear()
        self._queue.clear()
        self.out.clear()
        self.transactions.clear()
        if not keep_watches:
            self.watches.clear()
        for pending in waiting:
            if not pending.waiter.done():
                pending.waiter.set_exception(self._down(pending))

    def successor(self, peer: str, limit: int) -> Session:
        """A session for the next connection: the same watches, which are to be set again, and no token
        that was used before."""
        session = Session(peer, limit, self._parser.limit, self.max_watches)
        session.watches = self.watches
        session._last_token = self._last_token
        self.watches = {}
        return session

    def watches_again(self) -> list[Call[None]]:
        """What sets them. The first event of each says that anything below it may have changed."""
        for record in self.watches.values():
            record.kind = ResyncEvent
        return [calls.watch(one.path, one.token, one.depth) for one in self.watches.values()]

    def refused(self, call: Call[None], error: StoreError) -> int:
        """One of `watches_again` cannot be set: it is none any more. Its token."""
        token = int(call.payload.split(b"\0", 2)[1])
        self.watches.pop(token, None)
        log.error("after reconnecting: %s", error)
        return token

    def _down(self, pending: Pending) -> LinkDown:
        error = LinkDown(f"{_named(pending)}: {self.dead}")
        error.__cause__ = self.dead
        return error

    def counts(self) -> dict[str, int]:
        """What is held right now: watches, open transactions, requests somebody waits for, and requests
        that the store has not answered (waited for or not)."""
        everything = (*self._sent.values(), *self._queue)
        return {
            "watches": len(self.watches),
            "transactions": len(self.transactions),
            "waiters": sum(not pending.waiter.done() for pending in everything),
            "unanswered": len(everything),
        }


def _named(pending: Pending) -> str:
    """A request, for people: operation, path, transaction."""
    name = f"{op_name(pending.call.op)} {pending.call.path}".rstrip()
    return f"{name} in transaction {pending.tx_id}" if pending.tx_id else name


def _wanted(pending: Pending) -> bool:
    """Whether a request that waits for its turn is still to be sent."""
    return not pending.waiter.done() or pending.call.op in _SENT_ANYWAY or pending.waiter is NOBODY
