"""Operations on what a client has open: watches and transactions. Pure.

Follows watch.c and transaction.c of xenstored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import FEATURE_WATCHDEPTH, Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler, number_of, one_word, words_of
from xenbus.xenstore.engine.nodes import canonical
from xenbus.xenstore.engine.transactions import Transaction
from xenbus.xenstore.engine.watches import Watch
from xenbus.xenstore.wire import OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine


# ---- watches ----


def watch(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> None:
    words = words_of(message.payload)
    depth = -1
    if len(words) == 3 and engine.features_of(conn) & FEATURE_WATCHDEPTH:
        if words[2]:
            depth = number_of(words[2])
    elif len(words) != 2:
        raise Fail("EINVAL")
    raw, token = words[0], words[1]
    path = canonical(conn, raw, special=True)
    prefix = len(path) - len(raw)
    if (path, token) in conn.watches:
        raise Fail("EEXIST")
    domain = conn.domain
    if conn.guest:
        # 4.17 stops past the limit and says E2BIG.
        if domain.watches > domain.quotas.watches > 0:
            raise Fail("E2BIG")
        if domain.memory + len(path) + len(token) > domain.quotas.memory > 0:
            raise Fail("ENOMEM")
    add_watch(engine, conn, path, token, depth, prefix)
    # The ack comes before the first event.
    engine.reply(conn, message, OK)
    engine.first_event(conn, raw, token)


def add_watch(engine: Engine, conn: Connection, path: bytes, token: bytes, depth: int, prefix: int) -> None:
    """One that is not there yet; see `Watch` for what it is."""
    engine.watches.add(conn, path, token, depth, prefix)
    domain = conn.domain
    domain.watches += 1
    domain.memory += len(path) + len(token)


def drop_watch(engine: Engine, watch: Watch) -> None:
    engine.watches.remove(watch)
    domain = watch.conn.domain
    domain.watches -= 1
    domain.memory -= len(watch.path) + len(watch.token)


def unwatch(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) != 2:
        raise Fail("EINVAL")
    try:
        path = canonical(conn, words[0], special=True)
    except Fail:
        # No watch can be there: 4.17 does not look at the path's form.
        raise Fail("ENOENT") from None
    found = conn.watches.get((path, words[1]))
    if found is None:
        raise Fail("ENOENT")
    drop_watch(engine, found)
    return OK


def reset_watches(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    engine.drop_session(conn)
    return OK


# ---- transactions ----


def start(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    if tx is not None:
        raise Fail("EBUSY")
    domain = conn.domain
    # 4.17 stops past the limit.
    if conn.guest and domain.transactions > domain.quotas.transactions > 0:
        raise Fail("ENOSPC")
    tx_id = conn.next_tx
    while tx_id == 0 or tx_id in conn.transactions:
        tx_id = (tx_id + 1) & 0xFFFF_FFFF
    conn.next_tx = (tx_id + 1) & 0xFFFF_FFFF
    engine.begin_transaction(conn, Transaction(tx_id, domain))
    return b"%d\0" % tx_id


def end(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    answer = one_word(message.payload)
    if answer not in (b"T", b"F"):
        raise Fail("EINVAL")
    if tx is None:
        raise Fail("ENOENT")
    engine.end_transaction(conn, tx)
    if answer == b"F":
        return OK
    if tx.failed:
        raise Fail("ENOMEM")
    _check(engine, conn, tx)
    engine.commit(conn, tx)
    return OK


def _check(engine: Engine, conn: Connection, tx: Transaction) -> None:
    """EAGAIN if a node it looked at is not as it was; before that, for each domain whose nodes change in
    number, ENOMEM if it is gone, ENOSPC if it comes to its quota, one node earlier than outside of
    transactions (transaction_fix_domains)."""
    for domid, delta in tx.nodes.items():
        if not engine.exists(domid):
            raise Fail("ENOMEM")
        domain = engine.domain(domid)
        limit = domain.quotas.nodes if tx.created and conn.guest and domid else 0
        if limit and domain.nodes + delta >= limit:
            raise Fail("ENOSPC")
    if tx.outdated(engine.nodes):
        raise Fail("EAGAIN")


HANDLERS: dict[int, Handler] = {
    Op.WATCH: watch,
    Op.UNWATCH: unwatch,
    Op.RESET_WATCHES: reset_watches,
    Op.TRANSACTION_START: start,
    Op.TRANSACTION_END: end,
}
