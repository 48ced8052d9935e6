"""The blocking client's connection: bytes between a pipe and the session, and a lost one made again.

Knows a `Pipe`, the session and the clock; not what is asked over it. Nothing happens between calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from math import inf
from random import random
from typing import Any, TypeVar

from xenbus.errors import LinkDown, PeerError, StoreError, UsageError, XenbusError
from xenbus.xenstore.batch import Reply
from xenbus.xenstore.calls import Call, Program
from xenbus.xenstore.linked import Linked
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Session
from xenbus.xenstore.transport import Pipe, Pollable
from xenbus.xenstore.waiting import Asker, Slot

log = logging.getLogger("xenbus.xenstore")
T = TypeVar("T")
Submit = Callable[[Call[Any]], Slot]


class _Told:
    """The waiter of a request that nobody waits for in a call: `process` tells."""

    __slots__ = ("_call", "_callback", "_reply")

    def __init__(self, call: Call[Any], reply: Reply[Any], callback: Callable[[Any], object] | None) -> None:
        self._call = call
        self._reply = reply
        self._callback = callback

    def done(self) -> bool:
        return self._reply.done

    def set_result(self, result: bytes, /) -> None:
        try:
            self._settle(self._call.parse(result))
        except XenbusError as exc:
            self._settle(exc)

    def set_exception(self, exception: Exception, /) -> None:
        self._settle(exception)

    def _settle(self, outcome: Any) -> None:
        self._reply.settle(outcome)
        if self._callback is not None:
            try:
                self._callback(self._reply)
            except Exception:
                log.exception("the callback for %s failed", self._call.path)


class PipeLink(Linked[Pipe], Asker):
    """One connection, or one after the other; `SyncClient` is what people use."""

    def __init__(
        self,
        pipe: Pipe,
        timeout: float,
        *,
        max_watches: int | None = None,
        dial: Callable[[], Pipe] | None = None,
        reconnect: Reconnect | None = None,
    ) -> None:
        session = Session(pipe.peer, pipe.max_outstanding, max_watches=max_watches)
        super().__init__(session, timeout, dial, reconnect)
        self._pipe = pipe
        # What the other side had no room for (`process` does not wait for it).
        self._rest = b""
        self._lost_at = 0.0
        self._tried = 0
        self._restoring = False

    @property
    def closed(self) -> bool:
        """No request can succeed any more: closed here, or lost and not to be connected again."""
        return self._session.dead is not None and self._policy is None

    def on_lost(self, callback: Callable[[Exception], None]) -> None:
        """`callback(why)` when a call finds that the link is lost; with `reconnect`, once more when it is
        given up (`closed` is true then)."""
        self._on_lost.append(callback)

    def close(self) -> None:
        """Idempotent."""
        self._policy = None
        self._on_lost.clear()
        self._down(LinkDown("the connection was closed here"))
        self._session.watches.clear()

    def _down(self, exc: Exception) -> None:
        if self._session.dead is not None:
            return
        self._session.drop_all(exc, keep_watches=self._policy is not None)
        self._rest = b""
        self._pipe.close()
        if not self._restoring:
            self._lost_at, self._tried = time.monotonic(), 0
            self._tell(self._on_lost, exc)

    # ---- reconnecting ----

    def _ready(self) -> None:
        """Before anything that has to be of one connection."""
        if self._session.dead is not None:
            self._restore()

    def _restore(self, until: float = inf) -> None:
        """The link stands again after this; LinkDown if it does not by `until`, or in the time that a request
        may take."""
        policy = self._policy
        if policy is None or self._restoring:
            return
        until = min(until, time.monotonic() + self.timeout)
        why: Exception | None = self._session.dead
        self._restoring = True
        try:
            while self._session.dead is not None:
                pause = policy.pause(self._tried, time.monotonic() - self._lost_at, random())
                if pause is None:
                    raise self._given_up(policy, why)
                if time.monotonic() + pause > until:
                    raise LinkDown(f"{self.peer} is not there again yet: {why}") from why
                time.sleep(pause)
                self._tried += 1
                try:
                    self._connect_again()
                except (XenbusError, OSError) as exc:
                    why = exc
        finally:
            self._restoring = False
        self._tell(self._on_reconnected)

    def _given_up(self, policy: Reconnect, why: Exception | None) -> LinkDown:
        self._policy = None
        self._session.watches.clear()
        error = LinkDown(f"{self.peer} was not there again within {policy.deadline:g} s: {why}")
        error.__cause__ = self._session.dead = why or error
        self._tell(self._on_lost, error)
        return error

    def _connect_again(self) -> None:
        """A new pipe and session in the place of the old ones, with all watches set again."""
        assert self._dial is not None
        pipe = self._dial()
        session = self._session.successor(pipe.peer, pipe.max_outstanding)
        self._pipe, self._session = pipe, session
        asked = session.watches_again()
        for call, outcome in zip(asked, self._round(asked, self._submit), strict=True):
            if isinstance(outcome, StoreError):
                session.refused(call, outcome)
            elif isinstance(outcome, XenbusError):
                self._down(outcome)
                raise outcome

    # ---- requests ----

    def _submit(self, call: Call[Any]) -> Slot:
        slot = Slot()
        timeout = self.timeout
        if self._session.dead is not None:
            self._restore()
        self._session.submit(call, slot, time.monotonic() + timeout, timeout)
        return slot

    def _wait(self, slot: Slot) -> bytes:
        """The slot's payload, or its error. Whatever interrupts us leaves the session right: the reply
        that comes too late is dropped, and what it would have made is undone."""
        timeout = self.timeout
        until = 0.0
        try:
            while True:
                self._flush()
                if slot._done:
                    return slot.result()
                if until:
                    timeout = until - time.monotonic()
                    if timeout <= 0:
                        # Events may have kept us busy all the time.
                        self._session.expire(time.monotonic())
                        continue
                else:
                    # Only the first wait gets the round number, so that the pipe need not set its own again.
                    until = time.monotonic() + timeout
                self._receive(timeout)
        except BaseException:
            if not slot._done:
                slot.set_exception(LinkDown("nobody waits any more"))
            raise

    def _ask(self, call: Call[T]) -> T:
        return call.parse(self._wait(self._submit(call)))

    def _drive(self, program: Program[T], submit: Submit | None = None) -> T:
        """Asks what `program` asks, round by round, of one connection. Its result."""
        self._ready()
        session = self._session
        try:
            asked = next(program)
            while True:
                if self._policy is not None and session.dead is not None:
                    # The next request would connect again, and be asked of another connection.
                    raise LinkDown(f"{self.peer}: {session.dead}") from session.dead
                asked = program.send(self._round(asked, submit or self._submit))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()
            self._flush()

    def _round(self, asked: Sequence[Call[Any]], submit: Submit) -> list[Any]:
        session = self._session
        slots = [submit(call) for call in asked]
        outcomes: list[Any] = []
        try:
            for call, slot in zip(asked, slots, strict=True):
                try:
                    outcomes.append(call.parse(self._wait(slot)))
                except XenbusError as exc:
                    outcomes.append(exc)
        except BaseException:
            for call, slot in zip(asked, slots, strict=True):
                if not slot._done:
                    slot.set_exception(LinkDown("nobody waits any more"))
                elif slot._error is None:
                    session.disown(call, slot._result)
            raise
        return outcomes

    def _flush(self) -> None:
        session = self._session
        if not session.out and not self._rest:
            return
        messages, session.out = session.out, []
        if self._rest:
            messages.insert(0, self._rest)
            self._rest = b""
        try:
            self._pipe.send(messages, self.timeout)
        except (OSError, LinkDown) as exc:
            self._down(exc)
        except BaseException:
            # Half a message may be out: nothing that follows would be understood.
            self._down(LinkDown("interrupted while sending"))
            raise

    def _receive(self, timeout: float) -> bool:
        """Takes what comes within `timeout` seconds. False if nothing did; then overdue waiters fail."""
        session = self._session
        try:
            data = self._pipe.receive(max(timeout, 1e-6))
        except TimeoutError:
            session.expire(time.monotonic())
            return False
        except (OSError, LinkDown) as exc:
            self._down(exc)
            return False
        return self._taken(data)

    def _taken(self, data: bytes) -> bool:
        if not data:
            self._down(LinkDown(f"{self.peer} closed the connection"))
            return False
        try:
            self._session.receive(data)
        except PeerError as exc:
            self._down(exc)
            raise
        return True

    # ---- other people's loops ----

    def _pollable(self) -> Pollable:
        if not isinstance(self._pipe, Pollable):
            raise UsageError(f"{self.peer}: this transport has no descriptor to wait for")
        return self._pipe

    def fileno(self) -> int:
        """The descriptor that is readable when `process` has something to do. It is another one after
        reconnecting. UsageError for a transport without one."""
        return self._pollable().fileno()

    @property
    def wants_write(self) -> bool:
        """Whether `process` is also to be called when the descriptor is writable."""
        return bool(self._rest or self._session.out)

    def submit(self, call: Call[T], callback: Callable[[Reply[T]], object] | None = None) -> Reply[T]:
        """`call` (of calls.py) is sent by the next `process`, or by any call that waits; then the reply is
        settled and `callback(reply)` called. Each has `timeout` seconds."""
        reply: Reply[T] = Reply()
        self._ready()
        until = time.monotonic() + self.timeout
        self._session.submit(call, _Told(call, reply, callback), until, self.timeout)
        return reply

    def _process(self) -> float:
        """Sends and takes what can be sent and taken without waiting; what came is told. When the next
        deadline is, seconds from now (inf: none). LinkDown."""
        self._ready()
        pipe, session = self._pollable(), self._session
        try:
            while session.dead is None:
                if session.out or self._rest:
                    messages, session.out = session.out, []
                    self._rest = pipe.offer([self._rest, *messages] if self._rest else messages)
                if (data := pipe.take()) is None:
                    break
                self._taken(data)
        except (OSError, LinkDown) as exc:
            self._down(exc)
        if session.dead is not None:
            raise LinkDown(f"{self.peer}: {session.dead}") from session.dead
        now = time.monotonic()
        return session.expire(now) - now
