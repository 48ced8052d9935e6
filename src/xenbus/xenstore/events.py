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


class Reader:
    """Waits for something to read; one task at a time."""

    __slots__ = ("_woken",)

    def __init__(self) -> None:
        self._woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let it look again."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _sleep(self) -> None:
        """Until `wake`."""
        self._woken = asyncio.get_running_loop().create_future()
        try:
            await self._woken
        finally:
            self._woken = None


class EventStream(Reader):
    """For one reader. Equal paths that wait are one; bounded by MAX_EVENTS; ended by `fail`."""

    __slots__ = ("_error", "_events", "_path")

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        # A first event and an equal one after it are two: only the second says that something changed.
        self._events: dict[tuple[Event, bool], None] = {}
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
        self.wake()

    def fail(self, exc: Exception) -> None:
        self._error = exc
        self.wake()

    def clear(self) -> None:
        self._events.clear()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise LinkDown(f"events of {self._path}: {self._error}") from self._error
            await self._sleep()
        key = next(iter(self._events))
        del self._events[key]
        return key[0]
