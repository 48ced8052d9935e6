"""The asyncio client's connection: bytes between a transport and the session, and a lost one made again.

Knows the loop, a `Transport` and the session; not what is asked over it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from math import inf
from random import random
from typing import Any, Protocol, TypeVar

from xenbus.errors import LinkDown, PeerError, StoreError, XenbusError
from xenbus.xenstore.asking import Asker
from xenbus.xenstore.calls import Call, Program
from xenbus.xenstore.linked import Linked
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Session
from xenbus.xenstore.transport import Transport

log = logging.getLogger("xenbus.xenstore")
T = TypeVar("T")
Submit = Callable[[Call[Any]], asyncio.Future[bytes]]


class Dependent(Protocol):
    """Who has to hear that no event will come any more."""

    def fail(self, exc: Exception) -> None: ...


class ClosedHere(LinkDown):
    """Our own doing: nobody is told that the link was lost."""


class _Receiver:
    """One transport's reader: what a transport that was given up still says reaches nobody."""

    __slots__ = ("_link", "_session")

    def __init__(self, link: Link, session: Session) -> None:
        self._link = link
        self._session = session

    def data_received(self, data: bytes | memoryview) -> None:
        session = self._session
        if session.dead is not None:
            return
        link = self._link
        try:
            session.receive(data)
        except PeerError as exc:
            link._down(exc)
        if session.out and not link._flushing:
            link._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._session.dead is None:
            self._link._down(exc or LinkDown(f"{self._link.peer} closed the connection"))

    def drained(self) -> None:
        pass


