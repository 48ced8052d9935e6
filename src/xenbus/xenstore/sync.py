"""The blocking client of a XenStore: the same operations as client.py, one send and one receive each.

Knows a `Pipe` and the session; no event loop, no threads of its own. Not for use by two threads at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, PeerError, StoreError, UsageError
from xenbus.xenstore.session import RETRY, Listing, RetryPolicy, Session, WatchRecord, checked
from xenbus.xenstore.transport import Pipe, default_address, resolve
from xenbus.xenstore.wire.codecs import CODECS
from xenbus.xenstore.wire.message import Op
from xenbus.xenstore.wire.paths import join
from xenbus.xenstore.wire.perms import Perm

log = logging.getLogger("xenbus.xenstore")
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


class Watch(WatchRecord):
    """A watch until it is closed. Its events wait in the client; `poll_watch` hands them out."""

    __slots__ = ("_client", "handler")

    def __init__(
        self, client: SyncClient, path: str, token: int, handler: Callable[[str], None] | None
    ) -> None:
        super().__init__(path, token, self._fired)
        self._client = client
        self.handler = handler

    def _fired(self, path: str) -> None:
        self._client._put(self, path)

    def close(self) -> None:
        """Idempotent; quiet on a dead link. Its events that wait are dropped."""
        self._client._unwatch(self)


class Transaction:
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ("_client", "ended", "id")

    def __init__(self, client: SyncClient, tx_id: int) -> None:
        self._client = client
        self.id = tx_id
        self.ended = False

    def read(self, path: str) -> bytes:
        return self._client.read(path, self)

    def read_str(self, path: str) -> str:
        return self._client.read_str(path, self)

    def write(self, path: str, value: bytes | str) -> None:
        self._client.write(path, value, self)

    def mkdir(self, path: str) -> None:
        self._client.mkdir(path, self)

    def rm(self, path: str) -> None:
        self._client.rm(path, self)

    def directory(self, path: str) -> list[str]:
        return self._client.directory(path, self)

    def exists(self, path: str) -> bool:
        return self._client.exists(path, self)

    def get_perms(self, path: str) -> list[Perm]:
        return self._client.get_perms(path, self)

    def set_perms(self, path: str, perms: Iterable[Perm | str]) -> None:
        self._client.set_perms(path, perms, self)

    def gather(
        self,
        directory: str,
        wanted: Mapping[str, Callable[[bytes], Any]],
        defaults: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return self._client.gather(directory, wanted, defaults, self)


class SyncClient:
    """One connection, blocking. Errors and names as in `client.Client`.

    timeout: seconds that the store has for a reply; DeadlineError after that.
    """

    def __init__(self, pipe: Pipe, timeout: float = REQUEST_TIMEOUT) -> None:
        self.timeout = timeout
        self._pipe = pipe
        self._session = Session(pipe.peer, pipe.max_outstanding)
        # Keys: (watch, event path); a dict, for the order and so that equal events are one.
        self._events: dict[tuple[Watch, str], None] = {}

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

    def _submit(self, op: Op, path: str, payload: bytes, tx: Transaction | None = None) -> _Slot:
        if tx is not None and tx.ended:
            raise UsageError(f"transaction {tx.id} has ended")
        slot = _Slot()
        timeout = self.timeout
        tx_id = tx.id if tx is not None else 0
        self._session.submit(op, path, payload, tx_id, slot, time.monotonic() + timeout, timeout)
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

    def _ask(self, op: Op, path: str, *args: Any, tx: Transaction | None = None) -> Any:
        codec = CODECS[op]
        return codec.parse_reply(self._wait(self._submit(op, path, codec.request(*args), tx)))

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

    # ---- nodes ----

    def read(self, path: str, tx: Transaction | None = None) -> bytes:
        """The node's value."""
        return self._wait(self._submit(Op.READ, path, checked(Op.READ, path).encode() + b"\0", tx))

    def read_str(self, path: str, tx: Transaction | None = None) -> str:
        """The value as text: UTF-8, bytes that are none kept as surrogates."""
        return self.read(path, tx).decode("utf-8", "surrogateescape")

    def write(self, path: str, value: bytes | str, tx: Transaction | None = None) -> None:
        """Makes missing parents, with empty values."""
        self._ask(Op.WRITE, path, checked(Op.WRITE, path), value, tx=tx)

    def mkdir(self, path: str, tx: Transaction | None = None) -> None:
        """A node that exists keeps its value."""
        self._ask(Op.MKDIR, path, checked(Op.MKDIR, path), tx=tx)

    def rm(self, path: str, tx: Transaction | None = None) -> None:
        """The node and all below it. A missing one is fine, a missing parent is NoEntry."""
        self._ask(Op.RM, path, checked(Op.RM, path), tx=tx)

    def directory(self, path: str, tx: Transaction | None = None) -> list[str]:
        """The children's names; a list too long for one reply is fetched in parts, of one generation."""
        try:
            names: list[str] = self._ask(Op.DIRECTORY, path, checked(Op.DIRECTORY, path), tx=tx)
        except StoreError as exc:
            if exc.name != "E2BIG":
                raise
            return self._directory_parts(path, tx)
        return names

    def _directory_parts(self, path: str, tx: Transaction | None) -> list[str]:
        listing, start = Listing(), time.monotonic()
        while not listing.add(self._ask(Op.DIRECTORY_PART, path, path, listing.offset, tx=tx)):
            if listing.restarts and time.monotonic() - start > self.timeout:
                raise DeadlineError(f"an unchanging list of {path}", self.peer, self.timeout)
        return listing.names()

    def exists(self, path: str, tx: Transaction | None = None) -> bool:
        """False for NoEntry alone; a node that may not be read is an error."""
        try:
            self.read(path, tx)
        except NoEntry:
            return False
        return True

    def get_perms(self, path: str, tx: Transaction | None = None) -> list[Perm]:
        """The owner's entry first."""
        perms: list[Perm] = self._ask(Op.GET_PERMS, path, checked(Op.GET_PERMS, path), tx=tx)
        return perms

    def set_perms(self, path: str, perms: Iterable[Perm | str], tx: Transaction | None = None) -> None:
        """Entries as `Perm` or as text (`"n5"`, `"r0"`)."""
        self._ask(Op.SET_PERMS, path, checked(Op.SET_PERMS, path), perms, tx=tx)

    def gather(
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
        slots = [self._submit(Op.READ, path, checked(Op.READ, path).encode() + b"\0", tx) for path in paths]
        found: dict[str, Any] = {}
        for (name, convert), path, slot in zip(wanted.items(), paths, slots, strict=True):
            try:
                value = self._wait(slot)
            except NoEntry:
                if defaults is None or name not in defaults:
                    raise
                found[name] = defaults[name]
                continue
            try:
                found[name] = convert(value)
            except ValueError as exc:
                raise PeerError(f"{path}: {value!r} is not what belongs there ({exc})") from exc
        return found

    # ---- watches ----

    def watch(
        self, path: str, callback: Callable[[str], None] | None = None, *, depth: int | None = None
    ) -> Watch:
        """Events, the first one included, wait until `poll_watch`; that calls `callback(event path)`."""
        checked(Op.WATCH, path)
        session = self._session
        record = Watch(self, path, session.new_token(), callback)
        slot = self._submit(Op.WATCH, path, CODECS[Op.WATCH].request(path, str(record.token), depth))
        if session.dead is None:
            session.watches[record.token] = record
        try:
            self._wait(slot)
        except BaseException:
            session.watches.pop(record.token, None)
            raise
        return record

    def poll_watch(self, timeout: float) -> tuple[Watch, str] | None:
        """The next event, (its watch, its path); None if none came within `timeout` seconds. LinkDown."""
        if not self._wait_events(time.monotonic() + timeout, lambda: bool(self._events)):
            return None
        watch, path = next(iter(self._events))
        del self._events[watch, path]
        if watch.handler is not None:
            watch.handler(path)
        return watch, path

    def _wait_events(self, until: float, ready: Callable[[], bool]) -> bool:
        while not ready():
            self._flush()
            if self._session.dead is not None:
                raise LinkDown(f"events: {self._session.dead}") from self._session.dead
            left = until - time.monotonic()
            if not self._receive(left) and left <= 0:
                return False
        return True

    def _put(self, watch: Watch, path: str) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._events = {(watch, watch.path): None for watch, _ in self._events}
            path = watch.path
        self._events[watch, path] = None

    def _drop_events(self, watch: Watch) -> None:
        self._events = {key: None for key in self._events if key[0] is not watch}

    def _unwatch(self, watch: Watch, wait: bool = True) -> None:
        if self._session.watches.pop(watch.token, None) is None:
            return
        self._drop_events(watch)
        if not wait:
            self._session.post(Op.UNWATCH, watch.path, watch.token)
            self._flush()
            return
        try:
            self._ask(Op.UNWATCH, watch.path, watch.path, watch.token)
        except (LinkDown, NoEntry):
            pass

    def wait_for(
        self, path: str, predicate: Callable[[bytes | None], bool], timeout: float, *, owed_by: str = ""
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
                value = self._read_or_none(path)
                if predicate(value):
                    return value
                if not self._wait_events(until, lambda: bool(fired)):
                    who = owed_by or f"whoever writes {path}"
                    raise DeadlineError(f"a change of {path}", who, timeout)
        finally:
            self.timeout = usual
            if watch is not None:
                self._unwatch(watch, wait=False)

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except NoEntry:
            return None

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
        start = time.monotonic()
        ended = 0
        while True:
            try:
                return self._transact(function)
            except Conflict as exc:
                ended += 1
                if attempts is not None and ended >= attempts:
                    raise
                pause = policy.pause(ended, time.monotonic() - start, random.random())
                if pause is None:
                    raise Conflict(exc.name, exc.op, exc.path, exc.tx_id, f"after {ended} attempts") from exc
            time.sleep(pause)

    def _transact(self, function: Callable[[Transaction], T]) -> T:
        tx = Transaction(self, self._ask(Op.TRANSACTION_START, ""))
        try:
            result = function(tx)
        except BaseException:
            tx.ended = True
            self._session.post(Op.TRANSACTION_END, False, tx_id=tx.id)
            self._flush()
            raise
        slot = self._submit(Op.TRANSACTION_END, "", CODECS[Op.TRANSACTION_END].request(True), tx)
        tx.ended = True
        self._wait(slot)
        return result

    # ---- domains and the store itself (dom0's, but for get_domain_path and get_feature) ----

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """The store maps the domain's ring page (its grant 1; `gfn` is ignored by ours) and binds `port`."""
        self._ask(Op.INTRODUCE, str(domid), domid, gfn, port)

    def release(self, domid: int) -> None:
        self._ask(Op.RELEASE, str(domid), domid)

    def is_introduced(self, domid: int) -> bool:
        known: bool = self._ask(Op.IS_DOMAIN_INTRODUCED, str(domid), domid)
        return known

    def resume_domain(self, domid: int) -> None:
        """@releaseDomain will fire for the domain's next shutdown again."""
        self._ask(Op.RESUME, str(domid), domid)

    def set_target(self, domid: int, target: int) -> None:
        """`domid` gets `target`'s rights (a device model's)."""
        self._ask(Op.SET_TARGET, str(domid), domid, target)

    def get_domain_path(self, domid: int) -> str:
        path: str = self._ask(Op.GET_DOMAIN_PATH, str(domid), domid)
        return path

    def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.watches.clear()
        self._session.transactions.clear()
        self._ask(Op.RESET_WATCHES, "")

    def get_feature(self, domid: int | None = None) -> int:
        """Bits of XENSTORE_SERVER_FEATURE_*; our own without `domid`."""
        bits: int = self._ask(Op.GET_FEATURE, "", *([] if domid is None else [domid]))
        return bits

    def set_feature(self, domid: int, bits: int) -> None:
        """Before the domain is introduced."""
        self._ask(Op.SET_FEATURE, str(domid), domid, bits)

    def quota_names(self) -> list[str]:
        names: str = self._ask(Op.GET_QUOTA, "")
        return names.split()

    def get_quota(self, name: str, domid: int | None = None) -> int:
        """The global value (the default of new domains) without `domid`."""
        value: str = self._ask(Op.GET_QUOTA, name, name, domid)
        if not (value.isdecimal() and len(value) <= 20):
            raise PeerError(f"quota {name}: {value!r} is not a number")
        return int(value)

    def set_quota(self, name: str, value: int, domid: int | None = None) -> None:
        self._ask(Op.SET_QUOTA, name, name, value, domid)

    def control(self, *words: str) -> str:
        """A command for the daemon, its answer as text."""
        answer: str = self._ask(Op.CONTROL, words[0] if words else "", *words)
        return answer
