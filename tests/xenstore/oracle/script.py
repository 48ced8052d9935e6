"""What is done to both daemons: random actions of two clients of domain 0 and of guests that come and go.

Knows what 4.17's xenstored can be asked, and what is left out since it is a known difference
(docs/xenstore.md); who chooses is handed in: hypothesis, or a random number generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.xenstore.oracle.duel import Action, Connect, Fate, Pair, Request

from xenbus.xenstore.wire import Op

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]

# Few names and little room, so that clients meet each other and their limits.
QUOTAS = {
    "nodes": 10,
    "watches": 4,
    "transactions": 2,
    "transaction-nodes": 12,
    "node-permissions": 3,
    "node-size": 200,
    "path-max": 60,
}
GUESTS = (1, 2)
SOMEBODY = 3  # introduced in the course of events alone
DOMAINS = (*GUESTS, SOMEBODY)
NOBODY = 9  # is never there
SOCKETS = ("tool", "other")

_NAMES = (b"a", b"b", b"a/b", b"a/c", b"b/a", b"a/b/c")
_HOMES = tuple(b"/local/domain/%d" % domid for domid in DOMAINS)
_BASES = (b"/open", b"/open", b"/open", *_HOMES, b"")
_ABOVE = (b"/open", *_HOMES, b"/", b"/local", b"/tool/xenstored")
_WRONG = (b"", b"//", b"/a/", b"a//b", b"/a b", b"@releaseDomain", b"@introduceDomain", b"@else")
_LENGTHS = range(58, 64)
# By their names in 4.17's CONTROL.
_LIMITS = {
    b"nodes": (3, 5, 8, 10),
    b"watches": (2, 4),
    b"transactions": (1, 2, 3),
    b"transaction-nodes": (6, 12, 20),
    b"node-size": (100, 200),
    b"permissions": (1, 2, 3),
}
_VALUES = (b"", b"1", b"2", b"\0\0x", *(b"v" * length for length in range(140, 190, 3)))
BAD_PERMS = (b"", b"x1", b"r", b"rr", b"b1x")
_TOKENS = (b"t", b"t", b"u", b"")
_ONE_PATH = (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM)
_OPS = [op for op in range(30) if not Op.GET_FEATURE <= op <= Op.SET_QUOTA]
_TOOLSTACK = (Op.INTRODUCE, Op.RELEASE, Op.SET_TARGET, Op.CONTROL, Op.RESUME)


def words(*parts: bytes) -> bytes:
    return b"".join(part + b"\0" for part in parts)


class Script:
    """`prologue()` first, then `next(choose)` as often as one likes, each done and `learn`ed before the next;
    then `epilogue(ask)`."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._handle = 0
        # Handles of transactions that may be open, by client: whoever is connected is a key.
        self._open: dict[str, list[int]] = {}
        self._watches: list[tuple[str, bytes, bytes]] = []
        self._alive: set[int] = set()
        # Whose rights a domain has, or had, besides its own.
        self._targets: dict[int, set[int]] = {}
        weights = {
            self._write: 6,
            self._change: 5,
            self._look: 3,
            self._part: 1,
            self._set_perms: 4,
            self._watch: 2,
            self._unwatch: 1,
            self._start: 3,
            self._end: 4,
            self._transaction: 2,
            self._domain: 2,
            self._set_target: 1,
            self._quota: 1,
            self._fate: 2,
            self._anew: 1,
            self._junk: 1,
        }
        self._kinds = [
            kind
            for kind, weight in weights.items()
            if kind.__name__[1:] not in pair.without
            for _ in range(weight)
        ]

    # ---- from beginning to end ----

    def prologue(self) -> list[Action]:
        actions: list[Action] = [Connect(name) for name in SOCKETS]
        actions += [
            Request("tool", Op.WRITE, b"/open\0"),
            Request("tool", Op.SET_PERMS, words(b"/open", b"b0")),
        ]
        for domid in DOMAINS:
            actions += self._birth(domid)
        actions += [Request("tool", Op.INTRODUCE, b"%d\0001\0001\0" % domid) for domid in GUESTS]
        for client, path in (
            ("tool", b"/"),
            ("other", b"@releaseDomain"),
            ("guest1", b"/local/domain/1"),
            ("guest1", b"a"),
            ("guest2", b"/open"),
            ("guest2", b"/local/domain/1"),
        ):
            actions.append(Request(client, Op.WATCH, words(path, b"t")))
        return actions

    def next(self, choose: Choose) -> list[Action]:
        """One action; none if what was chosen makes no sense now; several that belong together."""
        chosen = choose(self._kinds)(choose)
        if chosen is None:
            return []
        return chosen if isinstance(chosen, list) else [chosen]

    def learn(self, action: Action, reply: bytes) -> None:
        """What came of it."""
        if isinstance(action, Connect):
            self._open[action.client] = []
        elif isinstance(action, Fate):
            if action.what == "begins":
                self._alive.add(action.domid)
            elif action.what == "dies":
                self._alive.discard(action.domid)
                self._leave(action.domid)
        elif action.op == Op.TRANSACTION_END and action.payload in (b"T\0", b"F\0"):
            if action.transaction in self._open.get(action.client, ()):
                self._open[action.client].remove(action.transaction)
        elif reply[:1] == b"!" or action.client not in self._open:
            return
        elif action.op == Op.INTRODUCE:
            self._open[f"guest{int(action.payload.split(bytes(1))[0])}"] = []
        elif action.op == Op.RELEASE:
            self._leave(int(action.payload[:-1]))
        elif action.op == Op.TRANSACTION_START:
            self._open[action.client].append(action.handle)
        elif action.op == Op.RESET_WATCHES:
            self._open[action.client].clear()
        elif action.op == Op.SET_TARGET:
            domid, target = map(int, action.payload[:-1].split(b"\0"))
            self._targets.setdefault(domid, set()).add(target)
        elif action.op == Op.WATCH:
            path, token = action.payload[:-1].split(b"\0")
            self._watches.append((action.client, path, token))

    def epilogue(self, ask: Callable[[str, int, bytes], bytes]) -> None:
        """The whole tree, as domain 0 sees it, and what is counted of each domain."""
        stack = [b"/"]
        while stack:
            path = stack.pop()
            ask("tool", Op.READ, path + b"\0")
            ask("tool", Op.GET_PERMS, path + b"\0")
            names = ask("tool", Op.DIRECTORY, path + b"\0").split(b"\0")[:-1]
            stack += [path.rstrip(b"/") + b"/" + name for name in names]
        if "counts" not in self._pair.without:
            for name in self._guests():
                ask("tool", Op.CONTROL, words(b"quota", name[5:].encode()))

    def _birth(self, domid: int) -> list[Action]:
        home = b"/local/domain/%d" % domid
        return [
            Fate(domid, "begins"),
            Request("tool", Op.WRITE, home + b"\0"),
            Request("tool", Op.SET_PERMS, words(home, b"n%d" % domid)),
        ]

    def _leave(self, domid: int) -> None:
        self._open.pop(f"guest{domid}", None)
        self._targets.pop(domid, None)

    def _is_target(self, domid: int) -> bool:
        return any(domid in targets for targets in self._targets.values())

    # ---- who, and which path ----

    def _client(self, choose: Choose, path: bytes = b"") -> str:
        return choose(self._clients(path))

    def _clients(self, path: bytes) -> list[str]:
        # Domain 0 has no limit of a path's length: a known difference.
        return [name for name in self._open if len(path) < 40 or name not in SOCKETS] or ["tool"]

    def _where(self, choose: Choose, path: bytes = b"") -> tuple[str, int]:
        """A client, and one of its transactions, or none, or one that is not there."""
        names = self._clients(path)
        within = [(name, transaction) for name in names for transaction in self._open[name]]
        choices = [(name, 0) for name in names] + within + within
        return choose([*choices, (names[0], 77)] if len(choices) > 5 else choices)

    def _path(self, choose: Choose) -> bytes:
        kind = choose(range(14))
        if kind > 11:
            return choose((b"/open/a", b"/open/a/b"))
        if kind < 7:
            return choose(_BASES) + b"/" + choose(_NAMES)
        if kind < 9:
            return choose(_NAMES)
        if kind < 11:
            return choose(_ABOVE)
        if choose((True, False)) or not self._guests():
            return choose(_WRONG)
        length = choose(_LENGTHS)
        return choose((b"/open/" + b"x" * (length - 6), b"y" * length))

    def _guests(self) -> list[str]:
        return [name for name in self._open if name not in SOCKETS]

    # ---- nodes ----

    def _write(self, choose: Choose) -> Action:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        return Request(client, Op.WRITE, path + b"\0" + choose(_VALUES), transaction)

    def _change(self, choose: Choose) -> Request | None:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        return Request(client, choose((Op.MKDIR, Op.RM)), path + b"\0", transaction)

    def _look(self, choose: Choose) -> Action | None:
        path = self._path(choose)
        op = choose((Op.READ, Op.DIRECTORY, Op.GET_PERMS))
        if op == Op.GET_PERMS and path[:1] == b"@":
            return None  # a known difference
        client, transaction = self._where(choose, path)
        return Request(client, op, path + b"\0", transaction)

    def _part(self, choose: Choose) -> Action:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        return Request(client, Op.DIRECTORY_PART, words(path, choose((b"0", b"1", b"2", b"5"))), transaction)

    def _set_perms(self, choose: Choose) -> Action | None:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        domids = (0, *GUESTS, *GUESTS, SOMEBODY, NOBODY)
        perms = [b"%c%d" % (choose(b"nnnrwb"), choose(domids)) for _ in range(choose((1, 1, 2, 2, 3, 4)))]
        if choose(range(12)) == 0:
            perms[choose(range(len(perms)))] = choose(BAD_PERMS)
        elif path[:1] == b"@" and (path == b"@else" or client not in SOCKETS):
            return None  # xenstored's error is the last it met
        elif path[:1] == b"@":
            perms[0] = perms[0][:1] + b"0"  # the special nodes are counted: a known difference
        elif client not in SOCKETS and choose((True, False)):
            perms[0] = perms[0][:1] + client[5:].encode()
        if path == b"/":
            perms[0] = b"r0"  # xenstored loses everything with a guest that owns the root
        return Request(client, Op.SET_PERMS, words(path, *perms), transaction)

    # ---- watches ----

    def _watch(self, choose: Choose) -> Action:
        path = self._path(choose)
        return Request(self._client(choose, path), Op.WATCH, words(path, choose(_TOKENS)))

    def _unwatch(self, choose: Choose) -> Action | None:
        if not self._watches:
            return None
        client, path, token = self._watches.pop(choose(range(len(self._watches))))
        return Request(client, Op.UNWATCH, words(path, token)) if client in self._open else None

    # ---- transactions ----

    def _start(self, choose: Choose) -> Action:
        client, transaction = self._where(choose)
        self._handle += 1000
        nested = transaction if choose(range(8)) == 0 else 0
        return Request(client, Op.TRANSACTION_START, b"\0", nested, self._handle)

    def _end(self, choose: Choose) -> Action | None:
        choices = [(client, handle) for client, handles in self._open.items() for handle in handles]
        if not choices:
            return None
        client, handle = choose(choices)
        commit = choose((b"T", b"T", b"T", b"T", b"F", b"x"))
        return Request(client, Op.TRANSACTION_END, commit + b"\0", handle)

    def _transaction(self, choose: Choose) -> list[Action]:
        """One from beginning to end, with something else in the middle of it."""
        client = self._client(choose)
        self._handle += 1000
        handle = self._handle
        actions: list[Action] = [Request(client, Op.TRANSACTION_START, b"\0", handle=handle)]
        for _ in range(choose((2, 3, 4, 5))):
            kind = choose((self._write, self._write, self._change, self._change, self._set_perms, self._look))
            action = kind(choose)
            if not isinstance(action, Request) or action.payload[:1] == b"@":
                continue
            if len(action.payload) < 40 or client not in SOCKETS:
                actions.append(replace(action, client=client, transaction=handle))
        between = choose((self._write, self._change, self._set_perms, self._look))(choose)
        if between is not None:
            actions.insert(choose(range(1, len(actions) + 1)), between)
        return [*actions, Request(client, Op.TRANSACTION_END, b"T\0", handle)]

    # ---- domains ----

    def _domain(self, choose: Choose) -> Request | None:
        op = choose((Op.IS_DOMAIN_INTRODUCED, Op.RESUME, Op.GET_DOMAIN_PATH, Op.RELEASE, Op.INTRODUCE))
        domid = choose((*DOMAINS, NOBODY))
        if op == Op.INTRODUCE:
            return Request("tool", op, b"%d\0001\0001\0" % domid) if domid in self._alive else None
        if op == Op.RELEASE:
            # Of somebody's target: a known difference. And xenstored's loop may hold the domain's connection
            # for a moment, and with it the event.
            return None if self._is_target(domid) else Request("tool", op, b"%d\0" % domid, ordered=False)
        return Request(self._client(choose), op, b"%d\0" % domid)

    def _set_target(self, choose: Choose) -> Action | None:
        domid, target = choose((*DOMAINS, NOBODY)), choose((0, *DOMAINS, NOBODY))
        if domid == target:
            return None  # xenstored would never let go of such a domain
        return Request("other", Op.SET_TARGET, b"%d\0%d\0" % (domid, target))

    def _quota(self, choose: Choose) -> Action:
        name = choose(list(_LIMITS))
        return Request("tool", Op.CONTROL, words(b"quota", b"set", name, b"%d" % choose(_LIMITS[name])))

    def _fate(self, choose: Choose) -> list[Action] | None:
        domid, what = choose(DOMAINS), choose(("s", "c", "dies", "dies"))
        if domid not in self._alive:
            return [*self._birth(domid), Request("tool", Op.INTRODUCE, b"%d\x001\x001\x00" % domid)]
        if what == "dies" and self._is_target(domid):
            return None  # a known difference
        return [Fate(domid, what)]

    # ---- what is not done every day ----

    def _anew(self, choose: Choose) -> Action:
        """RESET_WATCHES, or another connection."""
        client = self._client(choose)
        self._watches = [watch for watch in self._watches if watch[0] != client]
        return Connect(client) if client == "other" else Request(client, Op.RESET_WATCHES, b"\0")

    def _junk(self, choose: Choose) -> Action | None:
        """Any operation with any payload, if it does nothing that the script would have to know of."""
        op = choose(_OPS)
        parts = [
            choose((self._path(choose), choose(BAD_PERMS), choose((b"b1", b"T", b"1", b"t", b"\xff\x80"))))
            for _ in range(choose(range(4)))
        ]
        payload = b"\0".join(parts) + choose((b"", b"\0"))
        client, transaction = self._where(choose, payload)
        if (client in SOCKETS and op in _TOOLSTACK) or op in (Op.TRANSACTION_START, Op.RESET_WATCHES):
            return None
        if op == Op.TRANSACTION_END and payload in (b"T\0", b"F\0"):
            return None
        if op == Op.WATCH and payload.count(b"\0") != 1:
            return None  # one too many would be a depth: not in 4.17
        if (
            op in (Op.GET_DOMAIN_PATH, Op.IS_DOMAIN_INTRODUCED)
            or (op in (Op.GET_PERMS, Op.SET_PERMS, Op.UNWATCH) and payload[:1] == b"@")
            or (op in _ONE_PATH and (not payload or payload.find(b"\0") != len(payload) - 1))
            or (op == Op.SET_PERMS and payload[:2] == b"/\0")
        ):
            return None  # known differences
        return Request(client, op, payload, transaction)
