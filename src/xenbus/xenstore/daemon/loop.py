"""The event loop of a daemon with a process of its own: readers run where the selector finds them. asyncio.

asyncio makes an event of each readable descriptor, a queued handle of each event, and runs the handles in its
next step. For a daemon that gets one request a wake-up that is a seventh of all it does; without it, it costs
as much as in uvloop. Knows selectors and loops, nothing of stores; a `Daemon` runs in any loop.
"""

from __future__ import annotations

import asyncio
import os
import select
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

Ts = TypeVarTuple("Ts")
_READ = ~select.EPOLLOUT
_WRITE = ~select.EPOLLIN
# Descriptors that one system call may report.
_BATCH = 64


class DirectSelector(selectors.EpollSelector):
    """`select` calls readers itself, and goes on for as long as nobody else is to be woken.

    readers: by descriptor, who is called when there is something to read
    due:     set by the loop when there is something to do that no descriptor tells of
    failed:  gets what a reader raised
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        super().__init__()
        self.readers: dict[int, Callable[[], object]] = {}
        self.due = False
        self._failed = failed
        # The same epoll instance under a number of its own: EpollSelector keeps its object to itself.
        self._epoll = select.epoll.fromfd(os.dup(self.fileno()))

    def close(self) -> None:
        self._epoll.close()
        super().close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, less what readers were called for. Comes back when the loop has something to do."""
        found: list[tuple[selectors.SelectorKey, int]] = []
        wait = -1 if timeout is None else max(timeout, 0)
        # With a time to keep, or callbacks that wait, one look is all there is time for.
        self.due = timeout is not None
        while True:
            for fd, events in self._epoll.poll(wait, _BATCH):
                # Looked up now: one that ran before it may have ended this one.
                reader = self.readers.get(fd)
                if reader is not None and events & _READ:
                    try:
                        reader()
                    except Exception as exc:  # noqa: BLE001 - as asyncio's handles
                        self._failed(exc)
                    events &= select.EPOLLOUT
                if events and (key := self.get_map().get(fd)) is not None:
                    mask = (events & _READ and selectors.EVENT_READ) | (
                        events & _WRITE and selectors.EVENT_WRITE
                    )
                    found.append((key, key.events & mask))
            if found or self.due:
                return found


class DirectLoop(asyncio.SelectorEventLoop):
    """Its readers are direct, if their descriptor is given as a number."""

    def __init__(self) -> None:
        self._direct = DirectSelector(self._reader_failed)
        super().__init__(self._direct)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        super().add_reader(fd, callback, *args)
        if isinstance(fd, int):
            self._direct.readers[fd] = partial(callback, *args)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        if isinstance(fd, int):
            self._direct.readers.pop(fd, None)
        return super().remove_reader(fd)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._direct.due = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self._direct.due = True
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        self._direct.due = True
        super().stop()

    def _reader_failed(self, exc: Exception) -> None:
        self.call_exception_handler({"message": "a reader failed", "exception": exc})


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` with such a loop."""
    with asyncio.Runner(loop_factory=DirectLoop) as runner:
        runner.run(main)
