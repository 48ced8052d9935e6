"""A subtree of the store as far as it was heard of: what mirrors hold, and what they ask when. No I/O.

Knows calls and events; mirror.py and sync_mirror.py own the watch and send what `refresh` asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xenbus.errors import Conflict, Denied, LinkDown, NoEntry, PeerError
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Path, Program, checked, together, value_of
from xenbus.xenstore.session import Event
from xenbus.xenstore.wire.message import Op

MIRROR_LIMIT = 10_000
# Different paths that wait to be looked at; more of them mean: all of it.
MAX_DIRTY = 1024


class Change(NamedTuple):
    """What became of one node: its value (None: it may not be read), or that it is gone.

    resync: more happened than could be kept until it was asked for; look at the mirror itself.
    """

    path: str
    value: bytes | None
    gone: bool = False
    resync: bool = False


class Image(Mapping[str, bytes | None]):
    """`{path: value}` of a node and all below it; None for a value that may not be read. KeyError for a node
    that is not there, and for all below one that may not be read. Paths are written as the mirror's own is:
    absolute, or relative to the home.

    What it shows of a node, the store held at a moment after the last change that was heard of when it was
    looked at; a node and what is below it were looked at together, but are not of one moment. What is heard
    later is shown as soon as it was looked at: `stale` until then.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.root = checked(Op.WATCH, path)
        self.limit = limit
        # Changes heard of, and how many of those are shown.
        self.heard = 0
        self.shown = 0
        self._values: dict[str, bytes | None] = {}
        self._children: dict[str, dict[str, None]] = {}
        self._dirty: dict[str, None] = {}
        self._error: Exception | None = None

    # ---- what it shows ----

    def __getitem__(self, path: str) -> bytes | None:
        self._check()
        return self._values[path]

    def __iter__(self) -> Iterator[str]:
        self._check()
        return iter(self._values)

    def __len__(self) -> int:
        self._check()
        return len(self._values)

    def directory(self, path: str) -> list[str]:
        """The children's names, in no order; none for a node that is not there, or may not be listed."""
        self._check()
        return [child.rpartition("/")[2] for child in self._children.get(path, ())]

    @property
    def stale(self) -> bool:
        """Whether something was heard of that is not shown yet."""
        return self.shown < self.heard

    def _check(self) -> None:
        if self._error is not None:
            raise LinkDown(f"mirror of {self.root}: {self._error}") from self._error

    # ---- what it hears ----

    def hear(self, event: Event) -> None:
        """An event of the watch on the root."""
        self.heard += 1
        path = self.root if event.resync or not self._covers(event) else str(event)
        if len(self._dirty) >= MAX_DIRTY:
            self._dirty.clear()
            path = self.root
        self._dirty[path] = None

    def _covers(self, path: str) -> bool:
        return path == self.root or self.root == "/" or path.startswith(self.root + "/")

    def _above(self, path: str) -> Iterator[str]:
        """The nodes between `path` and the root, the root included, upwards."""
        while path != self.root:
            path = path.rpartition("/")[0] or "/"
            yield path

    # ---- what it asks ----

    def refresh(self) -> Program[list[Change]]:
        """Looks at everything that was heard of until now, and shows all of it at once.

        An event at a node may mean that it was removed and made again with other children: what is below it
        is looked at too, and those above it that are not known (a deep write fires for the last node alone).
        If it fails, what was to be looked at still is.
        """
        dirty, self._dirty = self._dirty, {}
        upto = self.heard
        try:
            tops = [path for path in dirty if not any(above in dirty for above in self._above(path))]
            unknown = {above: None for path in tops for above in self._above(path)}
            above = [path for path in unknown if path not in self._values]
            walks = [calls.walk(path, limit=self.limit) for path in tops]
            outcomes = yield from together([*map(calls.read, above), *walks])
            for outcome in outcomes:
                if not isinstance(outcome, (NoEntry, Denied, Conflict)):
                    value_of(outcome)
            changes = self._show(dict(zip(above, outcomes, strict=False)), tops, outcomes[len(above) :])
            if not self._dirty.keys() & set(tops):
                self.shown = max(self.shown, upto)
        except BaseException:
            self._dirty = {**dirty, **self._dirty}
            raise
        if len(self._values) > self.limit:
            raise PeerError(f"more than {self.limit} nodes at and below {self.root}")
        return changes

    def _show(self, above: dict[str, Any], tops: list[str], found: list[Any]) -> list[Change]:
        changes: dict[str, Change] = {}
        for path, outcome in zip(tops, found, strict=True):
            if isinstance(outcome, Conflict):  # a list that never stood still: again
                self._dirty[path] = None
                continue
            nodes = {} if isinstance(outcome, (NoEntry, Denied)) else {one.path: one.value for one in outcome}
            # A deep write fires for the last node alone, which may be gone again: those above are news too.
            for node in reversed(list(self._above(path))):
                if node not in self._values and node in above:
                    if isinstance(above[node], NoEntry):
                        nodes = {}
                        break
                    value = None if isinstance(above[node], Denied) else above[node]
                    self._put(node, {node: value}, changes)
                if self._values.get(node) is None:  # it may not be listed, so that nothing is known below it
                    nodes = {}
                    break
            self._put(path, nodes, changes)
        return list(changes.values())

    def _put(self, top: str, nodes: dict[str, bytes | None], changes: dict[str, Change]) -> None:
        """`nodes` is all there is at and below `top` now."""
        for path in self._at_and_below(top):
            if path not in nodes:
                del self._values[path]
                self._children.pop(path, None)
                self._children.get(path.rpartition("/")[0] or "/", {}).pop(path, None)
                changes[path] = Change(path, None, gone=True)
        for path, value in sorted(nodes.items()):
            if path not in self._values or self._values[path] != value:
                changes[path] = Change(path, value)
            self._values[path] = value
            if path != self.root:
                self._children.setdefault(path.rpartition("/")[0] or "/", {})[path] = None

    def _at_and_below(self, top: str) -> list[str]:
        found, stack = [], [top]
        while stack:
            path = stack.pop()
            if path in self._values:
                found.append(path)
                stack += self._children.get(path, ())
        return found
