"""How an operation of calls.py becomes a coroutine method of the asyncio client and of its transactions.

Knows calls and futures; neither session nor transport.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call, Program, describe

P = ParamSpec("P")
T = TypeVar("T")


class Asker(ABC):
    """Whoever can send calls: a client, or one of its transactions."""

    __slots__ = ()

    @abstractmethod
    def _submit(self, call: Call[Any]) -> asyncio.Future[bytes]:
        """The future of the reply's payload, or of its error."""

    @abstractmethod
    async def _drive(self, program: Program[T]) -> T:
        """Asks what `program` asks, round by round. Its result."""


# Bound to a name of a class, an operation is a coroutine function with its own arguments and result.
Method = Callable[Concatenate[Asker, P], Coroutine[Any, Any, T]]


def one(make: Callable[P, Call[T]]) -> Method[P, T]:
    async def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.parse(await self._submit(call))

    described: Method[P, T] = describe(method, make)
    return described


def rounds(make: Callable[P, Program[T]]) -> Method[P, T]:
    async def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._drive(make(*args, **kwargs))

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
