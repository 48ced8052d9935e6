"""Requests to the broker and their answers: serials, order, deadlines, and the end of the connection.

Knows the wire's frame, not what any operation means: that is broker_client's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xenbus.errors import DeadlineError, HypervisorError, LinkDown, XenbusError
from xenbus.hypervisor import broker_wire as wire
from xenbus.hypervisor.broker_wire import Message, Op, ProtocolError

T = TypeVar("T")

DEADLINE_SECONDS = 30.0
_MESSAGES_PER_WAKE_UP = 64


@dataclass(slots=True)
class _Request(Generic[T]):
    """accept runs in the order of the broker's answers, whether or not anybody still waits; undo then gives
    back what nobody is there to own."""

    what: str
    future: asyncio.Future[T]
    accept: Callable[[Message], T]
    undo: Callable[[T], None] | None
    expires: float | None


class BrokerCall:
    """One connection to the broker.

    event:  called with every message that answers nothing
    ended:  called once when the connection is gone, before the waiters hear of it; True: not by our own close
    """

    def __init__(
        self,
        sock: socket.socket,
        deadline: float,
        event: Callable[[Message], None],
        ended: Callable[[bool], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self.reserve = wire.Reserve(wire.RESERVE)
        self._receiver = wire.Receiver(sock, wire.FDS_MAX, self.reserve)
        self._deadline = deadline
        self._event = event
        self._ended = ended
        self._timer: asyncio.TimerHandle | None = None
        self._serial = 0
        self._requests: dict[int, _Request[Any]] = {}
        self._out: list[tuple[bytes, tuple[int, ...]]] = []
        self.lost: str | None = None
        self._loop.add_reader(sock, self._readable)

    async def request(
        self,
        op: Op,
        payload: bytes,
        accept: Callable[[Message], T],
        what: str,
        *,
        undo: Callable[[T], None] | None = None,
        fds: tuple[int, ...] = (),
        endless: bool = False,
    ) -> T:
        """Takes `fds`. HypervisorError if the broker refuses, DeadlineError (unless endless), LinkDown."""
        future: asyncio.Future[T] = self._loop.create_future()
        expires = None if endless else self._loop.time() + self._deadline
        self._post(_Request(what, future, accept, undo, expires), op, payload, fds)
        try:
            return await future
        except asyncio.CancelledError:
            # Cancelled between the answer and our turn to take it; an answer yet to come is _take's.
            if undo is not None and not future.cancelled() and future.exception() is None:
                undo(future.result())
            raise

    async def give_back(self, op: Op, payload: bytes, accept: Callable[[Message], None]) -> None:
        """A refusal, or a broker that is gone, means that it was given back already (by a resume)."""
        try:
            await self.request(op, payload, accept, op.name)
        except (HypervisorError, LinkDown):
            pass

    def tell(self, op: Op, payload: bytes, accept: Callable[[Message], None]) -> None:
        """give_back without waiting."""
        if self.lost is None:
            future: asyncio.Future[None] = self._loop.create_future()
            future.cancel()
            self._post(_Request(op.name, future, accept, None, None), op, payload, ())

    def _post(self, request: _Request[Any], op: Op, payload: bytes, fds: tuple[int, ...]) -> None:
        if self.lost is not None:
            wire.close_all(fds)
            raise LinkDown(f"{request.what}: {self.lost}")
        self._serial = (self._serial % 0xFFFFFFFF) + 1
        self._requests[self._serial] = request
        if request.expires is not None and self._timer is None:
            self._timer = self._loop.call_at(request.expires, self._expire)
        self._out.append((wire.encode(op, self._serial, payload), fds))
        if len(self._out) == 1:
            self._flush()

    def _flush(self) -> None:
        sent = 0
        try:
            for data, fds in self._out:
                wire.send(self._sock, data, fds)
                wire.close_all(fds)
                sent += 1
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._sock, self._flush)
        except OSError as error:
            del self._out[:sent]
            self._lose(f"the broker is gone: {error}")
            return
        del self._out[:sent]
        if not self._out:
            self._loop.remove_writer(self._sock)

    def _expire(self) -> None:
        """One timer for all requests: they expire in the order they were made. Late answers are undone."""
        self._timer = None
        now = self._loop.time()
        for request in self._requests.values():
            if request.expires is None or request.future.done():
                continue
            if request.expires > now:
                self._timer = self._loop.call_at(request.expires, self._expire)
                return
            request.future.set_exception(DeadlineError(request.what, "the broker", self._deadline))

    def _readable(self) -> None:
        try:
            for _ in range(_MESSAGES_PER_WAKE_UP):
                if self.lost is not None:
                    return
                message = self._receiver.receive()
                if message is None:
                    self._lose("the broker closed the connection")
                    return
                self._take(message)
                self.reserve.fill()
        except (BlockingIOError, InterruptedError):
            pass
        except ProtocolError as error:
            self._lose(f"the broker broke the protocol: {error}")
        except OSError as error:
            self._lose(f"the broker is gone: {error}")

    def _take(self, message: Message) -> None:
        if message.serial == 0:
            self._event(message)
            return
        request = self._requests.pop(message.serial, None)
        if request is None:
            wire.close_all(message.fds)
            raise ProtocolError(f"an answer to {message.serial}, which was not asked")
        future = request.future
        try:
            if message.status:
                raise wire.refused(message.status, request.what)
            result = request.accept(message)
        except XenbusError as error:
            if not future.done():
                future.set_exception(error)
            if isinstance(error, ProtocolError):
                raise
            return
        if not future.done():
            future.set_result(result)
        elif request.undo is not None:
            request.undo(result)

    def _lose(self, why: str) -> None:
        self._shut(why, True)

    def close(self) -> None:
        self._shut("the handle was closed", False)

    def _shut(self, why: str, unasked: bool) -> None:
        if self.lost is not None:
            return
        self.lost = why
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sock.close()
        self.reserve.close()
        for _, fds in self._out:
            wire.close_all(fds)
        self._out.clear()
        self._ended(unasked)
        for request in self._requests.values():
            if not request.future.done():
                request.future.set_exception(LinkDown(f"{request.what}: {why}"))
        self._requests.clear()
