"""An in-process pair of transports: what one end sends, the other receives in the loop's next turn.

Knows no addresses: there is nothing to dial, both ends are made together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from xenbus.errors import LinkDown
from xenbus.xenstore.transport import SOCKET_OUTSTANDING, Receiver


class MemoryTransport:
    """One end. Bytes wait at the receiving end while it is paused; `backlog` of the sender counts them."""

    max_outstanding = SOCKET_OUTSTANDING

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._other: MemoryTransport = self
        self._receiver: Receiver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: list[bytes] = []
        self._end: list[Exception | None] = []
        self._scheduled = False
        self._paused = False
        self._closed = False

    @property
    def backlog(self) -> int:
        return sum(map(len, self._other._inbox))

    def start(self, receiver: Receiver) -> None:
        self._loop = asyncio.get_running_loop()
        self._receiver = receiver
        self._schedule()

    def send(self, messages: Sequence[bytes]) -> None:
        if not self._closed and not self._other._closed:
            self._other._inbox += messages
            self._other._schedule()

    def pause(self, paused: bool) -> None:
        self._paused = paused
        self._schedule()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbox.clear()
            self._finish(None)
            self._other._finish(LinkDown(f"{self._other.peer} closed the connection"))

    def _finish(self, exc: Exception | None) -> None:
        self._end = self._end or [exc]
        self._schedule()

    def _schedule(self) -> None:
        due = self._end or (self._inbox and not self._paused)
        if due and self._loop is not None and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        receiver = self._receiver
        if receiver is None:
            return
        if self._inbox and not self._paused and not self._closed:
            data = b"".join(self._inbox)
            self._inbox.clear()
            receiver.data_received(data)
            if not self._other._closed and self._other._receiver is not None:
                self._other._receiver.drained()
        if self._end and not (self._inbox and not self._closed):
            self._closed = True
            self._receiver = None
            receiver.connection_lost(self._end[0])


def memory_pair(
    client: str = "in-process client", daemon: str = "in-process xenstored"
) -> tuple[MemoryTransport, MemoryTransport]:
    """(the client's end, the daemon's end); the names are what each end calls its peer."""
    near, far = MemoryTransport(daemon), MemoryTransport(client)
    near._other, far._other = far, near
    return near, far
