"""`replay:FILE`: a recording in the daemon's place. The client must ask what it asked then, in that order.

Knows recordings and the message's frame; there is no store behind it.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence

from xenbus.errors import LinkDown, PeerError, UsageError
from xenbus.xenstore.transport import SOCKET_OUTSTANDING, Receiver, register
from xenbus.xenstore.transport.recording import Record, read_recording
from xenbus.xenstore.wire.message import Message, Parser, encode


class ReplayTransport:
    """Answers each request as the recording has it; request ids may differ, they are translated."""

    max_outstanding = SOCKET_OUTSTANDING
    backlog = 0

    def __init__(self, records: Sequence[Record], peer: str = "a recording") -> None:
        self.peer = peer
        self._left = deque(records)
        self._ids: dict[int, int] = {}
        self._parser = Parser()
        self._receiver: Receiver | None = None
        self._closed = False

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        asyncio.get_running_loop().call_soon(self._answer)

    def send(self, messages: Sequence[bytes]) -> None:
        loop = asyncio.get_running_loop()
        for data in messages:
            for message in self._parser.feed(data):
                if not self._asked(message):
                    return
        loop.call_soon(self._answer)

    def _asked(self, message: Message) -> bool:
        """Whether this is what the recording has next from the client: answers due before it come first."""
        expected = next((record.message for record in self._left if record.outgoing), None)
        if expected is None:
            self._lost(LinkDown(f"{self.peer} ends before {message}"))
            return False
        if (message.op, message.tx_id, message.payload) != (expected.op, expected.tx_id, expected.payload):
            self._lost(PeerError(f"{self.peer} has {expected}, not {message}"))
            return False
        self._ids[expected.req_id] = message.req_id
        for index, record in enumerate(self._left):
            if record.outgoing:
                del self._left[index]
                break
        return True

    def _answer(self) -> None:
        """Everything from the store up to the next request that was not made yet."""
        replies = []
        while self._left and not self._left[0].outgoing:
            message = self._left.popleft().message
            req_id = self._ids.pop(message.req_id, message.req_id)
            replies.append(encode(message.op, req_id, message.tx_id, message.payload))
        if replies and self._receiver is not None and not self._closed:
            self._receiver.data_received(b"".join(replies))

    def pause(self, paused: bool) -> None:
        """A recording answers only when asked: there is nothing to hold back."""

    def close(self) -> None:
        self._lost(None)

    def _lost(self, exc: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            if self._receiver is not None:
                asyncio.get_running_loop().call_soon(self._receiver.connection_lost, exc)


def replay(path: str | os.PathLike[str]) -> ReplayTransport:
    """UsageError for a file that is no recording, or one of several connections."""
    records = list(read_recording(path))
    if len({record.connection for record in records}) > 1:
        raise UsageError(
            f"{os.fspath(path)} has several connections: it can be decoded, and replayed to a store"
        )
    return ReplayTransport(records, f"the recording {os.fspath(path)}")


register("replay", replay)
