"""A live mirror of a subtree for the asyncio client: reads cost no round trip.

Knows the link and image.py; its task asks what changed as soon as it hears of it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from xenbus.errors import DeadlineError, LinkDown, StoreError, XenbusError
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Path
from xenbus.xenstore.events import MAX_EVENTS, Reader
from xenbus.xenstore.image import Change, Image
from xenbus.xenstore.session import Event

if TYPE_CHECKING:
    from xenbus.xenstore.client import Client, Watch


class Mirror(Image):
    """A mapping of paths to values; see `Image` for what it shows when. Made by `Client.mirror`.

    It goes on over a reconnection (everything is looked at again). Once the link is lost for good, or the
    subtree has grown past the limit, every use is LinkDown.
    """

    def __init__(self, client: Client, path: Path, limit: int) -> None:
        super().__init__(path, limit)
        self._client = client
        self._watch: Watch | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._readers: weakref.WeakSet[Changes] = weakref.WeakSet()

    async def __aenter__(self) -> Mirror:
        self._watch = await self._client.watch(self.root, self._heard)
        self._client._depend(self._watch, self)
        self._task = asyncio.create_task(self._follow(), name=f"mirror of {self.root}")
        try:
            await self.synced()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    async def _close(self) -> None:
        assert self._watch is not None and self._task is not None
        self._client._drop_watch(self._watch)
        self.fail(LinkDown("the mirror was closed here"))
        self._task.cancel()
        await asyncio.wait((self._task,))

    # ---- following ----

    def _heard(self, event: Event) -> None:
        self.hear(event)
        self._wake()

    def fail(self, exc: Exception) -> None:
        if self._error is None:
            self._error = exc
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        for reader in list(self._readers):
            reader.wake()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """LinkDown when the mirror fails."""
        while True:
            self._check()
            if condition():
                return
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)

    async def _follow(self) -> None:
        with suppress(LinkDown):
            while True:
                await self._until(lambda: self.stale)
                seen = self.heard
                try:
                    changes = await self._client._drive(self.refresh())
                except LinkDown:
                    # Connected again, the watch says that all is to be looked at.
                    await self._until(lambda: self.heard > seen)  # noqa: B023
                except DeadlineError:
                    continue  # a store that hangs: what is to be looked at still is
                except XenbusError as exc:
                    self.fail(exc)
                else:
                    for reader in list(self._readers):
                        reader.put(changes)
                    self._wake()

    # ---- use ----

    async def synced(self) -> None:
        """Returns when everything is shown that the store had done, for whomever, when this was called; so a
        value that was written before, over any connection, is there or was replaced by a later one.

        Costs a round trip. DeadlineError after the client's `timeout` seconds. (On /dev/xen/xenbus the
        kernel may hand over a reply before an event that came first: what others wrote may come later.)
        """
        client = self._client
        try:
            async with asyncio.timeout(client.timeout):
                with suppress(StoreError):
                    await client._ask(calls.read(self.root))
                target = max(self.heard, 1)
                await self._until(lambda: self.shown >= target)
        except TimeoutError as exc:
            if isinstance(exc, DeadlineError):
                raise
            raise DeadlineError(f"a mirror of {self.root}", client.peer, client.timeout) from None

    def changes(self) -> Changes:
        """`async for change in mirror.changes()`: what changes from now on, a node at a time, the last state
        of each. LinkDown when the mirror fails."""
        reader = Changes(self)
        self._readers.add(reader)
        return reader


class Changes(Reader):
    """One reader's changes; more than MAX_EVENTS that wait become one that says `resync`."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__()
        self._mirror = mirror
        self._changes: dict[str, Change] = {}

    def put(self, changes: list[Change]) -> None:
        for change in changes:
            if len(self._changes) >= MAX_EVENTS and change.path not in self._changes:
                self._changes.clear()
                root = self._mirror.root
                self._changes[root] = Change(root, None, resync=True)
                return
            self._changes.pop(change.path, None)
            self._changes[change.path] = change

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Change]:
        return self._next()

    async def _next(self) -> Change:
        while not self._changes:
            self._mirror._check()
            await self._sleep()
        return self._changes.pop(next(iter(self._changes)))
