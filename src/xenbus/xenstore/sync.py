"""The blocking client of a XenStore: the same operations as client.py, one send and one receive each.

Knows a `Pipe` and the session; no event loop, no threads of its own. Not for use by two threads at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, PeerError, UsageError, XenbusError
from xenbus.xenstore import batch, calls
from xenbus.xenstore.calls import Call, Path, Program, describe
from xenbus.xenstore.session import Event, Session, WatchRecord
from xenbus.xenstore.transaction import RETRY, Attempts, RetryPolicy, Touched, commit
from xenbus.xenstore.transport import Pipe, default_address, resolve

P = ParamSpec("P")
T = TypeVar("T")
REQUEST_TIMEOUT = 30.0
# Different events that wait for `poll_watch`; past that, each watch has one, at its own path.
MAX_EVENTS = 4096


class _Slot:
    """A waiter that a blocking caller looks at."""

    __slots__ = ("_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = False
        self._result = b""
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._done

    def set_result(self, result: bytes, /) -> None:
        self._result, self._done = result, True

    def set_exception(self, exception: Exception, /) -> None:
        self._error, self._done = exception, True

    def result(self) -> bytes:
        if self._error is not None:
            raise self._error
        return self._result


class Asker:
    """Whoever can send calls: a client, or one of its transactions."""

    __slots__ = ()

    def _submit(self, call: Call[Any]) -> _Slot:
        raise NotImplementedError

    def _wait(self, slot: _Slot) -> bytes:
        raise NotImplementedError

    def _drive(self, program: Program[T]) -> T:
        raise NotImplementedError


# Bound to a name of a class, an operation is a method with its own arguments and result.
Method = Callable[Concatenate[Asker, P], T]


def _one(make: Callable[P, Call[T]]) -> Method[P, T]:
    def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.parse(self._wait(self._submit(call)))

    described: Method[P, T] = describe(method, make)
    return described


def _rounds(make: Callable[P, Program[T]]) -> Method[P, T]:
    def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._drive(make(*args, **kwargs))

    described: Method[P, T] = describe(method, make)
    return described


class Nodes(Asker):
    """What a client and a transaction can both do: see calls.py."""

    __slots__ = ()

    read = _one(calls.read)
    read_str = _one(calls.read_str)
    write = _one(calls.write)
    mkdir = _one(calls.mkdir)
    rm = _one(calls.rm)
    get_perms = _one(calls.get_perms)
    set_perms = _one(calls.set_perms)
    get = _rounds(calls.get)
    exists = _rounds(calls.exists)
    directory = _rounds(calls.directory)
    gather = _rounds(calls.gather)
    walk = _rounds(calls.walk)
    dump = _rounds(calls.dump)


class Watch(WatchRecord):
    """A watch until it is closed. Its events wait in the client; `poll_watch` hands them out."""

    __slots__ = ("_client", "handler")

    def __init__(
        self,
        client: SyncClient,
        path: str,
        token: int,
        handler: Callable[[Event], object] | None,
        depth: int | None,
    ) -> None:
        super().__init__(path, token, self._fired, depth)
        self._client = client
        self.handler = handler

    def _fired(self, event: Event) -> None:
        self._client._put(self, event)

    def close(self) -> None:
        """Idempotent; quiet on a dead link. Its events that wait are dropped."""
        self._client._unwatch(self)


class Transaction(Nodes):
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ("_client", "ended", "id", "touched")

    def __init__(self, client: SyncClient, tx_id: int) -> None:
        self._client = client
        self.id = tx_id
        self.ended = False
        self.touched = Touched()

    def _submit(self, call: Call[Any]) -> _Slot:
        if self.ended:
            raise UsageError(f"transaction {self.id} has ended")
        call.tx_id = self.id
        self.touched.add(call)
        return self._client._submit(call)

    def _wait(self, slot: _Slot) -> bytes:
        return self._client._wait(slot)

    def _drive(self, program: Program[T]) -> T:
        return self._client._drive(program, self._submit)


class Batch(batch.Batch):
    """Operations that are sent together; made by `SyncClient.batch`."""

    __slots__ = ("_client",)

    def __init__(self, client: SyncClient) -> None:
        super().__init__()
        self._client = client

    def send(self) -> list[Any]:
        """All in one write. What each came to, in order: its result, or its StoreError (so have the
        replies). Raised is what is nobody's own: LinkDown, DeadlineError, PeerError."""
        return batch.own_errors(self._settle(self._client._drive(calls.together(self._requests()))))

    def commit(self, *, attempts: int | None = None, policy: RetryPolicy = RETRY) -> list[Any]:
        """All in one transaction, in two round trips; again, by `policy`, while it meets a Conflict.
        Their results, in order. If one of them fails nothing is changed, and its error is raised."""
        return self._settle(self._client._commit(self, attempts, policy))


