"""The asyncio client of a XenStore: every operation, watches, transactions. Thin over session.py.

Knows the loop and a `Transport`; neither hypervisor nor ring, nor what the paths mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from math import inf
from time import monotonic
from typing import Any, Concatenate, ParamSpec, TypeVar

from xenbus.errors import (
    Conflict,
    DeadlineError,
    LinkDown,
    NoEntry,
    PeerError,
    UsageError,
    XenbusError,
)
from xenbus.xenstore import batch, calls
from xenbus.xenstore.calls import Call, Path, Program, describe
from xenbus.xenstore.events import EventStream
from xenbus.xenstore.session import Event, Session, WatchRecord
from xenbus.xenstore.transaction import RETRY, Attempts, RetryPolicy, Touched, commit
from xenbus.xenstore.transport import Busy, Transport, default_address, resolve
from xenbus.xenstore.wire.message import Op

log = logging.getLogger("xenbus.xenstore")
P = ParamSpec("P")
T = TypeVar("T")
# Seconds.
REQUEST_TIMEOUT = 30.0
BUSY_PAUSE = 0.01
# A guest may have 10 at a time (xenstored, quota "transactions").
MAX_TRANSACTIONS = 8


class Asker:
    """Whoever can send calls: a client, or one of its transactions."""

    __slots__ = ()

    def _submit(self, call: Call[Any]) -> asyncio.Future[bytes]:
        raise NotImplementedError

    async def _drive(self, program: Program[T]) -> T:
        raise NotImplementedError


# Bound to a name of a class, an operation is a coroutine function with its own arguments and result.
Method = Callable[Concatenate[Asker, P], Coroutine[Any, Any, T]]


def _one(make: Callable[P, Call[T]]) -> Method[P, T]:
    async def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.parse(await self._submit(call))

    described: Method[P, T] = describe(method, make)
    return described


def _rounds(make: Callable[P, Program[T]]) -> Method[P, T]:
    async def method(self: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._drive(make(*args, **kwargs))

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
    """A watch that fires until it is closed: `path` and `token` as the store knows them."""

    __slots__ = ("_client",)

    def __init__(
        self, client: Client, path: str, token: int, callback: Callable[[Event], object], depth: int | None
    ) -> None:
        super().__init__(path, token, callback, depth)
        self._client = client

    async def close(self) -> None:
        """No callback from the moment of the call on. Idempotent; quiet on a dead link."""
        await self._client._unwatch(self)


class Transaction(Nodes):
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ("_client", "ended", "id", "touched")

    def __init__(self, client: Client, tx_id: int) -> None:
        self._client = client
        self.id = tx_id
        self.ended = False
        self.touched = Touched()

    def _submit(self, call: Call[Any]) -> asyncio.Future[bytes]:
        if self.ended:
            raise UsageError(f"transaction {self.id} has ended")
        call.tx_id = self.id
        self.touched.add(call)
        return self._client._submit(call)

    async def _drive(self, program: Program[T]) -> T:
        return await self._client._drive(program, self._submit)


class Batch(batch.Batch):
    """Operations that are sent together; made by `Client.batch`."""

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    async def send(self) -> list[Any]:
        """All in one write. What each came to, in order: its result, or its StoreError (so have the
        replies). Raised is what is nobody's own: LinkDown, DeadlineError, PeerError."""
        outcomes = self._settle(await self._client._drive(calls.together(self._requests())))
        return batch.own_errors(outcomes)

    async def commit(self, *, attempts: int | None = None, policy: RetryPolicy = RETRY) -> list[Any]:
        """All in one transaction, in two round trips; again, by `policy`, while it meets a Conflict.
        Their results, in order. If one of them fails nothing is changed, and its error is raised."""
        return self._settle(await self._client._commit(self, attempts, policy))


