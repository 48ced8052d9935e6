"""Operations on nodes as oxenstored does them: each once on a view, so that a commit can do it again. Pure.

Who is domain 0, also by SET_TARGET, may do everything, but a value too long is refused to it too. A new
node has its parent's entries, owner included. What was made before an error stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler
from xenbus.xenstore.engine.oxenstored import events
from xenbus.xenstore.engine.oxenstored.parsing import (
    NOBODY,
    canonical,
    domid_of,
    first_digits,
    one_path,
    shown,
    words_of,
)
from xenbus.xenstore.engine.oxenstored.views import Change, Store, Transaction, View
from xenbus.xenstore.engine.tree import LETTERS, READ, WRITE, Node, Perms, parent_of
from xenbus.xenstore.wire import OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

Operation = Callable[[View, Connection, bytes], bytes]


def _need(conn: Connection, perms: Perms, want: int) -> None:
    if not events.allows(conn.ids, perms, want):
        raise Fail("EACCES")


def _check_room(view: View, conn: Connection, owner: int) -> None:
    """EQUOTA if `owner` has as many nodes as this client may make for it."""
    limit = conn.domain.quotas.nodes
    if 0 not in conn.ids and 0 < owner < NOBODY and view.owned(owner) >= limit > 0:
        raise Fail("EQUOTA")


def _found(view: View, conn: Connection, path: bytes) -> Node:
    node = view.get(path)
    if node is None:
        raise Fail("ENOENT")
    _need(conn, node.perms, READ)
    view.saw(path)
    return node


# ---- reading ----


def read(view: View, conn: Connection, payload: bytes) -> bytes:
    return _found(view, conn, canonical(conn, one_path(payload))).value


def directory(view: View, conn: Connection, payload: bytes) -> bytes:
    children = _found(view, conn, canonical(conn, one_path(payload))).children
    return b"\0".join(sorted(children)) + b"\0" if children else b""


def get_perms(view: View, conn: Connection, payload: bytes) -> bytes:
    perms = _found(view, conn, canonical(conn, one_path(payload))).perms
    return b"".join([b"%c%d\0" % (b"nrwb"[access], shown(domid)) for access, domid in perms])


def get_domain_path(view: View, conn: Connection, payload: bytes) -> bytes:
    words = words_of(payload)
    if len(words) != 2 or words[1]:
        raise Fail("EINVAL")
    return b"/local/domain/%d\0" % first_digits(words[0])


# ---- writing ----


def _make_parents(view: View, conn: Connection, path: bytes) -> None:
    missing = []
    above = parent_of(path)
    while view.get(above) is None:
        missing.append(above)
        above = parent_of(above)
    for here in reversed(missing):
        _make(view, conn, here)


def _make(view: View, conn: Connection, path: bytes) -> None:
    above = parent_of(path)
    parent = view.get(above)
    if parent is None:
        raise Fail("ENOENT")
    _check_room(view, conn, parent.perms[0][1])
    _need(conn, parent.perms, WRITE)
    if b"\0" in path:
        raise Fail("EINVAL")
    view.add(path, parent, b"")
    view.wrote(above)


def write(view: View, conn: Connection, payload: bytes) -> bytes:
    raw, found, value = payload.partition(b"\0")
    if not found:
        raise Fail("EINVAL")
    path = canonical(conn, raw)
    _make_parents(view, conn, path)
    node = view.get(path)
    if len(value) > conn.domain.quotas.node_size > 0:
        raise Fail("E2BIG")
    if node is not None:
        _need(conn, node.perms, WRITE)
        view.set_value(path, node, value)
        view.wrote(path)
    else:
        _make(view, conn, path)
        node = view.get(path)
        assert node is not None
        view.set_value(path, node, value)
    view.changes.append((Change.WRITE, path))
    return OK


def mkdir(view: View, conn: Connection, payload: bytes) -> bytes:
    path = canonical(conn, one_path(payload))
    _make_parents(view, conn, path)
    node = view.get(path)
    if node is None:
        _make(view, conn, path)
    elif path == b"/":
        view.wrote(path)
    else:
        _need(conn, node.perms, WRITE)
        return OK
    view.changes.append((Change.WRITE, path))
    return OK


def rm(view: View, conn: Connection, payload: bytes) -> bytes:
    path = canonical(conn, one_path(payload))
    above = parent_of(path)
    if view.get(above) is None:
        raise Fail("ENOENT")
    node = view.get(path)
    if node is None:
        return OK
    _need(conn, node.perms, WRITE)
    view.remove(path)
    view.wrote(above)
    view.changes.append((Change.RM, path))
    return OK


def _parse_perms(words: list[bytes]) -> Perms:
    if not words:
        raise Fail("EINVAL")
    perms = []
    for word in words:
        access = LETTERS.get(word[:1])
        if access is None:
            raise Fail("EINVAL")
        perms.append((access, domid_of(word[1:])))
    return tuple(perms)


def set_perms(view: View, conn: Connection, payload: bytes) -> bytes:
    raw, found, rest = payload.partition(b"\0")
    if not found:
        raise Fail("EINVAL")
    perms = _parse_perms(rest.split(b"\0")[:-1])
    path = canonical(conn, raw)
    node = view.get(path)
    if node is None:
        raise Fail("ENOENT")
    if 0 not in conn.ids:
        owner = node.perms[0][1]
        if owner != perms[0][1]:
            raise Fail("EACCES")
        if path == b"/":
            _need(conn, node.perms, WRITE)
        elif owner not in conn.ids:
            raise Fail("EACCES")
    view.set_perms(path, node, perms)
    view.wrote(path)
    view.changes.append((Change.SET_PERMS, path))
    return OK


def unknown(view: View, conn: Connection, payload: bytes) -> bytes:
    raise Fail("ENOSYS")


# What a commit can do again (function_of_type_simple_op).
OPERATIONS: dict[int, Operation] = {
    Op.DIRECTORY: directory,
    Op.READ: read,
    Op.GET_PERMS: get_perms,
    Op.GET_DOMAIN_PATH: get_domain_path,
    Op.WRITE: write,
    Op.MKDIR: mkdir,
    Op.RM: rm,
    Op.SET_PERMS: set_perms,
    Op.WATCH_EVENT: unknown,
    Op.ERROR: unknown,
}
_CHANGING = (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)


def _reader(operation: Operation) -> Handler:
    def handler(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
        return operation(engine.beside if tx is None else tx, conn, message.payload)

    return handler


def _writer(operation: Operation) -> Handler:
    """The reply comes before the events."""

    def handler(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
        if tx is not None:
            return operation(tx, conn, message.payload)
        store: Store = engine.beside
        store.begin()
        before = store.conflicts.before(conn)
        try:
            operation(store, conn, message.payload)
        finally:
            store.conflicts.after(conn, before)
        engine.reply(conn, message, OK)
        events.fire(engine, store)
        return None

    return handler


HANDLERS: dict[int, Handler] = {
    op: (_writer if op in _CHANGING else _reader)(operation) for op, operation in OPERATIONS.items()
}
