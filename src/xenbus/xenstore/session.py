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
from typing import Protocol

from xenbus.errors import DeadlineError, LinkDown, PeerError, StoreError, UsageError, store_error
from xenbus.xenstore.wire.codecs import CODECS, parse_error
from xenbus.xenstore.wire.message import PAYLOAD_MAX, Message, Op, Parser, ProtocolError, encode, op_name
from xenbus.xenstore.wire.paths import check_path

log = logging.getLogger("xenbus.xenstore")

# A reply may be larger than XENSTORE_PAYLOAD_MAX (oxenstored has sent a DIRECTORY of 6600 bytes), up to here.
REPLY_CAP = 1 << 20
# The children of one node, as a list of bytes, over however many replies.
LISTING_CAP = 16 << 20
_ID_MASK = 0xFFFFFFFF

_WATCH_EVENT = int(Op.WATCH_EVENT)
_ERROR = int(Op.ERROR)
_WATCH = int(Op.WATCH)
_UNWATCH = int(Op.UNWATCH)
_START = int(Op.TRANSACTION_START)
_END = int(Op.TRANSACTION_END)
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


class WatchRecord:
    """One watch: the least that must be kept, for there may be tens of thousands in one client."""

    __slots__ = ("callback", "path", "token")

    def __init__(self, path: str, token: int, callback: Callable[[str], None]) -> None:
        self.path = path
        self.token = token
        self.callback = callback


@dataclass(slots=True)
class Pending:
    """A request under way, or waiting for its turn. It stays until its reply comes even if nobody waits."""

    op: int
    path: str
    tx_id: int
    payload: bytes
    waiter: Waiter
    deadline: float
    timeout: float


@dataclass(slots=True, frozen=True)
class RetryPolicy:
    """When to run a transaction again after EAGAIN (Conflict).

    attempts: runs in all, the first included
    base, cap: seconds; the pause before run n is random within (0, min(cap, base * 2**n)); the second run
               follows at once, because a conflict is mostly somebody who is done already
    budget:    seconds after the first run in which another may still begin
    """

    attempts: int = 40
    base: float = 0.001
    cap: float = 0.1
    budget: float = 30.0

    def pause(self, ended: int, elapsed: float, jitter: float) -> float | None:
        """Seconds before the next run, after `ended` runs and `elapsed` seconds; None: give up.
        `jitter` is a random number of [0, 1)."""
        if ended >= self.attempts or elapsed >= self.budget:
            return None
        return 0.0 if ended == 1 else jitter * min(self.cap, self.base * 2.0 ** min(ended, 30))


RETRY = RetryPolicy()


class Listing:
    """A list of children that comes in parts (DIRECTORY_PART). `offset` is where to ask on."""

    __slots__ = ("_generation", "_names", "restarts")

    def __init__(self) -> None:
        self._generation = ""
        self._names = b""
        self.restarts = 0

    @property
    def offset(self) -> int:
        return len(self._names)

    def add(self, part: tuple[str, bytes]) -> bool:
        """True when the list is whole. A node that changed meanwhile means: from the start again.
        PeerError for a list over LISTING_CAP."""
        generation, chunk = part
        if self._names and generation != self._generation:
            self._names = b""
            self.restarts += 1
            return False
        self._generation = generation
        self._names += chunk
        if len(self._names) > LISTING_CAP:
            raise PeerError(f"a list of children over {LISTING_CAP} bytes")
        if self._names.endswith(b"\0\0") or self._names == b"\0":
            self._names = self._names[:-1]
            return True
        return not chunk

    def names(self) -> list[str]:
        result: list[str] = CODECS[Op.DIRECTORY].parse_reply(self._names)
        return result


