"""control/shutdown as a guest obeys it (FreeBSD sys/dev/xen/control/control.c; xenstore-paths): feature
nodes, the acknowledgement, one handler a word. Of Xen it knows the store alone; what a word does is
handed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from xenbus.errors import NoEntry, StoreError, XenbusError
from xenbus.newbus.runtime import end_task
from xenbus.xenstore.client import Client, Transaction, Watch

log = logging.getLogger(__name__)

SHUTDOWN = "control/shutdown"
# The words that libxl writes; `halt` is an old name of poweroff.
_SYNONYMS = {"halt": "poweroff"}
_WORD_MAX = 64

Handler = Callable[[], Awaitable[None]]


class ShutdownWatcher:
    """Watches one guest's `control/shutdown`. `await start(store)` again after a restore."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._watch: Watch | None = None
        self._store: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._again = False

    async def start(self, store: Client) -> None:
        """Say what we obey, then watch. A toolstack that made no control directory gets no features."""
        self._store = store
        try:
            for word in self._handlers:
                await store.write(f"control/feature-{word}", "1")
        except StoreError as error:
            log.warning("control: features not announced: %s", error)
        self._watch = await store.watch(SHUTDOWN, self._changed)

    def _changed(self, _path: str) -> None:
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._obey(), name="control/shutdown")

    async def _obey(self) -> None:
        while self._again:
            self._again = False
            try:
                word = await self._take()
                if word:
                    await self._handlers[word]()
            except XenbusError as error:
                log.warning("control/shutdown: %s", error)
            except Exception:
                log.exception("control/shutdown: a handler failed")

    async def _take(self) -> str:
        """The request, acknowledged by emptying the node in the same transaction; "" if there is none."""
        assert self._store is not None

        async def take(tx: Transaction) -> str:
            try:
                raw = await tx.read(SHUTDOWN)
            except NoEntry:
                return ""
            word = raw[:_WORD_MAX].decode("ascii", "replace").strip()
            if word:
                await tx.write(SHUTDOWN, "")
            return word

        word = await self._store.transaction(take)
        word = _SYNONYMS.get(word, word)
        if word and word not in self._handlers:
            log.warning("control/shutdown: %r is nothing that this domain does", word)
            return ""
        return word

    async def stop(self) -> None:
        """Nothing is obeyed from now on; a word that is being obeyed is given up."""
        if self._task is not None and self._task is not asyncio.current_task():
            await end_task(self._task)
        self._task = None
        if self._watch is not None and self._store is not None and not self._store.closed:
            await self._watch.close()
        self._watch = None
