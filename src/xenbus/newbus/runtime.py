"""What a device tree needs of asyncio: mailboxes, deadlines that hold against whoever will not end, boot.

The one module of newbus that knows a loop. Knows no Xen.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from xenbus.errors import DeadlineError, XenbusError
from xenbus.newbus.boot import BootHold

log = logging.getLogger("xenbus.newbus")
T = TypeVar("T")
# Seconds that a cancelled callback has to end, before it is left to itself.
CANCEL_GRACE = 1.0
# Callbacks that did not end when cancelled: referenced here so that the loop does not lose them half-way.
_runaways: set[asyncio.Task[Any]] = set()


def runaways() -> int:
    """How many callbacks were cancelled and still run."""
    return len(_runaways)


@runtime_checkable
class Droppable(Protocol):
    """An event that somebody waits for: told when it is forgotten unhandled."""

    def dropped(self) -> None: ...


class Mailbox:
    """Events of one owner, handled in order, one at a time; equal events that wait are one.

    A task exists only while events are pending (an idle task and queue would cost 4.4 KB an owner). What the
    handler raises is logged and loses only that event.
    """

    __slots__ = ("_handler", "_paused", "_pending", "_task", "name")

    def __init__(self, name: str, handler: Callable[[Hashable], Awaitable[None]]) -> None:
        self.name = name
        self._handler = handler
        self._pending: dict[Hashable, None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False

    @property
    def idle(self) -> bool:
        return self._task is None and not self._pending

    def __len__(self) -> int:
        return len(self._pending) if self._pending else 0

    def post(self, event: Hashable) -> None:
        """Never blocks, never grows by an event that waits already."""
        if self._pending is None:
            self._pending = {}
        self._pending[event] = None
        self._start()

    def _start(self) -> None:
        if self._task is None and not self._paused and self._pending:
            self._task = asyncio.get_running_loop().create_task(self._drain(), name=self.name)

    async def _drain(self) -> None:
        try:
            while self._pending and not self._paused:
                event = next(iter(self._pending))
                del self._pending[event]
                try:
                    await self._handler(event)
                except Exception:
                    log.exception("%s: event %r", self.name, event)
        finally:
            if self._task is asyncio.current_task():
                self._task = None
                if not self._pending:
                    self._pending = None

    def pause(self) -> None:
        """Events wait, after the one that is being handled, until `go_on`."""
        self._paused = True

    async def stand_still(self) -> None:
        """Pauses, and waits for the event that is being handled."""
        self.pause()
        if self._task is not None and self._task is not asyncio.current_task():
            await asyncio.wait({self._task})

    def go_on(self) -> None:
        self._paused = False
        self._start()

    def clear(self) -> None:
        """Forgets what waits; what runs goes on."""
        pending, self._pending = self._pending, None
        for event in pending or ():
            if isinstance(event, Droppable):
                event.dropped()

    def cancel(self) -> asyncio.Task[None] | None:
        """Forgets what waits and cancels what runs, which is returned if it is not the caller itself."""
        self.clear()
        task, self._task = self._task, None
        if task is None or task is asyncio.current_task():
            return None
        task.cancel()
        return task


async def within(
    seconds: float,
    coroutine: Coroutine[Any, Any, T],
    what: str,
    owed_by: str,
    excused: Callable[[], float] | None = None,
) -> T:
    """The coroutine's result; DeadlineError once `seconds` are over, and as many as `excused()` says: time
    that it had to wait for us, not we for it. XenbusError for one that ends as cancelled without us.

    Unlike asyncio.timeout it returns even if the coroutine swallows its cancellation: it is then left running
    (see `runaways`), because whoever waits here serves others too.
    """
    task = asyncio.ensure_future(coroutine)
    now = task.get_loop().time
    left, end = seconds, now() + seconds
    try:
        while left > 0:
            done, _ = await asyncio.wait({task}, timeout=left)
            if done:
                if task.cancelled():
                    # By something that it awaited; ours would have come to `wait` first.
                    raise XenbusError(f"{what} ended as cancelled; {owed_by} let a CancelledError pass")
                return task.result()
            left = end + excused() - now() if excused is not None else 0
    except asyncio.CancelledError:
        await end_task(task)
        raise
    await end_task(task)
    if task.done() and not task.cancelled() and task.exception() is None:
        return task.result()
    raise DeadlineError(what, owed_by, seconds)


@contextmanager
def sync_limit(seconds: float, what: str, owed_by: str) -> Iterator[None]:
    """DeadlineError inside synchronous code that does not end (a loop, a blocking call), again every
    `seconds`.

    By SIGALRM, the one thing that reaches code that never returns to the loop. So it needs the main thread
    and nobody else's SIGALRM; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) not in (
        signal.SIG_DFL,
        signal.SIG_IGN,
    ):
        yield
        return
    limited = True

    def too_long(signum: int, frame: object) -> None:
        if limited:
            raise DeadlineError(what, owed_by, seconds)

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        limited = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def end_task(task: asyncio.Task[Any], grace: float | None = None) -> None:
    """Cancels it and waits for its end, but no longer than `grace`. Its exception is taken, not raised."""
    if task.done():
        _ = task.cancelled() or task.exception()
        return
    task.cancel()
    _runaways.add(task)
    task.add_done_callback(_ended)
    await asyncio.wait({task}, timeout=CANCEL_GRACE if grace is None else grace)
    if not task.done():
        log.error("%s did not end when cancelled; it is left running", task.get_name())


def _ended(task: asyncio.Task[Any]) -> None:
    _runaways.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.debug("%s ended with %r", task.get_name(), task.exception())


async def wait_boot(hold: BootHold, timeout: float) -> list[str]:
    """Until nothing holds boot. Returns whose time was over; DeadlineError after `timeout`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    changed = asyncio.Event()
    unsubscribe = hold.subscribe(changed.set)
    try:
        while not hold.clear:
            now = loop.time()
            if now >= end:
                raise DeadlineError("boot to go on", ", ".join(hold.holders), timeout)
            due = min(end, hold.next_expiry() or end)
            try:
                async with asyncio.timeout(max(0.0, due - now)):
                    await changed.wait()
            except TimeoutError:
                pass
            changed.clear()
            hold.expire(loop.time())
    finally:
        unsubscribe()
    return list(hold.late)
