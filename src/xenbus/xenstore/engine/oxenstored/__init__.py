"""What oxenstored does otherwise than xenstored: the operations of the profile of that name. Pure.

A transaction sees the tree as it was when it started; its end merges, or does its operations again. The
facts are those of tools/ocaml/xenstored in the Xen tree (4.17), held by tests/xenstore/oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler, unknown
from xenbus.xenstore.engine.domains import INTRODUCE_DOMAIN, RELEASE_DOMAIN
from xenbus.xenstore.engine.oxenstored import control, domains, nodes, sessions
from xenbus.xenstore.engine.oxenstored.domains import died, introduced, shutdown
from xenbus.xenstore.engine.oxenstored.events import WatchTrie
from xenbus.xenstore.engine.oxenstored.views import Answer, Store, Transaction
from xenbus.xenstore.engine.tree import Node, parent_of
from xenbus.xenstore.wire import OK, Message

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

__all__ = ["HANDLERS", "LIMITS", "NAMES", "UNKNOWN", "WatchTrie", "died", "introduced", "plant", "shutdown"]

# Defaults of its own code and of the configuration file that comes with it (oxenstored.conf); 0: not limited.
LIMITS = {
    "watches": 100,
    "outstanding": 1024,
    # Not of oxenstored, which keeps 1024 events for a ring and 1024 for each of its watches: what may wait,
    # and as much again of what is kept of open transactions.
    "memory": 4 * 1024 * 1024,
    "soft-memory": 0,
    "node-permissions": 0,
    "path-max": 1024,
}
# Keys of oxenstored.conf.
NAMES = {
    "quota-maxentity": "nodes",
    "quota-maxsize": "node-size",
    "quota-maxwatch": "watches",
    "quota-transaction": "transactions",
    "quota-maxrequests": "transaction-nodes",
    "quota-maxoutstanding": "outstanding",
    "quota-path-max": "path-max",
}


def plant(engine: Engine) -> Store:
    """What it starts with. Special paths are nodes below the root."""
    store = Store(engine)
    engine.nodes[b"/"] = Node(b"", ((0, 0),), 0)
    own = b"/tool/xenstored"
    for path in (b"/" + INTRODUCE_DOMAIN, b"/" + RELEASE_DOMAIN, b"/local", b"/tool", own):
        store.add(path, engine.nodes[parent_of(path)], b"oxenstored" if path is own else b"")
    return store


def _counted(handler: Handler) -> Handler:
    """In a transaction there is room for so many operations, and each is kept with its answer. The end is one
    of them: a full transaction does not end (RESET_WATCHES does that)."""

    def counted(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
        if tx is None:
            return handler(engine, conn, message, tx)
        tx.check_room(conn, message)
        answer: Answer = OK
        try:
            payload = handler(engine, conn, message, tx)
            answer = OK if payload is None else payload
        except Fail as fail:
            answer = fail.name
            raise
        finally:
            if tx.tx_id in conn.transactions:
                tx.keep(message, answer)
        return payload

    return counted


HANDLERS: dict[int, Handler] = {
    op: _counted(handler)
    for room in (nodes, sessions, domains, control)
    for op, handler in room.HANDLERS.items()
}
UNKNOWN = _counted(unknown)
