"""The asyncio client of a XenStore: every operation, watches, transactions. Thin over link.py.

Knows the loop; neither hypervisor nor ring, nor what the paths mean.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, TypeVar

from xenbus.errors import (
    Conflict,
    DeadlineError,
    LinkDown,
    NoEntry,
    UsageError,
)
from xenbus.xenstore import batch, calls
from xenbus.xenstore.asking import Nodes, one
from xenbus.xenstore.calls import Call, Path, Program
from xenbus.xenstore.events import EventStream
from xenbus.xenstore.image import MIRROR_LIMIT
from xenbus.xenstore.link import Dependent, Link
from xenbus.xenstore.linked import REQUEST_TIMEOUT, dialer
from xenbus.xenstore.mirror import Mirror
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Event, WatchRecord
from xenbus.xenstore.transaction import RETRY, Attempts, Opened, RetryPolicy, commit
from xenbus.xenstore.transport import Busy, Transport
from xenbus.xenstore.wire.message import Op

T = TypeVar("T")
# Seconds.
BUSY_PAUSE = 0.01
# A guest may have 10 at a time (xenstored, quota "transactions").
MAX_TRANSACTIONS = 8


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


class Transaction(Opened["Client"], Nodes):
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ()

    def _submit(self, call: Call[Any]) -> asyncio.Future[bytes]:
        if self.ended:
            raise UsageError(f"transaction {self.id} has ended")
        if self._client._session is not self._session:
            raise LinkDown(f"transaction {self.id} was lost with its connection")
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


class Client(Link, Nodes):
    """One connection. Made by `connect`, inside the loop that it then belongs to.

    timeout: seconds that the store has for a reply; DeadlineError after that. May be changed at any time.
    Every operation raises StoreError (NoEntry, Denied, Conflict) for what the store refused, LinkDown once
    the link is gone, PeerError if the store spoke nonsense.
    """

    def __init__(
        self,
        transport: Transport,
        timeout: float = REQUEST_TIMEOUT,
        max_transactions: int = MAX_TRANSACTIONS,
        **options: Any,
    ) -> None:
        super().__init__(transport, timeout, **options)
        self._slots = asyncio.Semaphore(max_transactions)

    @classmethod
    async def connect(
        cls,
        target: str | os.PathLike[str] | Transport | Callable[[], Transport] | None = None,
        *,
        timeout: float = REQUEST_TIMEOUT,
        max_transactions: int = MAX_TRANSACTIONS,
        max_watches: int | None = None,
        reconnect: Reconnect | None = None,
    ) -> Client:
        """`unix:/path`, a path (of a socket or a device), a transport or a function that makes one; None:
        where libxenstore looks.

        max_watches: of this client; one more is StoreError E2BIG, before the store's own quota is met
        reconnect:   what to do when the link is lost (see `Reconnect`); None: nothing works any more
        LinkDown if nobody is there, or has no room for us within `timeout` seconds.
        """
        dial = dialer(target, lambda scheme: scheme.connect, reconnect)
        until = monotonic() + timeout
        while True:
            try:
                transport = dial()
            except Busy:
                if monotonic() >= until:
                    raise
                await asyncio.sleep(BUSY_PAUSE)
                continue
            return cls(
                transport,
                timeout,
                max_transactions,
                max_watches=max_watches,
                dial=dial,
                reconnect=reconnect,
            )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # ---- several at once ----

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
        token = session.new_token()
        call = calls.watch(path, token, depth)
        session.check_budget(call.path)
        record = Watch(self, call.path, token, callback, depth)
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
        self._dependents.pop(watch.token, None)
        if self._session.watches.pop(watch.token, None) is not None:
            self._session.post(calls.unwatch(watch.path, watch.token))
            self._kick()

    @asynccontextmanager
    async def events(self, path: Path, *, depth: int | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """`async with client.events(p) as events: async for event in events`; an event is its path.

        Equal events that wait are one; past events.MAX_EVENTS different ones they become one event at
        `path`. `event.first` says that nothing changed yet; `event.resync`, after reconnecting, that
        anything may have. Ends with LinkDown.
        """
        async with self._stream(path, depth) as stream:
            yield stream

    @asynccontextmanager
    async def _stream(self, path: Path, depth: int | None = None) -> AsyncIterator[EventStream]:
        stream = EventStream(calls.checked(Op.WATCH, path))
        watch = await self.watch(path, stream.put, depth=depth)
        self._depend(watch, stream)
        try:
            yield stream
        finally:
            self._drop_watch(watch)

    def _depend(self, watch: Watch, dependent: Dependent) -> None:
        self._dependents[watch.token] = dependent
        if self.closed:  # since the watch was set, before we had our turn
            dependent.fail(self._session.dead or LinkDown("closed"))

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
                    try:
                        value = await self.get(path)
                    except LinkDown:
                        if self.closed:
                            raise
                        continue  # a resync event will come
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

    def mirror(self, path: Path, *, limit: int = MIRROR_LIMIT) -> Mirror:
        """`async with client.mirror(p) as mirror`: the node and all below it, kept here; see `Mirror`.

        PeerError past `limit` nodes."""
        return Mirror(self, path, limit)

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
            tx_id = await self._ask(calls.start())
            tx = Transaction(self, self._session, tx_id)
            try:
                result = await function(tx)
            except BaseException as exc:
                tx._abort(exc)
                self._kick()
                raise
            waiter = tx._submit(calls.end(True))
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

    introduce = one(calls.introduce)
    release = one(calls.release)
    is_introduced = one(calls.is_introduced)
    resume_domain = one(calls.resume_domain)
    set_target = one(calls.set_target)
    get_domain_path = one(calls.get_domain_path)
    get_feature = one(calls.get_feature)
    set_feature = one(calls.set_feature)
    quota_names = one(calls.quota_names)
    get_quota = one(calls.get_quota)
    set_quota = one(calls.set_quota)
    control = one(calls.control)

    async def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.forget()
        await self._ask(calls.reset_watches())
