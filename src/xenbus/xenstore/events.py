"""Event paths on their way from one watch to one asyncio iterator.

Knows futures and paths; neither the session nor the client that owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from xenbus.errors import LinkDown

# Different paths that wait in one stream; more of them become one event at its root.
MAX_EVENTS = 1024


class EventStream:
    """For one reader. Equal paths that wait are one; bounded by MAX_EVENTS; ended by `fail`."""

    __slots__ = ("_changed", "_error", "_path", "_paths")

    def __init__(self, path: str) -> None:
        self._path = path
        self._paths: dict[str, None] = {}
        self._changed: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, path: str) -> None:
        if len(self._paths) >= MAX_EVENTS:
            self._paths.clear()
            path = self._path
        self._paths[path] = None
        self._wake()

    def fail(self, exc: Exception) -> None:
        self._error = exc
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def clear(self) -> None:
        self._paths.clear()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while not self._paths:
            if self._error is not None:
                raise LinkDown(f"events of {self._path}: {self._error}") from self._error
            self._changed = asyncio.get_running_loop().create_future()
            try:
                await self._changed
            finally:
                self._changed = None
        path = next(iter(self._paths))
        del self._paths[path]
        return path
