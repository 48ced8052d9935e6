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
from xenbus.xenstore.engine.sessions import add_watch, drop_watch, reset_watches
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
    add_watch(engine, conn, path, token, -1, len(path) - len(raw))
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


# ---- transactions ----


def _new_id(conn: Connection, others: int) -> int:
    """EQUOTA for a guest that has too many `others` open."""
    if 0 not in conn.ids and others > conn.domain.quotas.transactions > 0:
        raise Fail("EQUOTA")
    tx_id = conn.next_tx
    while not 1 <= tx_id <= TX_MAX or tx_id in conn.transactions:
        tx_id = tx_id + 1 if 1 <= tx_id < TX_MAX else 1
    conn.next_tx = tx_id + 1
    return tx_id


def start(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    if tx is not None:
        raise Fail("EBUSY")
    tx_id = _new_id(conn, len(conn.transactions))
    new = Transaction(tx_id, conn.domain, engine.beside)
    engine.begin_transaction(conn, new)
    new.store.conflicts.started(new)
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
        elif not _do_again(conn, tx):
            raise Fail("EAGAIN")
    except Fail:
        if before is not None:
            store.history.release(before)
        raise
    store.conflicts.after(conn, before)


def _do_again(conn: Connection, tx: Transaction) -> bool:
    """All of it on the tree as it is, as another transaction; False if anything comes to something else."""
    again = Transaction(_new_id(conn, len(conn.transactions) - 1), tx.domain, tx.store)
    try:
        if any(op not in OPERATIONS for op, _, _ in tx.operations):
            return False
        if not _works(conn, tx, again):
            tx.store.conflicts.blame(tx, conn, lambda epoch: _would_work(conn, tx, epoch))
            return False
        # With nothing to tell nothing is stored, not even parents made by what failed then.
        if again.changes:
            tx.store.merge(again)
        return True
    finally:
        again.release()


def _would_work(conn: Connection, tx: Transaction, epoch: Epoch) -> bool:
    """Whether it would have come to the same on the tree of then."""
    trial = Transaction(0, tx.domain, tx.store, epoch)
    try:
        return _works(conn, tx, trial)
    finally:
        trial.release()


def _works(conn: Connection, tx: Transaction, view: Transaction) -> bool:
    for op, payload, answer in tx.operations:
        now: Answer
        try:
            now = OPERATIONS[op](view, conn, payload)
        except Fail as fail:
            now = fail.name
        if now != answer:
            return False
    return True


HANDLERS: dict[int, Handler] = {
    Op.WATCH: watch,
    Op.UNWATCH: unwatch,
    Op.RESET_WATCHES: reset_watches,
    Op.TRANSACTION_START: start,
    Op.TRANSACTION_END: end,
}
