"""What is done to both oxenstoreds: the same random actions, with what is known to differ there left out.

Two pairs: one with limits that are soon met, where nobody dies, since oxenstored loses count of nodes then
(docs/xenstore.md); one where domains come and go.
"""

from __future__ import annotations

from tests.xenstore.oracle.duel import Action, Fate, Pair, Request
from tests.xenstore.oracle.script import (
    BAD_PERMS,
    DOMAINS,
    GUESTS,
    NOBODY,
    SOCKETS,
    SOMEBODY,
    Choose,
    Script,
    words,
)

from xenbus.xenstore.wire import Op

LIMITS = {
    "nodes": 10,
    "watches": 4,
    "transactions": 2,
    "transaction-nodes": 12,
    "node-size": 160,
    "path-max": 60,
}


def _all_of_it(op: int, payload: bytes) -> bytes:
    """Numbers of transactions, too."""
    return payload


OXENSTORED = Pair("o", "ours-o", LIMITS, without=frozenset({"fate"}), compared=_all_of_it)
OXENSTORED_DEATHS = Pair("o", "ours-o", without=frozenset({"counts"}), compared=_all_of_it)


class OxenScript(Script):
    """Without what `Script` leaves out for xenstored's sake."""

    def prologue(self) -> list[Action]:
        # Debian's says there where its program is.
        own = [Request("tool", Op.WRITE, b"/tool/xenstored\0")]
        for domid in (*DOMAINS, NOBODY):
            # When a transaction takes a domain's last node, its count stays: one is never touched.
            path = b"/kept/%d" % domid
            own.append(Request("tool", Op.WRITE, path + b"\0"))
            own.append(Request("tool", Op.SET_PERMS, words(path, b"n%d" % domid)))
        actions = super().prologue()
        return [*actions[: len(SOCKETS)], *own, *actions[len(SOCKETS) :]]

    def _clients(self, path: bytes) -> list[str]:
        return list(self._open) or ["tool"]

    def _change(self, choose: Choose) -> Request | None:
        action = super()._change(choose)
        if (
            action is not None
            and action.op == Op.RM
            and action.transaction
            and action.payload.count(b"/") < 4
        ):
            return None  # with a domain's last node its count stays, if that is merged
        return None if self._miscounts(action) else action

    def _look(self, choose: Choose) -> Action | None:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        return Request(client, choose((Op.READ, Op.DIRECTORY, Op.GET_PERMS)), path + b"\0", transaction)

    def _set_perms(self, choose: Choose) -> Action | None:
        path = self._path(choose)
        client, transaction = self._where(choose, path)
        domids = (0, *GUESTS, *GUESTS, SOMEBODY, NOBODY)
        perms = [b"%c%d" % (choose(b"nrwb"), choose(domids)) for _ in range(choose((1, 1, 2, 2, 3, 4)))]
        if choose(range(12)) == 0:
            perms[choose(range(len(perms)))] = choose((*BAD_PERMS, b"n0x1", b"b-1", b"r1_0"))
        elif client not in SOCKETS and choose((True, False)):
            perms[0] = perms[0][:1] + client[5:].encode()
        return Request(client, Op.SET_PERMS, words(path, *perms), transaction)

    def _domain(self, choose: Choose) -> Request | None:
        action = super()._domain(choose)
        if action is None:
            return None
        if action.op == Op.RELEASE and "fate" in self._pair.without:
            return None
        return action

    def _is_target(self, domid: int) -> bool:
        return False

    def _fate(self, choose: Choose) -> list[Action] | None:
        fate = super()._fate(choose)
        if fate and isinstance(fate[0], Fate) and fate[0].what in ("s", "c"):
            # Each look at the domains tells of those that are shut down: once for all of them.
            domid = fate[0].domid
            return (
                [*fate, Request("tool", Op.RESUME, b"%d\0" % domid)]
                if f"guest{domid}" in self._open
                else None
            )
        return fate

    def _junk(self, choose: Choose) -> Action | None:
        op = choose([op for op in range(30) if op not in (Op.TRANSACTION_START, Op.TRANSACTION_END)])
        parts = [
            choose((self._path(choose), choose(BAD_PERMS), choose((b"b1", b"T", b"1", b"t", b"\xff\x80"))))
            for _ in range(choose(range(4)))
        ]
        payload = b"\0".join(parts) + choose((b"", b"\0"))
        client, transaction = self._where(choose, payload)
        if not payload:
            return None  # it waits for more
        if op == Op.RESET_WATCHES or (
            op in (Op.INTRODUCE, Op.RELEASE, Op.SET_TARGET) and self._is_dom0(client)
        ):
            return None
        request = Request(client, op, payload, 0 if op in (Op.WATCH, Op.UNWATCH) else transaction)
        return None if self._miscounts(request) else request

    def _miscounts(self, request: Request | None) -> bool:
        """RM of the root, which is not counted there until it is removed."""
        return (
            request is not None
            and (request.op, request.payload) == (Op.RM, b"/\0")
            and "counts" not in self._pair.without
        )

    def _is_dom0(self, client: str) -> bool:
        return client in SOCKETS or 0 in self._targets.get(int(client[5:]), ())
