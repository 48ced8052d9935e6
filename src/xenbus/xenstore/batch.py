"""Several operations, said before any is sent: the same names as a client's, results to be asked for later.

Knows calls; whether they go out as they are or as one transaction is the client's doing. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from xenbus.errors import StoreError, UsageError, XenbusError
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call, Program, describe

P = ParamSpec("P")
T = TypeVar("T")


class Reply(Generic[T]):
    """What one operation comes to, of a batch or of `SyncClient.submit`."""

    __slots__ = ("_known", "_outcome")

    def __init__(self) -> None:
        self._known = False
        self._outcome: Any = None

    def settle(self, outcome: Any) -> None:
        self._known = True
        self._outcome = outcome

    @property
    def done(self) -> bool:
        return self._known

    @property
    def error(self) -> XenbusError | None:
        """None for a success, and before there is a reply."""
        return self._outcome if isinstance(self._outcome, XenbusError) else None

    def result(self) -> T:
        """Raises the operation's own error; UsageError before there is a reply."""
        if not self._known:
            raise UsageError("there is no reply yet")
        result: T = calls.value_of(self._outcome)
        return result


def _one(make: Callable[P, Call[T]]) -> Callable[Concatenate[Batch, P], Reply[T]]:
    def method(self: Batch, /, *args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        call = make(*args, **kwargs)
        return self._add(lambda: call)

    described: Callable[Concatenate[Batch, P], Reply[T]] = describe(method, make, "Reply[{}]")
    return described


def _rounds(make: Callable[P, Program[T]]) -> Callable[Concatenate[Batch, P], Reply[T]]:
    def method(self: Batch, /, *args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        return self._add(partial(make, *args, **kwargs))

    described: Callable[Concatenate[Batch, P], Reply[T]] = describe(method, make, "Reply[{}]")
    return described


class Batch:
    """Collects operations. Each method takes what the client's takes, and gives a `Reply`.

    StoreError, at once, for what could not be sent: a path that is none, a value that is too long.
    """

    __slots__ = ("_made", "_replies")

    def __init__(self) -> None:
        self._made: list[Callable[[], Call[Any] | Program[Any]]] = []
        self._replies: list[Reply[Any]] = []

    def __len__(self) -> int:
        return len(self._made)

    def _add(self, make: Callable[[], Call[T] | Program[T]]) -> Reply[T]:
        reply: Reply[T] = Reply()
        self._made.append(make)
        self._replies.append(reply)
        return reply

    def _requests(self) -> list[Call[Any] | Program[Any]]:
        """To be sent: anew each time, for programs run once."""
        return [make() for make in self._made]

    def _settle(self, outcomes: list[Any]) -> list[Any]:
        for reply, outcome in zip(self._replies, outcomes, strict=True):
            reply.settle(outcome)
        return outcomes

    read = _one(calls.read)
    read_str = _one(calls.read_str)
    write = _one(calls.write)
    mkdir = _one(calls.mkdir)
    rm = _one(calls.rm)
    get_perms = _one(calls.get_perms)
    set_perms = _one(calls.set_perms)
    get = _rounds(calls.get)
    exists = _rounds(calls.exists)
    directory = _rounds(calls.directory)
    gather = _rounds(calls.gather)
    walk = _rounds(calls.walk)
    dump = _rounds(calls.dump)


def own_errors(outcomes: list[Any]) -> list[Any]:
    """`outcomes`, if each error among them is one operation's own."""
    for outcome in outcomes:
        if isinstance(outcome, XenbusError) and not isinstance(outcome, StoreError):
            raise outcome
    return outcomes
