"""The blocking client of a XenStore: the same operations as client.py, one send and one receive each.

Knows a `Pipe` and the session; no event loop, no threads of its own. Not for use by two threads at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, UsageError
from xenbus.xenstore import batch, calls
from xenbus.xenstore.calls import Call, Path, Program
from xenbus.xenstore.image import MIRROR_LIMIT
from xenbus.xenstore.linked import REQUEST_TIMEOUT, dialer
from xenbus.xenstore.pipelink import PipeLink
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Event, ResyncEvent, WatchRecord
from xenbus.xenstore.sync_mirror import SyncMirror
from xenbus.xenstore.transaction import RETRY, Attempts, Opened, RetryPolicy, commit
from xenbus.xenstore.transport import Pipe
from xenbus.xenstore.waiting import Nodes, Slot, one

T = TypeVar("T")
# Different events that wait for `poll_watch`; past that, each watch has one, at its own path.
MAX_EVENTS = 4096


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


class Transaction(Opened["SyncClient"], Nodes):
    """What a transaction's function works with. UsageError once the transaction has ended."""

    __slots__ = ()

    def _submit(self, call: Call[Any]) -> Slot:
        if self.ended:
            raise UsageError(f"transaction {self.id} has ended")
        if self._client._session is not self._session or self._session.dead is not None:
            raise LinkDown(f"transaction {self.id} was lost with its connection")
        call.tx_id = self.id
        self.touched.add(call)
        return self._client._submit(call)

    def _wait(self, slot: Slot) -> bytes:
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


class SyncClient(PipeLink, Nodes):
    """One connection, blocking. Errors and names as in `client.Client`.

    timeout: seconds that the store has for a reply; DeadlineError after that.
    """

    def __init__(self, pipe: Pipe, timeout: float = REQUEST_TIMEOUT, **options: Any) -> None:
        super().__init__(pipe, timeout, **options)
        # Keys: (watch, event, whether it is the first); a dict, for the order and so that equal ones are one.
        # A first event and an equal one after it are two: only the second says that something changed.
        self._events: dict[tuple[Watch, Event, bool], None] = {}

    @classmethod
    def connect(
        cls,
        target: str | os.PathLike[str] | Pipe | Callable[[], Pipe] | None = None,
        *,
        timeout: float = REQUEST_TIMEOUT,
        max_watches: int | None = None,
        reconnect: Reconnect | None = None,
    ) -> SyncClient:
        """`unix:/path`, a path (of a socket or a device), a pipe or a function that makes one; None: where
        libxenstore looks.

        max_watches: of this client; one more is StoreError E2BIG, before the store's own quota is met
        reconnect:   the first call after a loss connects again, for `timeout` seconds at most
        LinkDown if nobody is there. UsageError for an address that only an event loop can drive.
        """
        dial = dialer(target, lambda scheme: scheme.pipe, reconnect)
        return cls(dial(), timeout, max_watches=max_watches, dial=dial, reconnect=reconnect)

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- several at once ----

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
        self._ready()
        session = self._session
        token = session.new_token()
        call = calls.watch(path, token, depth)
        session.check_budget(call.path)
        record = Watch(self, call.path, token, callback, depth)
        if session.dead is None:
            session.watches[token] = record
        try:
            self._ask(call)
        except BaseException:
            session.watches.pop(record.token, None)
            self._drop_events(record)
            raise
        return record

    def poll_watch(self, timeout: float) -> tuple[Watch, Event] | None:
        """The next event, (its watch, itself); None if none came within `timeout` seconds. LinkDown; with
        `reconnect`, if the store was away all that time."""
        if not self._wait_events(time.monotonic() + timeout, lambda: bool(self._events)):
            return None
        key = next(iter(self._events))
        del self._events[key]
        watch, event, _ = key
        if watch.handler is not None:
            watch.handler(event)
        return watch, event

    def _wait_events(self, until: float, ready: Callable[[], bool]) -> bool:
        while not ready():
            if self._session.dead is not None:
                if self.closed:
                    raise LinkDown(f"events: {self._session.dead}") from self._session.dead
                self._restore(until)
                continue
            self._flush()
            left = until - time.monotonic()
            if not self._receive(left) and left <= 0:
                return False
        return True

    def process(self) -> float:
        """For other people's loops: sends and takes what can be without waiting.

        Callbacks of `submit` and of watches are called; events of watches without one wait for
        `poll_watch(0)`. Returns the seconds until the next deadline, after which `process` is to be called
        even if nothing came (inf: none). LinkDown; with `reconnect` the next call connects again, waiting.
        """
        left = self._process()
        for key in list(self._events):
            watch, event, _ = key
            if watch.handler is not None and self._events.pop(key, self) is None:
                watch.handler(event)
        return left

    def _put(self, watch: Watch, event: Event) -> None:
        if len(self._events) >= MAX_EVENTS:
            again = {one for one, waiting, _ in self._events if waiting.resync}
            watches = dict.fromkeys(one for one, _, _ in self._events)
            kinds = {one: ResyncEvent if one in again else Event for one in watches}
            self._events = {(one, kind(one.path), False): None for one, kind in kinds.items()}
            event = Event(watch.path)
        self._events.setdefault((watch, event, event.first))

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
                self._ready()  # LinkDown if it stays away, and not asked for ever
                try:
                    value = self.get(path)
                except LinkDown:
                    if self.closed:
                        raise
                    continue  # connected again, it is looked at again
                if predicate(value):
                    return value
                if not self._wait_events(until, lambda: bool(fired)):
                    who = owed_by or f"whoever writes {watch.path}"
                    raise DeadlineError(f"a change of {watch.path}", who, timeout)
        finally:
            self.timeout = usual
            if watch is not None:
                self._unwatch(watch, wait=False)

    def mirror(self, path: Path, *, limit: int = MIRROR_LIMIT) -> SyncMirror:
        """`with client.mirror(p) as mirror`: the node and all below it, kept here; see `SyncMirror`.

        PeerError past `limit` nodes."""
        return SyncMirror(self, path, limit)

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
        tx_id = self._ask(calls.start())
        tx = Transaction(self, self._session, tx_id)
        try:
            result = function(tx)
        except BaseException as exc:
            tx._abort(exc)
            self._flush()
            raise
        slot = tx._submit(calls.end(True))
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
            self._ready()
            try:
                return self._drive(commit(self._session, batch._requests()))
            except Conflict as exc:
                pause = runs.failed(exc)
            time.sleep(pause)

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

    def reset_watches(self) -> None:
        """All watches and transactions of this connection are gone; no callback from the call on."""
        self._session.forget()
        self._ask(calls.reset_watches())
