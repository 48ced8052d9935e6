"""The asyncio client of a XenStore: every operation, watches, transactions. Thin over session.py.

Knows the loop and a `Transport`; neither hypervisor nor ring, nor what the paths mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from math import inf
from time import monotonic
from typing import Any, TypeVar

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, PeerError, StoreError, UsageError
from xenbus.xenstore.events import EventStream
from xenbus.xenstore.session import RETRY, Listing, RetryPolicy, Session, WatchRecord, checked
from xenbus.xenstore.transport import Busy, Transport, default_address, resolve
from xenbus.xenstore.wire.codecs import CODECS
from xenbus.xenstore.wire.message import Op
from xenbus.xenstore.wire.paths import join
from xenbus.xenstore.wire.perms import Perm

log = logging.getLogger("xenbus.xenstore")
T = TypeVar("T")
# Seconds.
REQUEST_TIMEOUT = 30.0
BUSY_PAUSE = 0.01
# A guest may have 10 at a time (xenstored, quota "transactions").
MAX_TRANSACTIONS = 8


class Watch(WatchRecord):
    """A watch that fires until it is closed: `path` and `token` as the store knows them."""

    __slots__ = ("_client",)

    def __init__(self, client: Client, path: str, token: int, callback: Callable[[str], None]) -> None:
        super().__init__(path, token, callback)
        self._client = client

    async def close(self) -> None:
        """No callback from the moment of the call on. Idempotent; quiet on a dead link."""
        await self._client._unwatch(self)


class Transaction:
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ("_client", "ended", "id")

    def __init__(self, client: Client, tx_id: int) -> None:
        self._client = client
        self.id = tx_id
        self.ended = False

    def read(self, path: str) -> Coroutine[Any, Any, bytes]:
        return self._client.read(path, self)

    def read_str(self, path: str) -> Coroutine[Any, Any, str]:
        return self._client.read_str(path, self)

    def write(self, path: str, value: bytes | str) -> Coroutine[Any, Any, None]:
        return self._client.write(path, value, self)

    def mkdir(self, path: str) -> Coroutine[Any, Any, None]:
        return self._client.mkdir(path, self)

    def rm(self, path: str) -> Coroutine[Any, Any, None]:
        return self._client.rm(path, self)

    def directory(self, path: str) -> Coroutine[Any, Any, list[str]]:
        return self._client.directory(path, self)

    def exists(self, path: str) -> Coroutine[Any, Any, bool]:
        return self._client.exists(path, self)

    def get_perms(self, path: str) -> Coroutine[Any, Any, list[Perm]]:
        return self._client.get_perms(path, self)

    def set_perms(self, path: str, perms: Iterable[Perm | str]) -> Coroutine[Any, Any, None]:
        return self._client.set_perms(path, perms, self)

    def gather(
        self,
        directory: str,
        wanted: Mapping[str, Callable[[bytes], Any]],
        defaults: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, dict[str, Any]]:
        return self._client.gather(directory, wanted, defaults, self)


class Client:
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

    def _submit(
        self, op: Op, path: str, payload: bytes, tx: Transaction | None = None
    ) -> asyncio.Future[bytes]:
        """The future of one reply's payload. Requests of one loop turn share a write."""
        if tx is not None and tx.ended:
            raise UsageError(f"transaction {tx.id} has ended")
        loop, timeout = self._loop, self.timeout
        waiter: asyncio.Future[bytes] = loop.create_future()
        deadline = loop.time() + timeout
        session = self._session
        session.submit(op, path, payload, tx.id if tx is not None else 0, waiter, deadline, timeout)
        if session.out and not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        timer = self._timer
        if timer is None or timer.when() > deadline:
            self._arm(deadline)
        return waiter

    async def _ask(self, op: Op, path: str, *args: Any, tx: Transaction | None = None) -> Any:
        codec = CODECS[op]
        return codec.parse_reply(await self._submit(op, path, codec.request(*args), tx))

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

    # ---- nodes ----

    async def read(self, path: str, tx: Transaction | None = None) -> bytes:
        """The node's value."""
        return await self._submit(Op.READ, path, checked(Op.READ, path).encode() + b"\0", tx)

    async def read_str(self, path: str, tx: Transaction | None = None) -> str:
        """The value as text: UTF-8, bytes that are none kept as surrogates."""
        return (await self.read(path, tx)).decode("utf-8", "surrogateescape")

    async def write(self, path: str, value: bytes | str, tx: Transaction | None = None) -> None:
        """Makes missing parents, with empty values."""
        await self._ask(Op.WRITE, path, checked(Op.WRITE, path), value, tx=tx)

    async def mkdir(self, path: str, tx: Transaction | None = None) -> None:
        """A node that exists keeps its value."""
        await self._ask(Op.MKDIR, path, checked(Op.MKDIR, path), tx=tx)

    async def rm(self, path: str, tx: Transaction | None = None) -> None:
        """The node and all below it. A missing one is fine, a missing parent is NoEntry."""
        await self._ask(Op.RM, path, checked(Op.RM, path), tx=tx)

    async def directory(self, path: str, tx: Transaction | None = None) -> list[str]:
        """The children's names; a list too long for one reply is fetched in parts, of one generation."""
        try:
            names: list[str] = await self._ask(Op.DIRECTORY, path, checked(Op.DIRECTORY, path), tx=tx)
        except StoreError as exc:
            if exc.name != "E2BIG":
                raise
            return await self._directory_parts(path, tx)
        return names

    async def _directory_parts(self, path: str, tx: Transaction | None) -> list[str]:
        listing, start = Listing(), self._loop.time()
        while not listing.add(await self._ask(Op.DIRECTORY_PART, path, path, listing.offset, tx=tx)):
            if listing.restarts and self._loop.time() - start > self.timeout:
                raise DeadlineError(f"an unchanging list of {path}", self.peer, self.timeout)
        return listing.names()

    async def exists(self, path: str, tx: Transaction | None = None) -> bool:
        """False for NoEntry alone; a node that may not be read is an error."""
        try:
            await self.read(path, tx)
        except NoEntry:
            return False
        return True

    async def get_perms(self, path: str, tx: Transaction | None = None) -> list[Perm]:
        """The owner's entry first."""
        perms: list[Perm] = await self._ask(Op.GET_PERMS, path, checked(Op.GET_PERMS, path), tx=tx)
        return perms

    async def set_perms(self, path: str, perms: Iterable[Perm | str], tx: Transaction | None = None) -> None:
        """Entries as `Perm` or as text (`"n5"`, `"r0"`)."""
        await self._ask(Op.SET_PERMS, path, checked(Op.SET_PERMS, path), perms, tx=tx)

    async def gather(
        self,
        directory: str,
        wanted: Mapping[str, Callable[[bytes], Any]],
        defaults: Mapping[str, Any] | None = None,
        tx: Transaction | None = None,
    ) -> dict[str, Any]:
        """`{name: converter}` read below `directory`, all in one write.

        A missing name is NoEntry unless `defaults` has it; a value that its converter refuses (ValueError)
        is PeerError, naming both.
        """
        paths = [join(directory, name) for name in wanted]
        waiters = [self._submit(Op.READ, path, checked(Op.READ, path).encode() + b"\0", tx) for path in paths]
        replies = await asyncio.gather(*waiters, return_exceptions=True)
        found: dict[str, Any] = {}
        for (name, convert), path, reply in zip(wanted.items(), paths, replies, strict=True):
            if isinstance(reply, NoEntry) and defaults is not None and name in defaults:
                found[name] = defaults[name]
            elif isinstance(reply, BaseException):
                raise reply
            else:
                try:
                    found[name] = convert(reply)
                except ValueError as exc:
                    raise PeerError(f"{path}: {reply!r} is not what belongs there ({exc})") from exc
        return found

    # ---- watches ----

    async def watch(self, path: str, callback: Callable[[str], None], *, depth: int | None = None) -> Watch:
        """`callback(event path)` in the loop, for the first event and every one after it.

        Callbacks run as events arrive, so the first may run before this returns. One that raises is logged.
        depth: 0 the node alone, 1 its children too, ...; the store needs XENSTORE_SERVER_FEATURE_WATCHDEPTH.
        """
        checked(Op.WATCH, path)
        session = self._session
        record = Watch(self, path, session.new_token(), callback)
        waiter = self._submit(Op.WATCH, path, CODECS[Op.WATCH].request(path, str(record.token), depth))
        if session.dead is None:
            session.watches[record.token] = record
        try:
            await waiter
        except BaseException:
            session.watches.pop(record.token, None)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._post(Op.UNWATCH, path, record.token)
            raise
        return record

    async def _unwatch(self, watch: Watch) -> None:
        if self._session.watches.pop(watch.token, None) is None:
            return
        try:
            await self._ask(Op.UNWATCH, watch.path, watch.path, watch.token)
        except (LinkDown, NoEntry):
            pass

    def _post(self, op: Op, *args: object, tx_id: int = 0) -> None:
        self._session.post(op, *args, tx_id=tx_id)
        if self._session.out and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    @asynccontextmanager
    async def events(self, path: str, *, depth: int | None = None) -> AsyncIterator[AsyncIterator[str]]:
        """`async with client.events(p) as paths: async for path in paths`. Equal events that wait are one;
        past events.MAX_EVENTS different ones they become one event at `path`. Ends with LinkDown."""
        async with self._stream(path, depth) as stream:
            yield stream

    @asynccontextmanager
    async def _stream(self, path: str, depth: int | None = None) -> AsyncIterator[EventStream]:
        stream = EventStream(path)
        self._streams.add(stream)
        try:
            watch = await self.watch(path, stream.put, depth=depth)
            try:
                yield stream
            finally:
                # Not waited for: a store that hangs must not hold up whoever leaves by a deadline.
                if self._session.watches.pop(watch.token, None) is not None:
                    self._post(Op.UNWATCH, path, watch.token)
        finally:
            self._streams.discard(stream)

    async def wait_for(
        self,
        path: str,
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
                        value: bytes | None = await self.read(path)
                    except NoEntry:
                        value = None
                    if predicate(value):
                        return value
        except TimeoutError as exc:
            if isinstance(exc, DeadlineError):
                raise
            raise DeadlineError(f"a change of {path}", owed_by or f"whoever writes {path}", timeout) from None
        raise LinkDown(f"events of {path} ended")

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
        start = self._loop.time()
        ended = 0
        while True:
            try:
                return await self._transact(function)
            except Conflict as exc:
                ended += 1
                if attempts is not None and ended >= attempts:
                    raise
                pause = policy.pause(ended, self._loop.time() - start, random.random())
                if pause is None:
                    raise Conflict(exc.name, exc.op, exc.path, exc.tx_id, f"after {ended} attempts") from exc
            await asyncio.sleep(pause)

    async def _transact(self, function: Callable[[Transaction], Awaitable[T]]) -> T:
        await self._take_slot()
        try:
            tx = await self._start()
            try:
                result = await function(tx)
            except BaseException:
                tx.ended = True
                self._post(Op.TRANSACTION_END, False, tx_id=tx.id)
                raise
            waiter = self._submit(Op.TRANSACTION_END, "", CODECS[Op.TRANSACTION_END].request(True), tx)
            tx.ended = True
            await waiter
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

    async def _start(self) -> Transaction:
        codec = CODECS[Op.TRANSACTION_START]
        waiter = self._submit(Op.TRANSACTION_START, "", codec.request())
        try:
            return Transaction(self, codec.parse_reply(await waiter))
        except asyncio.CancelledError:
            # Cancelled between the reply and our turn to see it.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._post(Op.TRANSACTION_END, False, tx_id=codec.parse_reply(waiter.result()))
            raise

    # ---- domains and the store itself (dom0's, but for get_domain_path and get_feature) ----

    async def introduce(self, domid: int, gfn: int, port: int) -> None:
        """The store maps the domain's ring page (its grant 1; `gfn` is ignored by ours) and binds `port`."""
        await self._ask(Op.INTRODUCE, str(domid), domid, gfn, port)

    async def release(self, domid: int) -> None:
        await self._ask(Op.RELEASE, str(domid), domid)

    async def is_introduced(self, domid: int) -> bool:
        known: bool = await self._ask(Op.IS_DOMAIN_INTRODUCED, str(domid), domid)
        return known

    async def resume_domain(self, domid: int) -> None:
        """@releaseDomain will fire for the domain's next shutdown again."""
        await self._ask(Op.RESUME, str(domid), domid)

    async def set_target(self, domid: int, target: int) -> None:
        """`domid` gets `target`'s rights (a device model's)."""
        await self._ask(Op.SET_TARGET, str(domid), domid, target)

    async def get_domain_path(self, domid: int) -> str:
        path: str = await self._ask(Op.GET_DOMAIN_PATH, str(domid), domid)
        return path

    async def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.watches.clear()
        self._session.transactions.clear()
        await self._ask(Op.RESET_WATCHES, "")

    async def get_feature(self, domid: int | None = None) -> int:
        """Bits of XENSTORE_SERVER_FEATURE_*; our own without `domid`."""
        bits: int = await self._ask(Op.GET_FEATURE, "", *([] if domid is None else [domid]))
        return bits

    async def set_feature(self, domid: int, bits: int) -> None:
        """Before the domain is introduced."""
        await self._ask(Op.SET_FEATURE, str(domid), domid, bits)

    async def quota_names(self) -> list[str]:
        names: str = await self._ask(Op.GET_QUOTA, "")
        return names.split()

    async def get_quota(self, name: str, domid: int | None = None) -> int:
        """The global value (the default of new domains) without `domid`."""
        value: str = await self._ask(Op.GET_QUOTA, name, name, domid)
        if not (value.isdecimal() and len(value) <= 20):
            raise PeerError(f"quota {name}: {value!r} is not a number")
        return int(value)

    async def set_quota(self, name: str, value: int, domid: int | None = None) -> None:
        await self._ask(Op.SET_QUOTA, name, name, value, domid)

    async def control(self, *words: str) -> str:
        """A command for the daemon, its answer as text."""
        answer: str = await self._ask(Op.CONTROL, words[0] if words else "", *words)
        return answer


class _ClosedHere(LinkDown):
    """Our own doing: nobody is told that the link was lost."""
