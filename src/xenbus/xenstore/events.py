"""Event paths on their way from one watch to one asyncio iterator.

Knows futures and events; not the client that owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from xenbus.errors import LinkDown
from xenbus.xenstore.session import Event, ResyncEvent

# Different paths that wait in one stream; more of them become one event at its root.
MAX_EVENTS = 1024


class EventStream:
    """For one reader. Equal paths that wait are one; bounded by MAX_EVENTS; ended by `fail`."""

    __slots__ = ("_changed", "_error", "_events", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        # A first event and an equal one after it are two: only the second says that something changed.
        self._events: dict[tuple[Event, bool], None] = {}
        self._changed: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, event: Event) -> None:
        if event.resync:
            self._events.clear()
        elif len(self._events) >= MAX_EVENTS:
            # One of them may have been the news that all is to be looked at again.
            kind = ResyncEvent if any(waiting.resync for waiting, _ in self._events) else Event
            self._events.clear()
            event = kind(self._path)
        self._events.setdefault((event, event.first))
        self._wake()

    def fail(self, exc: Exception) -> None:
        self._error = exc
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def clear(self) -> None:
        self._events.clear()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise LinkDown(f"events of {self._path}: {self._error}") from self._error
            self._changed = asyncio.get_running_loop().create_future()
            try:
                await self._changed
            finally:
                self._changed = None
        key = next(iter(self._events))
        del self._events[key]
        return key[0]