class Link(Linked[Transport], Asker):
    """One connection, or one after the other; `Client` is what people use."""

    def __init__(
        self,
        transport: Transport,
        timeout: float,
        *,
        max_watches: int | None = None,
        dial: Callable[[], Transport] | None = None,
        reconnect: Reconnect | None = None,
    ) -> None:
        session = Session(transport.peer, transport.max_outstanding, max_watches=max_watches)
        super().__init__(session, timeout, dial, reconnect)
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None
        self._flushing = False
        # By the token of the watch that each hears of.
        self._dependents: dict[int, Dependent] = {}
        self._restoring: asyncio.Task[None] | None = None
        transport.start(_Receiver(self, session))

    @property
    def closed(self) -> bool:
        """No request can succeed any more: closed here, or lost and not to be connected again."""
        return self._session.dead is not None and self._restoring is None

    def on_lost(self, callback: Callable[[Exception], None]) -> None:
        """`callback(why)` if the link is lost and not closed here; at once if it is lost for good already.

        With `reconnect`: for each loss, and once more when it is given up (`closed` is true then).
        """
        if not self.closed:
            self._on_lost.append(callback)
        elif not isinstance(self._session.dead, ClosedHere):
            assert self._session.dead is not None
            callback(self._session.dead)

    async def close(self) -> None:
        """Every waiter gets LinkDown. Idempotent."""
        if self.closed:
            return
        self._flush()
        self._on_lost.clear()
        self._on_reconnected.clear()
        self._policy = None
        restoring, self._restoring = self._restoring, None
        if restoring is not None:
            restoring.cancel()
            await asyncio.wait((restoring,))
        self._end(ClosedHere("the connection was closed here"))
        await asyncio.sleep(0)

    # ---- the ends of a connection ----

    def _down(self, exc: Exception) -> None:
        """The connection is gone."""
        if self._session.dead is not None:
            return
        if self._policy is None:
            self._end(exc)
            return
        self._drop(exc, keep_watches=True)
        if self._restoring is None:
            self._restoring = self._loop.create_task(self._restore(self._policy))
            self._tell(self._on_lost, exc)

    def _end(self, exc: Exception) -> None:
        """Nothing will come of it any more."""
        self._drop(exc, keep_watches=False)
        self._session.dead = exc
        for dependent in list(self._dependents.values()):
            dependent.fail(exc)
        callbacks, self._on_lost = self._on_lost, []
        self._tell(callbacks, exc)

    def _drop(self, exc: Exception, keep_watches: bool) -> None:
        self._session.drop_all(exc, keep_watches=keep_watches)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.close()

    # ---- reconnecting ----

    async def _restore(self, policy: Reconnect) -> None:
        try:
            lost = await self._try_again(policy)
        except BaseException as exc:  # a bug, or the loop's end: those who wait hear of it all the same
            lost = LinkDown(f"{self.peer}: reconnecting was ended by {exc!r}")
            raise
        finally:
            self._restoring = None
            if self._policy is not None:  # and not closed here
                if self._session.dead is None:
                    self._tell(self._on_reconnected)
                else:
                    self._end(lost)

    async def _try_again(self, policy: Reconnect) -> Exception:
        """Until it stands or is given up; then, why."""
        began, tried = self._loop.time(), 0
        why: Exception | None = self._session.dead
        while (pause := policy.pause(tried, self._loop.time() - began, random())) is not None:
            await asyncio.sleep(pause)
            tried += 1
            try:
                await self._connect_again()
            except (XenbusError, OSError) as exc:
                why = exc
                log.debug("%s: try %d: %s", self.peer, tried, exc)
            else:
                break
        error = LinkDown(
            f"{self.peer} was not there again within {policy.deadline:g} s ({tried} tries): {why}"
        )
        error.__cause__ = why
        return error

    async def _connect_again(self) -> None:
        """A new transport and session in the place of the old ones, with all watches set again."""
        assert self._dial is not None
        transport = self._dial()
        session = self._session.successor(transport.peer, transport.max_outstanding)
        self._transport, self._session = transport, session
        transport.start(_Receiver(self, session))
        asked = session.watches_again()
        for call, outcome in zip(asked, await self._round(asked, self._submit), strict=True):
            if isinstance(outcome, StoreError):
                dependent = self._dependents.get(session.refused(call, outcome))
                if dependent is not None:
                    dependent.fail(outcome)
            elif isinstance(outcome, XenbusError):
                self._drop(outcome, keep_watches=True)
                raise outcome
        if session.dead is not None:
            raise session.dead

    # ---- requests ----

    def _submit(self, call: Call[Any]) -> asyncio.Future[bytes]:
        """The future of one reply's payload. Requests of one loop turn share a write."""
        loop, timeout = self._loop, self.timeout
        waiter: asyncio.Future[bytes] = loop.create_future()
        deadline = loop.time() + timeout
        session = self._session
        session.submit(call, waiter, deadline, timeout)
        if session.out and not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        timer = self._timer
        if timer is None or timer.when() > deadline:
            self._arm(deadline)
        return waiter

    async def _ask(self, call: Call[T]) -> T:
        """Cancelled between the reply and our turn to see it, what it made is undone."""
        session = self._session
        waiter = self._submit(call)
        try:
            return call.parse(await waiter)
        except asyncio.CancelledError:
            self._disown(session, call, waiter)
            raise

    def _disown(self, session: Session, call: Call[Any], waiter: asyncio.Future[bytes]) -> None:
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            session.disown(call, waiter.result())
            self._kick()

    async def _drive(self, program: Program[T], submit: Submit | None = None) -> T:
        """Asks what `program` asks, round by round, of one connection. Its result."""
        session = self._session
        try:
            asked = next(program)
            while True:
                if self._session is not session:
                    raise LinkDown(f"{self.peer}: the connection was lost meanwhile")
                asked = program.send(await self._round(asked, submit or self._submit))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()
            self._kick()

    async def _round(self, asked: Sequence[Call[Any]], submit: Submit) -> list[Any]:
        session = self._session
        waiters = [submit(call) for call in asked]
        outcomes: list[Any] = []
        try:
            for call, waiter in zip(asked, waiters, strict=True):
                try:
                    outcomes.append(call.parse(await waiter))
                except XenbusError as exc:
                    outcomes.append(exc)
        except BaseException:
            for call, waiter in zip(asked, waiters, strict=True):
                self._disown(session, call, waiter)
                waiter.cancel()
            raise
        return outcomes

    def _kick(self) -> None:
        if self._session.out and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        session = self._session
        if session.out:
            messages, session.out = session.out, []
            self._transport.send(messages)

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline != inf and self._session.dead is None:
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._arm(self._session.expire(self._loop.time()))