class Client(Nodes):
    """One connection. Made by `connect`, inside the loop that it then belongs to.

    timeout: seconds that the store has for a reply; DeadlineError after that. May be changed at any time.
    Every operation raises StoreError (NoEntry, Denied, Conflict) for what the store refused, LinkDown once
    the link is gone, PeerError if the store spoke nonsense.
    """

    def __init__(
        self, transport: Transport, timeout: float = REQUEST_TIMEOUT, max_transactions: int = MAX_TRANSACTIONS
    ) -> None:
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._session = Session(transport.peer, transport.max_outstanding)
        self._slots = asyncio.Semaphore(max_transactions)
        self._timer: asyncio.TimerHandle | None = None
        self._flushing = False
        self._streams: set[EventStream] = set()
        self._on_lost: list[Callable[[Exception], None]] = []
        transport.start(self)

    @classmethod
    async def connect(
        cls,
        target: str | os.PathLike[str] | Transport | None = None,
        *,
        timeout: float = REQUEST_TIMEOUT,
        max_transactions: int = MAX_TRANSACTIONS,
    ) -> Client:
        """`unix:/path`, a path (of a socket or a device), or a transport; None: where libxenstore looks.

        LinkDown if nobody is there, or has no room for us within `timeout` seconds.
        """
        if target is not None and not isinstance(target, (str, os.PathLike)):
            return cls(target, timeout, max_transactions)
        scheme, rest = resolve(target or default_address())
        until = monotonic() + timeout
        while True:
            try:
                return cls(scheme.connect(rest), timeout, max_transactions)
            except Busy:
                if monotonic() >= until:
                    raise
            await asyncio.sleep(BUSY_PAUSE)

    @property
    def peer(self) -> str:
        return self._session.peer

    @property
    def closed(self) -> bool:
        """No request can succeed any more: closed here, or lost."""
        return self._session.dead is not None

    def on_lost(self, callback: Callable[[Exception], None]) -> None:
        """`callback(why)` once, if the link is lost and not closed here; at once if it is lost already."""
        if isinstance(self._session.dead, _ClosedHere):
            return
        if self._session.dead is not None:
            callback(self._session.dead)
        else:
            self._on_lost.append(callback)

    def counts(self) -> dict[str, int]:
        """What is held: watches, transactions, waiters, unanswered."""
        return self._session.counts()

    async def close(self) -> None:
        """Every waiter gets LinkDown. Idempotent."""
        if not self.closed:
            self._flush()
            self._on_lost.clear()
            self._down(_ClosedHere("the connection was closed here"))
            await asyncio.sleep(0)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # ---- the transport's side (Receiver) ----

    def data_received(self, data: bytes | memoryview) -> None:
        session = self._session
        if session.dead is not None:
            return
        try:
            session.receive(data)
        except PeerError as exc:
            self._down(exc)
        if session.out and not self._flushing:
            self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._down(exc or LinkDown(f"{self.peer} closed the connection"))

    def drained(self) -> None:
        pass

    def _down(self, exc: Exception) -> None:
        if self._session.dead is not None:
            return
        self._session.drop_all(exc)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.close()
        for stream in self._streams:
            stream.fail(exc)
        callbacks, self._on_lost = self._on_lost, []
        for callback in callbacks:
            try:
                callback(exc)
            except Exception:
                log.exception("a callback for the loss of %s failed", self.peer)

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
        waiter = self._submit(call)
        try:
            return call.parse(await waiter)
        except asyncio.CancelledError:
            self._disown(call, waiter)
            raise

    def _disown(self, call: Call[Any], waiter: asyncio.Future[bytes]) -> None:
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._session.disown(call, waiter.result())
            self._kick()

    async def _drive(
        self, program: Program[T], submit: Callable[[Call[Any]], asyncio.Future[bytes]] | None = None
    ) -> T:
        """Asks what `program` asks, round by round. Its result."""
        try:
            asked = next(program)
            while True:
                asked = program.send(await self._round(asked, submit or self._submit))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()
            self._kick()

    async def _round(
        self, asked: Sequence[Call[Any]], submit: Callable[[Call[Any]], asyncio.Future[bytes]]
    ) -> list[Any]:
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
                self._disown(call, waiter)
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
        if deadline != inf and not self.closed:
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._arm(self._session.expire(self._loop.time()))

    def batch(self) -> Batch:
        """Operations to be sent together, or committed as one transaction."""
        return Batch(self)

    # ---- watches ----

    async def watch(
        self, path: Path, callback: Callable[[Event], object], *, depth: int | None = None
    ) -> Watch:
        """`callback(event)` in the loop, for the first event and every one after it.

        Callbacks run as events arrive, so the first may run before this returns. One that raises is logged.
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
            await self._ask(call)
        except BaseException:
            session.watches.pop(record.token, None)
            raise
        return record

    async def _unwatch(self, watch: Watch) -> None:
        if self._session.watches.pop(watch.token, None) is None:
            return
        try:
            await self._ask(calls.unwatch(watch.path, watch.token))
        except (LinkDown, NoEntry):
            pass

    def _drop_watch(self, watch: Watch) -> None:
        """Not waited for: a store that hangs must not hold up whoever leaves by a deadline."""
        if self._session.watches.pop(watch.token, None) is not None:
            self._session.post(calls.unwatch(watch.path, watch.token))
            self._kick()

    @asynccontextmanager
    async def events(self, path: Path, *, depth: int | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """`async with client.events(p) as paths: async for path in paths`. Equal events that wait are one;
        past events.MAX_EVENTS different ones they become one event at `path`. Ends with LinkDown."""
        async with self._stream(path, depth) as stream:
            yield stream

    @asynccontextmanager
    async def _stream(self, path: Path, depth: int | None = None) -> AsyncIterator[EventStream]:
        stream = EventStream(calls.checked(Op.WATCH, path))
        self._streams.add(stream)
        try:
            watch = await self.watch(path, stream.put, depth=depth)
            try:
                yield stream
            finally:
                self._drop_watch(watch)
        finally:
            self._streams.discard(stream)

    async def wait_for(
        self,
        path: Path,
        predicate: Callable[[bytes | None], bool],
        timeout: float,
        *,
        owed_by: str = "",
    ) -> bytes | None:
        """The node's value (None: missing) once `predicate` holds for it.

        DeadlineError after `timeout` seconds; `owed_by` says in it whose move it was.
        """
        try:
            async with asyncio.timeout(timeout), self._stream(path) as stream:
                async for _ in stream:
                    stream.clear()
                    value = await self.get(path)
                    if predicate(value):
                        return value
        except TimeoutError as exc:
            if isinstance(exc, DeadlineError):
                raise
            where = calls.checked(Op.WATCH, path)
            raise DeadlineError(
                f"a change of {where}", owed_by or f"whoever writes {where}", timeout
            ) from None
        raise LinkDown("events ended")

    # ---- transactions ----

    async def transaction(
        self,
        function: Callable[[Transaction], Awaitable[T]],
        *,
        attempts: int | None = None,
        policy: RetryPolicy = RETRY,
    ) -> T:
        """Runs `function(tx)` and commits; again, by `policy`, while the commit meets a Conflict.

        So `function` may run several times. Conflict when the policy gives up. What `function` raises aborts
        the transaction and is raised (a Conflict: run again); one that never started is not aborted.
        Cancelled or timed out while it commits, it may be committed or not: the store knows.
        """
        runs = Attempts(policy, attempts, self._loop.time)
        while True:
            try:
                return await self._transact(function)
            except Conflict as exc:
                pause = runs.failed(exc)
            await asyncio.sleep(pause)

    async def _transact(self, function: Callable[[Transaction], Awaitable[T]]) -> T:
        await self._take_slot()
        try:
            tx = Transaction(self, await self._ask(calls.start()))
            try:
                result = await function(tx)
            except BaseException as exc:
                tx.ended = True
                self._session.abort(tx.id)
                self._kick()
                if isinstance(exc, Conflict):
                    tx.touched.report(exc)
                raise
            call = calls.end(True)
            call.tx_id = tx.id
            waiter = self._submit(call)
            tx.ended = True
            try:
                await waiter
            except Conflict as exc:
                tx.touched.report(exc)
                raise
            return result
        finally:
            self._slots.release()

    async def _take_slot(self) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            async with asyncio.timeout(self.timeout):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineError("a free transaction", "our own transactions", self.timeout) from None

    async def _commit(self, batch: Batch, attempts: int | None, policy: RetryPolicy) -> list[Any]:
        runs = Attempts(policy, attempts, self._loop.time)
        while True:
            await self._take_slot()
            try:
                return await self._drive(commit(self._session, batch._requests()))
            except Conflict as exc:
                pause = runs.failed(exc)
            finally:
                self._slots.release()
            await asyncio.sleep(pause)

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

    async def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.forget()
        await self._ask(calls.reset_watches())


class _ClosedHere(LinkDown):
    """Our own doing: nobody is told that the link was lost."""
