"""How an operation of calls.py becomes a method that waits, of the blocking client and of its transactions.

Knows calls; neither session nor pipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call, Program, describe

P = ParamSpec("P")
T = TypeVar("T")


class Slot:
    """A waiter that a blocking caller looks at."""

    __slots__ = ("_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = False
        self._result = b""
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._done

    def set_result(self, result: bytes, /) -> None:
        self._result, self._done = result, True

    def set_exception(self, exception: Exception, /) -> None:
        self._error, self._done = exception, True

    def result(self) -> bytes:
        if self._error is not None:
            raise self._error
        return self._result


class Asker(ABC):
    """Whoever can send calls: a client, or one of its transactions."""

    __slots__ = ()

    @abstractmethod
    def _submit(self, call: Call[Any]) -> Slot:
        """Where the reply's payload will be, or its error."""

    @abstractmethod
    def _wait(self, slot: Slot) -> bytes:
        """The slot's payload once it is there; raises its error."""

    @abstractmethod
    def _drive(self, program: Program[T]) -> T:
        """Asks what `program` asks, round by round. Its result."""


# Bound to a name of a class, an operation is a method with its own arguments and result.
Method = Callable[Concatenate[Asker, P], T]


def one(make: Callable[P, Call[T]]) -> Method[P, T]:
    def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.parse(self._wait(self._submit(call)))

    described: Method[P, T] = describe(method, make)
    return described


def rounds(make: Callable[P, Program[T]]) -> Method[P, T]:
    def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._drive(make(*args, **kwargs))

    described: Method[P, T] = describe(method, make)
    return described


class Nodes(Asker):
    """What a client and a transaction can both do: see calls.py."""

    __slots__ = ()

    read = one(calls.read)
    read_str = one(calls.read_str)
    write = one(calls.write)
    mkdir = one(calls.mkdir)
    rm = one(calls.rm)
    get_perms = one(calls.get_perms)
    set_perms = one(calls.set_perms)
    get = rounds(calls.get)
    exists = rounds(calls.exists)
    directory = rounds(calls.directory)
    gather = rounds(calls.gather)
    walk = rounds(calls.walk)
    dump = rounds(calls.dump)
