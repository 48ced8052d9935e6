"""Who talks to the engine: a connection with its queue, and the domain it stands for. Pure.

Knows quotas and encoded messages; not the tree, and no socket: a daemon takes bytes from `take()`.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from xenbus.xenstore.engine.quotas import Quotas
from xenbus.xenstore.wire import DOMID_ANY, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.dispatch import Handler
    from xenbus.xenstore.engine.watches import Watch

# xs_wire.h
FEATURE_RECONNECTION = 1
FEATURE_ERROR = 2
FEATURE_WATCHDEPTH = 4
FEATURE_DOMID_ANY = 8
FEATURES = FEATURE_ERROR | FEATURE_WATCHDEPTH | FEATURE_DOMID_ANY

# What a queue may hold for somebody whom no quota limits, bytes: then the connection is given up.
QUEUE_LIMIT = 16 * 1024 * 1024


_EVENT = struct.pack("<I", Op.WATCH_EVENT)


class Domain:
    """What is counted and known of one domain. `memory` is bytes of nodes, watches, replies and events."""

    __slots__ = (
        "connections",
        "domid",
        "features",
        "introduced",
        "maxima",
        "memory",
        "nodes",
        "paused",
        "quotas",
        "shutdown",
        "target",
        "transactions",
        "watches",
    )

    def __init__(self, domid: int, quotas: Quotas) -> None:
        self.domid = domid
        self.quotas = quotas
        self.features = FEATURES
        self.introduced = False
        self.shutdown = False
        # Its requests wait (oxenstored: it made too many transactions fail).
        self.paused = False
        self.target: int | None = None
        self.connections: set[Connection] = set()
        self.nodes = 0
        self.watches = 0
        self.transactions = 0
        self.memory = 0
        self.maxima: dict[str, int] = {}

    @property
    def guest(self) -> bool:
        return self.domid != 0


class Cause:
    """A guest's request that put events into other queues: outstanding until they were taken."""

    __slots__ = ("conn", "events")

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.events = 0
        conn.causing += 1

    def taken(self) -> None:
        self.events -= 1
        if not self.events:
            self.conn.causing -= 1


class Connection:
    """One client of the engine. Made by Engine.connect, ended by Engine.disconnect.

    out:     encoded messages that wait to be taken, in order
    queued:  their bytes
    events:  the watch events among them (who caused them), so that none is queued twice
    replies: how many of them are replies (counted for a guest only)
    causing: own requests whose events others have not taken yet
    overflow: the queue passed `queue_limit`; the daemon closes it, the engine adds nothing more
    """

    __slots__ = (
        "cause",
        "causing",
        "closed",
        "domain",
        "domid",
        "events",
        "guest",
        "home",
        "ids",
        "next_tx",
        "out",
        "overflow",
        "queue_limit",
        "queued",
        "replies",
        "table",
        "transactions",
        "watches",
    )

    def __init__(self, domain: Domain, table: list[Handler], queue_limit: int) -> None:
        self.domain = domain
        self.domid = domain.domid
        self.guest = domain.domid != 0
        self.table = table
        self.home = b"/local/domain/%d/" % domain.domid
        self.ids: tuple[int, ...] = (domain.domid, DOMID_ANY)
        self.out: deque[bytes] = deque()
        self.queued = 0
        self.events: dict[bytes, Cause | None] = {}
        self.cause: Cause | None = None
        self.replies = 0
        self.causing = 0
        self.overflow = False
        self.queue_limit = queue_limit
        self.closed = False
        # As the profile has them (OpenTransaction, and more).
        self.transactions: dict[int, Any] = {}
        self.next_tx = 1
        # In order of registration; (path, token) names a watch.
        self.watches: dict[tuple[bytes, bytes], Watch] = {}

    @property
    def may_send(self) -> bool:
        """False while a guest has as much outstanding, or holds as much memory, as it may: its next
        request is not to be looked at until others have read (domain_can_read in xenstored)."""
        if not self.guest:
            return True
        quotas, domain = self.domain.quotas, self.domain
        return not (
            domain.paused
            or 0 < quotas.outstanding <= self.outstanding
            or 0 < quotas.memory <= domain.memory - self.queued
        )

    @property
    def outstanding(self) -> int:
        """Requests that are not over: a reply, or an event of theirs, has not been taken."""
        return self.replies + self.causing

    def put_reply(self, data: bytes) -> None:
        self.out.append(data)
        self.queued += len(data)
        if self.guest:
            self.replies += 1
            self.domain.memory += len(data)

    def put_event(self, data: bytes, cause: Cause | None, *, once: bool) -> bool:
        """False if it was not queued: an identical one waits already (`once`), or there is no room."""
        size = len(data)
        if once and data in self.events:
            return False
        if self.guest:
            limit = self.domain.quotas.memory
            if limit and self.domain.memory + size > limit:
                return False
            self.domain.memory += size
        elif self.queued + size > self.queue_limit:
            self.overflow = True
            return False
        if once:
            self.events[data] = cause
            if cause is not None:
                cause.events += 1
        self.out.append(data)
        self.queued += size
        return True

    def take(self, limit: int = 1 << 62) -> bytes:
        """Messages off the queue, whole ones, joined: until `limit` bytes are reached or it is empty."""
        out = self.out
        if not out:
            return b""
        if self.queued <= limit:
            data = b"".join(out) if len(out) > 1 else out[0]
            self._clear()
            return data
        taken: list[bytes] = []
        size = 0
        while out and size < limit:
            message = out.popleft()
            size += len(message)
            taken.append(message)
            self._delivered(message)
        self.queued -= size
        if self.guest:
            self.domain.memory -= size
        return b"".join(taken)

    def _delivered(self, message: bytes) -> None:
        if message[:4] != _EVENT:
            if self.guest:
                self.replies -= 1
            return
        cause = self.events.pop(message, None)
        if cause is not None:
            cause.taken()

    def _clear(self) -> None:
        if self.guest:
            self.domain.memory -= self.queued
            self.replies = 0
        self.out.clear()
        self.queued = 0
        if self.events:
            for cause in self.events.values():
                if cause is not None:
                    cause.taken()
            self.events.clear()

    def drop_events(self) -> int:
        """Watch events that wait are thrown away, replies stay. How many there were."""
        kept = [message for message in self.out if message[:4] != _EVENT]
        dropped = len(self.out) - len(kept)
        size = self.queued - sum(map(len, kept))
        for cause in self.events.values():
            if cause is not None:
                cause.taken()
        self.events.clear()
        self.out = deque(kept)
        self.queued -= size
        if self.guest:
            self.domain.memory -= size
        return dropped

    def drop_queue(self) -> None:
        """What waits is thrown away (the connection ends or starts anew)."""
        self._clear()
