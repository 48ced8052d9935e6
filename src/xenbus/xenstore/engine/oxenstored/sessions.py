"""Watches and transactions as oxenstored has them. Pure.

A transaction that changed nothing always ends well. Another merges, if nothing else happened where it read
and wrote; otherwise all its operations are done again on the tree as it is, and must come to the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler
from xenbus.xenstore.engine.oxenstored import events
from xenbus.xenstore.engine.oxenstored.history import Epoch
from xenbus.xenstore.engine.oxenstored.nodes import OPERATIONS
from xenbus.xenstore.engine.oxenstored.parsing import absolute, words_of
from xenbus.xenstore.engine.oxenstored.views import Answer, Transaction
from xenbus.xenstore.engine.sessions import drop_watch
from xenbus.xenstore.wire import OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

# A positive integer of 31 bits in OCaml.
TX_MAX = 0x3FFF_FFFE


# ---- watches ----


def _watch_words(message: Message) -> tuple[bytes, bytes]:
    """Path and token. A transaction is neither looked at nor named in the reply."""
    message.tx_id = 0
    words = words_of(message.payload)
    if len(words) != 3 or words[2]:
        raise Fail("EINVAL")
    return words[0], words[1]


def watch(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> None:
    raw, token = _watch_words(message)
    path = absolute(conn, raw)
    if 0 not in conn.ids and len(conn.watches) > conn.domain.quotas.watches > 0:
        raise Fail("EQUOTA")
    if (path, token) in conn.watches:
        raise Fail("EEXIST")
    engine.watches.add(conn, path, token, -1, len(path) - len(raw))
    conn.domain.watches += 1
    conn.domain.memory += len(path) + len(token)
    engine.reply(conn, message, OK)
    events.tell(engine, conn, raw, token)


def unwatch(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    raw, token = _watch_words(message)
    if not raw:
        raise Fail("EINVAL")
    found = conn.watches.get((raw if raw[:1] in (b"/", b"@") else conn.home + raw, token))
    if found is None:
        raise Fail("ENOENT")
    drop_watch(engine, found)
    return OK


def reset_watches(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    engine.drop_session(conn)
    return OK


# ---- transactions ----


def _next_id(conn: Connection) -> int:
    tx_id = conn.next_tx
    while not 1 <= tx_id <= TX_MAX or tx_id in conn.transactions:
        tx_id = tx_id + 1 if 1 <= tx_id < TX_MAX else 1
    conn.next_tx = tx_id + 1
    return tx_id


def start(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    if tx is not None:
        raise Fail("EBUSY")
    domain = conn.domain
    if 0 not in conn.ids and len(conn.transactions) > domain.quotas.transactions > 0:
        raise Fail("EQUOTA")
    tx_id = _next_id(conn)
    new = conn.transactions[tx_id] = Transaction(tx_id, domain, engine.beside)
    new.store.conflicts.started(new)
    domain.transactions += 1
    return b"%d\0" % tx_id


def end(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    answer = message.payload.split(b"\0", 1)[0]
    if answer not in (b"T", b"F"):
        raise Fail("EINVAL")
    if tx is None:
        raise Fail("ENOENT")
    try:
        if answer == b"T" and tx.changes:
            _commit(conn, tx)
            events.fire(engine, tx)
    finally:
        engine.end_transaction(conn, tx)
    return OK


def _commit(conn: Connection, tx: Transaction) -> None:
    """EAGAIN if it comes to something else on the tree as it is now."""
    store = tx.store
    before = store.history.hold(tx.epoch) if conn.guest else None
    try:
        if tx.merges:
            store.merge(tx)
        elif any(op not in OPERATIONS for op, _, _ in tx.operations):
            _next_id(conn)  # for doing it again, which ends at once
            raise Fail("EAGAIN")
        elif not _works(conn, tx, None):
            store.conflicts.blame(tx, conn, lambda epoch: _works(conn, tx, epoch))
            raise Fail("EAGAIN")
    except Fail:
        if before is not None:
            store.history.release(before)
        raise
    store.conflicts.after(conn, before)


def _works(conn: Connection, tx: Transaction, epoch: Epoch | None) -> bool:
    """Do all of it again: on the tree as it is, for good; or only to see, on the one of `epoch`."""
    trial = Transaction(_next_id(conn) if epoch is None else 0, tx.domain, tx.store, epoch)
    try:
        for op, payload, answer in tx.operations:
            now: Answer
            try:
                now = OPERATIONS[op](trial, conn, payload)
            except Fail as fail:
                now = fail.name
            if now != answer:
                return False
        # With nothing to tell nothing is stored, not even parents made by what failed then.
        if epoch is None and trial.changes:
            trial.store.merge(trial)
    finally:
        trial.release()
    return True


HANDLERS: dict[int, Handler] = {
    Op.WATCH: watch,
    Op.UNWATCH: unwatch,
    Op.RESET_WATCHES: reset_watches,
    Op.TRANSACTION_START: start,
    Op.TRANSACTION_END: end,
}
