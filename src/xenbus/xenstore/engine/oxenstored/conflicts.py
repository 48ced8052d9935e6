"""Who made a transaction fail, and how long it is not listened to for that. Pure.

Every guest has credit; a change of its that made another's commit fail costs one. Without credit its
requests wait. One unit comes back at each tick, to one domain: first to those that wait, in their order.
Time is ticks, of `SECONDS`: the daemon counts them as long as `busy`. Domain 0 may do as it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.oxenstored.history import Epoch, History

if TYPE_CHECKING:
    from xenbus.xenstore.engine.connection import Connection, Domain
    from xenbus.xenstore.engine.engine import Engine
    from xenbus.xenstore.engine.oxenstored.views import Transaction

# oxenstored.conf: conflict-burst-limit, conflict-max-history-seconds.
BURST = 5
SECONDS = 0.05
# The lowest that credit falls.
FLOOR = -1


class _Record:
    """A guest changed the tree: what it was before, and after."""

    __slots__ = ("after", "before", "conn")

    def __init__(self, conn: Connection, before: Epoch, after: Epoch) -> None:
        self.conn, self.before, self.after = conn, before, after


class Conflicts:
    """seconds: how long a tick is, 0 for none; who is younger than a tick or two has somebody to blame."""

    def __init__(self, engine: Engine, history: History) -> None:
        self.seconds = SECONDS
        self._engine = engine
        self._history = history
        self._credit: dict[int, int] = {}
        self._paused: deque[Domain] = deque()
        self._penalised: deque[Domain] = deque()
        # Open transactions: of this tick, of the one before; each with how many records were there already.
        self._young: dict[Transaction, int] = {}
        self._ageing: dict[Transaction, int] = {}
        self._records: deque[_Record] = deque()
        # How many records were ever dropped: the number of the first one that is kept.
        self._first = 0
        self._ticking = False

    @property
    def busy(self) -> bool:
        return bool(self._young or self._ageing or self._paused or self._penalised or self._records)

    def _start_ticking(self) -> None:
        if not self._ticking and self._engine.hooks is not None:
            self._ticking = True
            self._engine.hooks.call_later(self.seconds, self._ticked)

    def _ticked(self) -> None:
        self._ticking = False
        self.tick()
        if self.busy:
            self._start_ticking()

    # ---- what happens ----

    def started(self, tx: Transaction) -> None:
        if self._engine.hooks is not None and self.seconds:
            self._young[tx] = self._first + len(self._records)
            self._start_ticking()

    def ended(self, tx: Transaction) -> None:
        self._young.pop(tx, None)
        self._ageing.pop(tx, None)
        self._trim()

    def before(self, conn: Connection) -> Epoch | None:
        """A guest is about to change the tree; None if nobody wants to know. To be followed by `after`."""
        if conn.guest and (self._young or self._ageing):
            return self._history.begin()
        return None

    def after(self, conn: Connection, before: Epoch | None) -> None:
        if before is not None:
            self._records.append(_Record(conn, before, self._history.begin()))
            self._trim()

    def blame(self, tx: Transaction, conn: Connection, works_on: Callable[[Epoch], bool]) -> None:
        """The end of `tx` failed for what others did since. works_on: whether it would have come to the same
        on the tree of then."""
        since = self._young.get(tx, self._ageing.get(tx))
        if since is None:
            return
        guilty: set[Connection] = {conn}
        for record in list(self._records)[max(0, since - self._first) :][::-1]:
            if record.conn in guilty or record.conn.closed:
                continue
            if works_on(record.before) and not works_on(record.after):
                guilty.add(record.conn)
                self._punish(record.conn.domain)

    def _punish(self, domain: Domain) -> None:
        before = self._credit.get(domain.domid, BURST)
        after = self._credit[domain.domid] = max(FLOOR, before - 1)
        if before > 0 >= after:
            domain.paused = True
            self._paused.append(domain)
        elif before >= BURST > after > 0:
            self._penalised.append(domain)
        self._start_ticking()

    # ---- time ----

    def tick(self) -> None:
        """So many seconds are over."""
        self._ageing, self._young = self._young, {}
        self._trim()
        if self._paused:
            domain = self._paused.popleft()
            credit = self._credit[domain.domid] = self._credit.get(domain.domid, 0) + 1
            if credit <= 0:
                self._paused.append(domain)
            else:
                domain.paused = False
        elif self._penalised:
            domain = self._penalised.popleft()
            credit = self._credit[domain.domid] = min(BURST, self._credit.get(domain.domid, BURST) + 1)
            if credit < BURST:
                self._penalised.append(domain)

    def _trim(self) -> None:
        """Records older than any young transaction are of no use."""
        wanted = min(
            (*self._young.values(), *self._ageing.values()), default=self._first + len(self._records)
        )
        while self._records and self._first < wanted:
            record = self._records.popleft()
            self._first += 1
            self._history.release(record.before)
            self._history.release(record.after)

    def gone(self, domain: Domain) -> None:
        """It is dead: nothing is held against the next one of that number."""
        self._credit.pop(domain.domid, None)
        for queue in (self._paused, self._penalised):
            if domain in queue:
                queue.remove(domain)