class Session:
    """One connection's state. Not thread-safe; `out` is emptied by whoever sends.

    peer:  who owes the replies, for DeadlineError
    limit: requests that may be unanswered at a time; more wait here in order, they do not fail
    """

    __slots__ = ("_last_id", "_last_token", "_parser", "_queue", "_sent", "dead", "limit", "out", "peer",
                 "strays", "transactions", "watches")  # fmt: skip

    def __init__(self, peer: str, limit: int, reply_cap: int = REPLY_CAP) -> None:
        self.peer = peer
        self.limit = limit
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

    # ---- requests ----

    def submit(
        self, op: int, path: str, payload: bytes, tx_id: int, waiter: Waiter, deadline: float, timeout: float
    ) -> None:
        """A request: sent now (into `out`) or in its turn. `deadline` is a time in the owner's clock,
        `timeout` the seconds it stands for. On a dead session the waiter fails at once.

        StoreError E2BIG for a payload that the store would hang up on (libxenstore says so too).
        """
        if len(payload) > PAYLOAD_MAX:
            raise StoreError(
                "E2BIG", op_name(op), path, tx_id, f"{len(payload)} bytes, at most {PAYLOAD_MAX}"
            )
        if self.dead is not None:
            waiter.set_exception(self._down(op, path))
            return
        if op == _END:
            self.transactions.discard(tx_id)
        pending = Pending(op, path, tx_id, payload, waiter, deadline, timeout)
        if len(self._sent) < self.limit and not self._queue:
            self._emit(pending)
        else:
            self._queue.append(pending)

    def post(self, op: Op, *args: object, tx_id: int = 0) -> None:
        """A request whose reply interests nobody; nothing happens on a dead session."""
        if self.dead is None:
            self.submit(op, "", CODECS[op].request(*args), tx_id, NOBODY, inf, inf)

    def _emit(self, pending: Pending) -> None:
        req_id = (self._last_id + 1) & _ID_MASK
        while req_id in self._sent or not req_id:  # 0 is what events and the kernel's own replies carry
            req_id = (req_id + 1) & _ID_MASK
        self._last_id = req_id
        self._sent[req_id] = pending
        self.out.append(encode(pending.op, req_id, pending.tx_id, pending.payload))

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
        op = message.op
        try:
            if op == pending.op:
                self._answered(pending, message.payload)
            elif op != _ERROR:
                raise PeerError(f"{self.peer} answered {op_name(pending.op)} with {op_name(op)}")
            elif not pending.waiter.done():
                name = parse_error(message.payload)
                words = _QUOTAS.get((pending.op, name), "")
                error = store_error(name, op_name(pending.op), pending.path, pending.tx_id, words)
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
            if pending.op == message.op:
                return self._sent.pop(req_id)
        return None

    def _answered(self, pending: Pending, payload: bytes) -> None:
        late = pending.waiter.done()
        if pending.op == _START:
            tx_id = int(CODECS[_START].parse_reply(payload))
            if not 0 < tx_id <= _ID_MASK:
                raise PeerError(f"{self.peer} gave {tx_id} as a transaction's id")
            if late:
                self.post(Op.TRANSACTION_END, False, tx_id=tx_id)
            else:
                self.transactions.add(tx_id)
        elif pending.op == _WATCH and late:
            # Whoever wanted the watch went away while it was being made.
            self.submit(_UNWATCH, pending.path, _watch_key(pending.payload), 0, NOBODY, inf, inf)
        if not late:
            pending.waiter.set_result(payload)

    def _event(self, payload: bytes) -> None:
        path, _, rest = payload.partition(b"\0")
        token = rest.partition(b"\0")[0]
        record = self.watches.get(int(token)) if token.isdigit() and len(token) < 20 else None
        if record is None:
            self.strays += 1
            return
        try:
            record.callback(path.decode("utf-8", "surrogateescape"))
        except Exception:
            log.exception("callback of the watch on %s failed", record.path)

    # ---- watches ----

    def new_token(self) -> int:
        """Never used before on this session: an event of a closed watch cannot reach a new one."""
        self._last_token += 1
        return self._last_token

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
            what = f"the reply to {op_name(pending.op)} {pending.path}".rstrip()
            pending.waiter.set_exception(DeadlineError(what, self.peer, pending.timeout))
        if self._queue:
            # A store that hangs for good must not make us keep what everybody gave up.
            self._queue = deque(pending for pending in self._queue if _wanted(pending))
        return earliest

    def drop_all(self, exc: Exception) -> None:
        """The link is gone: every waiter gets LinkDown, now, and so does every later request. Once."""
        if self.dead is not None:
            return
        self.dead = exc
        waiting = [*self._sent.values(), *self._queue]
        self._sent.clear()
        self._queue.clear()
        self.out.clear()
        self.watches.clear()
        self.transactions.clear()
        for pending in waiting:
            if not pending.waiter.done():
                pending.waiter.set_exception(self._down(pending.op, pending.path))

    def _down(self, op: int, path: str) -> LinkDown:
        error = LinkDown(f"{op_name(op)} {path}: {self.dead}")
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


def _wanted(pending: Pending) -> bool:
    """Whether a request that waits for its turn is still to be sent."""
    return not pending.waiter.done() or pending.op in _SENT_ANYWAY or pending.waiter is NOBODY


def _watch_key(payload: bytes) -> bytes:
    """Path and token, without the depth: what UNWATCH takes."""
    path, token = payload.split(b"\0", 2)[:2]
    return path + b"\0" + token + b"\0"


def checked(op: Op, path: str) -> str:
    """`path`, or StoreError EINVAL as the store would say, without asking it."""
    try:
        return check_path(path)
    except UsageError as exc:
        raise StoreError("EINVAL", op.name, path, detail=str(exc)) from None
