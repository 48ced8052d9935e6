"""A transport around another: what went out is written down, and chosen requests fail or wait.

The store behind it is the real one; a request that is to fail never reaches it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xenbus.xenstore.wire.message import HEADER_SIZE, Message, Op, Parser


@dataclass
class Rule:
    """The next `times` requests of this operation whose payload holds `text`."""

    op: Op
    text: bytes
    times: int
    error: str = ""
    then: Callable[[], Awaitable[Any]] | None = None

    def takes(self, message: Message) -> bool:
        if self.times and message.op == self.op and self.text in message.payload:
            self.times -= 1
            return True
        return False


class Tap:
    """`tap = Tap()`, then `Client.connect(tap.around(transport))`."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._rules: list[Rule] = []
        self._waiting: dict[int, Rule] = {}

    def around(self, inner: Any) -> Tap:
        self._inner = inner
        self._out, self._in = Parser(), Parser()
        return self

    def fail(self, op: Op, text: str, error: str, times: int = 1) -> Rule:
        """Those requests are answered with `error`."""
        self._rules.append(Rule(op, text.encode(), times, error=error))
        return self._rules[-1]

    def after(self, op: Op, text: str, action: Callable[[], Awaitable[Any]], times: int = 1) -> Rule:
        """The answer is held back, with all that follows it, until `action` is done."""
        self._rules.append(Rule(op, text.encode(), times, then=action))
        return self._rules[-1]

    def ops(self, *which: Op) -> list[Message]:
        return [message for message in self.sent if message.op in which]

    def paths(self, *which: Op) -> list[str]:
        return [message.payload.split(b"\0")[0].decode() for message in self.ops(*which)]

    # ---- Transport ----

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, receiver: Any) -> None:
        self._receiver = receiver
        self._held: list[Message] | None = None
        self._inner.start(self)

    def send(self, messages: Sequence[bytes]) -> None:
        passed = []
        for raw in messages:
            [message] = self._out.feed(raw)
            self.sent.append(message)
            rule = next((rule for rule in self._rules if rule.takes(message)), None)
            if rule is not None and rule.error:
                asyncio.get_running_loop().call_soon(self._answer, message, rule.error)
                continue
            if rule is not None:
                self._waiting[message.req_id] = rule
            passed.append(raw)
        if passed:
            self._inner.send(passed)

    def _answer(self, message: Message, error: str) -> None:
        self._deliver(Message(Op.ERROR, message.req_id, message.tx_id, error.encode() + b"\0"))

    # ---- Receiver ----

    def data_received(self, data: bytes | memoryview) -> None:
        for message in self._in.feed(bytes(data)):
            self._deliver(message)

    def _deliver(self, message: Message) -> None:
        if self._held is not None:
            self._held.append(message)
            return
        rule = self._waiting.pop(message.req_id, None) if message.op != Op.WATCH_EVENT else None
        if rule is not None and rule.then is not None:
            self._held = [message]
            task = asyncio.ensure_future(rule.then())
            task.add_done_callback(self._go_on)
            return
        self._receiver.data_received(encoded(message))

    def _go_on(self, task: asyncio.Future[Any]) -> None:
        task.result()
        held, self._held = self._held or [], None
        for message in held:
            if self._held is not None:
                self._held.append(message)
            else:
                self._deliver(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.connection_lost(exc)

    def drained(self) -> None:
        self._receiver.drained()


def encoded(message: Message) -> bytes:
    header = b"".join(
        value.to_bytes(4, "little")
        for value in (int(message.op), message.req_id, message.tx_id, len(message.payload))
    )
    assert len(header) == HEADER_SIZE
    return header + message.payload
