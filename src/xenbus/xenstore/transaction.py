"""Transactions without I/O: when to run one again, what it touched, one whose operations are known before.

Knows calls and the session; it is the clients that wait and sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import random
from typing import Any, Generic, TypeVar

from xenbus.errors import Conflict
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call, Program, together, value_of, within
from xenbus.xenstore.session import Session
from xenbus.xenstore.wire.message import Op

# A client.
C = TypeVar("C")
_WRITES = frozenset(map(int, (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)))
# Paths that a message names; `Conflict` has them all.
_NAMED = 8


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


class Touched:
    """The paths that one run of a transaction read and wrote, as far as they were asked for by name."""

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: dict[tuple[str, bool], None] = {}

    def add(self, *asked: Call[Any]) -> None:
        for call in asked:
            self._calls[call.path, call.op in _WRITES] = None

    def report(self, exc: Conflict) -> None:
        exc.read = tuple(path for path, written in self._calls if not written and path)
        exc.wrote = tuple(path for path, written in self._calls if written)


class Opened(Generic[C]):
    """An open transaction of a client.

    ended: nothing is asked in it any more
    """

    __slots__ = ("_client", "_session", "ended", "id", "touched")

    def __init__(self, client: C, session: Session, tx_id: int) -> None:
        self._client = client
        self._session = session
        self.id = tx_id
        self.ended = False
        self.touched = Touched()

    def _abort(self, exc: BaseException) -> None:
        """Its function failed with `exc`. What is to be sent is in the session."""
        self.ended = True
        self._session.abort(self.id)
        if isinstance(exc, Conflict):
            self.touched.report(exc)


class Attempts:
    """The runs of one transaction. `now` is the owner's clock."""

    __slots__ = ("_began", "_ended", "_limit", "_now", "_policy")

    def __init__(self, policy: RetryPolicy, limit: int | None, now: Callable[[], float]) -> None:
        self._policy = policy
        self._limit = limit
        self._now = now
        self._began = now()
        self._ended = 0

    def failed(self, exc: Conflict) -> float:
        """Seconds before the next run; Conflict, saying all that is known, when there is to be none."""
        self._ended += 1
        pause = self._policy.pause(self._ended, self._now() - self._began, random())
        if pause is not None and (self._limit is None or self._ended < self._limit):
            return pause
        detail = f"after {self._ended} attempts" if self._ended > 1 else ""
        if touched := [*exc.wrote, *exc.read]:
            names = ", ".join(dict.fromkeys(touched[:_NAMED])) + (", ..." if len(touched) > _NAMED else "")
            detail += ("; " if detail else "") + f"changed meanwhile was one of {names}"
        last = Conflict(exc.name, exc.op, exc.path, exc.tx_id, exc.detail or detail)
        last.attempts, last.read, last.wrote = self._ended, exc.read, exc.wrote
        raise last from exc


def commit(session: Session, requests: Iterable[Call[Any] | Program[Any]]) -> Program[list[Any]]:
    """`requests` as one transaction, in two round trips: START and all of them; END. Their results.

    END is sent when every reply is there and none is an error. It could not go out with them: a store
    commits what is left of a transaction in which an operation failed. What makes it two trips instead of
    three is that the transaction's id is foreseen (`Session.foresee`); where it was not, the requests go
    out again with the one that START brought.

    The first request's error is raised, and the transaction aborted; Conflict says what was touched.
    """
    touched = Touched()
    asking = together(list(requests))
    opened = 0
    try:
        first = next(asking)
        touched.add(*first)
        foreseen = session.foresee()
        for call in first:
            call.tx_id = foreseen
        started, *heard = yield [calls.start(), *(first if foreseen else ())]
        opened = tx_id = value_of(started)
        right = session.foresaw(foreseen, tx_id)
        outcomes = yield from within(_resumed(asking, first, heard if right else None, touched), tx_id)
        _raise_first(outcomes)
        last = calls.end(True)
        last.tx_id = tx_id
        opened = 0
        (ended,) = yield [last]
        if isinstance(ended, Conflict):
            touched.report(ended)
        value_of(ended)
        return outcomes
    except StopIteration as nothing:  # to ask for: the operations cannot even be written
        return _raise_first(nothing.value)
    finally:
        asking.close()
        if opened:
            session.abort(opened)


def _raise_first(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        value_of(outcome)
    return outcomes


def _resumed(
    asking: Program[list[Any]], first: Sequence[Call[Any]], heard: list[Any] | None, touched: Touched
) -> Program[list[Any]]:
    """The rest of `asking`, whose first round is answered already, or is yet to be asked."""
    if heard is None:
        heard = yield first
    try:
        following = asking.send(heard)
        while True:
            touched.add(*following)
            following = asking.send((yield following))
    except StopIteration as end:
        result: list[Any] = end.value
        return result
