"""A mirror of a subtree for the blocking client: it is brought up to date when it is asked to, and only then.

Knows the blocking client's link and image.py.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from xenbus.errors import StoreError
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Path
from xenbus.xenstore.image import Change, Image
from xenbus.xenstore.session import Event

if TYPE_CHECKING:
    from xenbus.xenstore.sync import SyncClient, Watch


class SyncMirror(Image):
    """A mapping of paths to values; see `Image` for what it shows when. Made by `SyncClient.mirror`.

    It hears of changes whenever its client reads, and shows them after `update` or `synced`.
    """

    def __init__(self, client: SyncClient, path: Path, limit: int) -> None:
        super().__init__(path, limit)
        self._client = client
        self._watch: Watch | None = None

    def __enter__(self) -> SyncMirror:
        self._watch = watch = self._client.watch(self.root)
        watch.callback = self.hear
        self._client._drop_events(watch)
        self.hear(Event(self.root))
        try:
            self._refresh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._watch is not None
        self._client._unwatch(self._watch, wait=False)

    def update(self, timeout: float = 0.0) -> list[Change]:
        """Takes in what was heard of, waiting up to `timeout` seconds for something; what changed."""
        self._client._wait_events(time.monotonic() + timeout, lambda: self.stale)
        return self._refresh()

    def synced(self) -> list[Change]:
        """Takes in everything that the store had done, for whomever, when this was called; what changed.
        Costs a round trip."""
        with suppress(StoreError):
            self._client._ask(calls.read(self.root))
        return self._refresh()

    def _refresh(self) -> list[Change]:
        """Until all is shown; a subtree that never stands still, for `timeout` seconds at most."""
        until = time.monotonic() + self._client.timeout
        changes: dict[str, Change] = {}
        while self.stale:
            for change in self._client._drive(self.refresh()):
                changes.pop(change.path, None)
                changes[change.path] = change
            if time.monotonic() > until:
                break
        return list(changes.values())
