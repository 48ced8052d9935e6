"""What an operator can ask of one attached device (over its domain's control socket): by name, on demand.

A driver that has something to offer defines `operations()`; the domain's runtime finds it by that alone,
so that a driver stays one file. Knows neither sockets nor JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, runtime_checkable


class OperatorCall(Protocol):
    """One request: its parameters by name and type (UsageError if wrong), progress, the caller's life."""

    def text(self, key: str, default: str | None = None) -> str: ...
    def number(self, key: str, default: int | None = None) -> int: ...
    def flag(self, key: str, default: bool = False) -> bool: ...
    async def progress(self, value: object) -> None: ...
    def on_gone(self, action: Callable[[], Awaitable[None]]) -> None:
        """`action` runs when the caller's connection ends: nothing outlives who asked for it."""
        ...


Operation = Callable[[OperatorCall], Awaitable[object]]


@runtime_checkable
class Operable(Protocol):
    """A driver with operations: name -> what it does. Results are data that JSON can hold."""

    def operations(self) -> Mapping[str, Operation]: ...