class SyncClient(Nodes):
    """One connection, blocking. Errors and names as in `client.Client`.

    timeout: seconds that the store has for a reply; DeadlineError after that.
    """

    def __init__(self, pipe: Pipe, timeout: float = REQUEST_TIMEOUT) -> None:
        self.timeout = timeout
        self._pipe = pipe
        self._session = Session(pipe.peer, pipe.max_outstanding)
        # Keys: (watch, event); a dict, for the order and so that equal events are one.
        self._events: dict[tuple[Watch, Event], None] = {}

    @classmethod
    def connect(
        cls, target: str | os.PathLike[str] | Pipe | None = None, *, timeout: float = REQUEST_TIMEOUT
    ) -> SyncClient:
        """`unix:/path`, a path (of a socket or a device), or a pipe; None: where libxenstore looks.

        LinkDown if nobody is there. UsageError for an address that only an event loop can drive.
        """
        if target is not None and not isinstance(target, (str, os.PathLike)):
            return cls(target, timeout)
        scheme, rest = resolve(target or default_address())
        if scheme.blocking is None:
            raise UsageError(f"{scheme.name}: needs an event loop; use xenbus.xenstore.client")
        return cls(scheme.blocking(rest), timeout)

    @property
    def peer(self) -> str:
        return self._session.peer

    @property
    def closed(self) -> bool:
        return self._session.dead is not None

    def counts(self) -> dict[str, int]:
        """What is held: watches, transactions, waiters, unanswered."""
        return self._session.counts()

    def close(self) -> None:
        """Idempotent."""
        self._down(LinkDown("the connection was closed here"))

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- requests ----

    def _submit(self, call: Call[Any]) -> _Slot:
        slot = _Slot()
        timeout = self.timeout
        self._session.submit(call, slot, time.monotonic() + timeout, timeout)
        return slot

    def _wait(self, slot: _Slot) -> bytes:
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

    def _drive(self, program: Program[T], submit: Callable[[Call[Any]], _Slot] | None = None) -> T:
        """Asks what `program` asks, round by round. Its result."""
        try:
            asked = next(program)
            while True:
                asked = program.send(self._round(asked, submit or self._submit))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()
            self._flush()

    def _round(self, asked: Sequence[Call[Any]], submit: Callable[[Call[Any]], _Slot]) -> list[Any]:
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
                    self._session.disown(call, slot._result)
            raise
        return outcomes

    def _flush(self) -> None:
        session = self._session
        if not session.out:
            return
        messages, session.out = session.out, []
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
        if not data:
            self._down(LinkDown(f"{self.peer} closed the connection"))
            return False
        try:
            session.receive(data)
        except PeerError as exc:
            self._down(exc)
            raise
        return True

    def _down(self, exc: Exception) -> None:
        if self._session.dead is None:
            self._session.drop_all(exc)
            self._pipe.close()

    def batch(self) -> Batch:
        """Operations to be sent together, or committed as one transaction."""
        return Batch(self)

    # ---- watches ----

    def watch(
        self, path: Path, callback: Callable[[Event], object] | None = None, *, depth: int | None = None
    ) -> Watch:
        """Events, the first one included, wait until `poll_watch`; that calls `callback(event)`.

        depth: 0 the node alone, 1 its children too, ...; the store needs XENSTORE_SERVER_FEATURE_WATCHDEPTH.
        StoreError E2BIG past `max_watches`, or the domain's own quota of watches.
        """
        session = self._session
        call = calls.watch(path, session.new_token(), depth)
        session.check_budget(call.path)
        record = Watch(self, call.path, session._last_token, callback, depth)
        if session.dead is None:
            session.watches[record.token] = record
        try:
            self._ask(call)
        except BaseException:
            session.watches.pop(record.token, None)
            self._drop_events(record)
            raise
        return record

    def poll_watch(self, timeout: float) -> tuple[Watch, Event] | None:
        """The next event, (its watch, itself); None if none came within `timeout` seconds. LinkDown."""
        if not self._wait_events(time.monotonic() + timeout, lambda: bool(self._events)):
            return None
        watch, event = next(iter(self._events))
        del self._events[watch, event]
        if watch.handler is not None:
            watch.handler(event)
        return watch, event

    def _wait_events(self, until: float, ready: Callable[[], bool]) -> bool:
        while not ready():
            self._flush()
            if self._session.dead is not None:
                raise LinkDown(f"events: {self._session.dead}") from self._session.dead
            left = until - time.monotonic()
            if not self._receive(left) and left <= 0:
                return False
        return True

    def _put(self, watch: Watch, event: Event) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._events = {(one, Event(one.path)): None for one, _ in self._events}
            event = Event(watch.path)
        self._events.setdefault((watch, event))

    def _drop_events(self, watch: Watch) -> None:
        self._events = {key: None for key in self._events if key[0] is not watch}

    def _unwatch(self, watch: Watch, wait: bool = True) -> None:
        if self._session.watches.pop(watch.token, None) is None:
            return
        self._drop_events(watch)
        if not wait:
            self._session.post(calls.unwatch(watch.path, watch.token))
            self._flush()
            return
        try:
            self._ask(calls.unwatch(watch.path, watch.token))
        except (LinkDown, NoEntry):
            pass

    def wait_for(
        self, path: Path, predicate: Callable[[bytes | None], bool], timeout: float, *, owed_by: str = ""
    ) -> bytes | None:
        """The node's value (None: missing) once `predicate` holds for it. Events of other watches wait.

        DeadlineError after `timeout` seconds; `owed_by` says in it whose move it was.
        """
        until, usual = time.monotonic() + timeout, self.timeout
        fired: list[str] = []
        watch: Watch | None = None
        try:
            self.timeout = min(usual, timeout)
            watch = self.watch(path)
            watch.callback = fired.append
            while True:
                fired.clear()
                self.timeout = max(0.001, min(usual, until - time.monotonic()))
                value = self.get(path)
                if predicate(value):
                    return value
                if not self._wait_events(until, lambda: bool(fired)):
                    who = owed_by or f"whoever writes {watch.path}"
                    raise DeadlineError(f"a change of {watch.path}", who, timeout)
        finally:
            self.timeout = usual
            if watch is not None:
                self._unwatch(watch, wait=False)

    # ---- transactions ----

    def transaction(
        self,
        function: Callable[[Transaction], T],
        *,
        attempts: int | None = None,
        policy: RetryPolicy = RETRY,
    ) -> T:
        """Runs `function(tx)` and commits; again, by `policy`, while the commit meets a Conflict.

        So `function` may run several times. Conflict when the policy gives up. What `function` raises aborts
        the transaction and is raised; a transaction that never started is not aborted.
        """
        runs = Attempts(policy, attempts, time.monotonic)
        while True:
            try:
                return self._transact(function)
            except Conflict as exc:
                pause = runs.failed(exc)
            time.sleep(pause)

    def _transact(self, function: Callable[[Transaction], T]) -> T:
        tx = Transaction(self, self._ask(calls.start()))
        try:
            result = function(tx)
        except BaseException as exc:
            tx.ended = True
            self._session.abort(tx.id)
            self._flush()
            if isinstance(exc, Conflict):
                tx.touched.report(exc)
            raise
        call = calls.end(True)
        call.tx_id = tx.id
        slot = self._submit(call)
        tx.ended = True
        try:
            self._wait(slot)
        except Conflict as exc:
            tx.touched.report(exc)
            raise
        return result

    def _commit(self, batch: Batch, attempts: int | None, policy: RetryPolicy) -> list[Any]:
        runs = Attempts(policy, attempts, time.monotonic)
        while True:
            try:
                return self._drive(commit(self._session, batch._requests()))
            except Conflict as exc:
                pause = runs.failed(exc)
            time.sleep(pause)

    # ---- domains and the store itself ----

    introduce = _one(calls.introduce)
    release = _one(calls.release)
    is_introduced = _one(calls.is_introduced)
    resume_domain = _one(calls.resume_domain)
    set_target = _one(calls.set_target)
    get_domain_path = _one(calls.get_domain_path)
    get_feature = _one(calls.get_feature)
    set_feature = _one(calls.set_feature)
    quota_names = _one(calls.quota_names)
    get_quota = _one(calls.get_quota)
    set_quota = _one(calls.set_quota)
    control = _one(calls.control)

    def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.forget()
        self._ask(calls.reset_watches())
