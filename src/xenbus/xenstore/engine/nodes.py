"""Operations on nodes: READ, WRITE, MKDIR, RM, DIRECTORY(_PART), GET_PERMS, SET_PERMS. Pure.

Each follows its function in xenstored's core.c (do_read, do_write, ...): what is looked at, in which
order, decides which error is seen and what a transaction remembers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import FEATURE_DOMID_ANY, Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler, atoi, domid_of, one_word, words_of
from xenbus.xenstore.engine.transactions import FIRE_EXACT, FIRE_SUBTREE, Transaction
from xenbus.xenstore.engine.tree import (
    HEADER_COST,
    IGNORED,
    LETTERS,
    OWNER,
    PERM_COST,
    READ,
    WRITE,
    Node,
    Perms,
    access_of,
    parent_of,
)
from xenbus.xenstore.wire import DOMID_ANY, OK, PAYLOAD_MAX, Message, Op
from xenbus.xenstore.wire.paths import match_absolute, match_special

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

_home = re.compile(rb"/local/domain/[0-9]{1,5}/").match


def canonical(conn: Connection, raw: bytes, *, special: bool = False) -> bytes:
    """The absolute path that a client means by `raw`; EINVAL for characters, slashes or length."""
    first = raw[:1]
    if first == b"@":
        if not (special and match_special(raw)):
            raise Fail("EINVAL")
    else:
        if first != b"/":
            raw = conn.home + raw
        if not match_absolute(raw):
            raise Fail("EINVAL")
    # The one limit that is domain 0's as well (is_valid_nodename of 4.17).
    limit = conn.domain.quotas.path_max
    if limit and len(raw) > limit:
        home = _home(raw)
        if len(raw) - (home.end() if home else 0) > limit:
            raise Fail("EINVAL")
    return raw


def _refusal(
    engine: Engine, conn: Connection, tx: Transaction | None, path: bytes, name: str, want: int
) -> Fail:
    """`name`, if the nearest ancestor lets this client know; else EACCES (errno_from_parents)."""
    if not conn.guest and tx is None:
        return Fail(name)
    while True:
        path = parent_of(path)
        node = engine.lookup(tx, path)
        if node is not None:
            break
    if not conn.guest or access_of(node.perms, conn.ids) & want:
        return Fail(name)
    return Fail("EACCES")


def find(engine: Engine, conn: Connection, tx: Transaction | None, path: bytes, want: int) -> Node:
    """The node, if it is there and the right is held; else the error that may be told (get_node)."""
    node = engine.nodes.get(path) if tx is None else engine.lookup(tx, path)
    if node is None:
        raise _refusal(engine, conn, tx, path, "ENOENT", want)
    if conn.guest and access_of(node.perms, conn.ids) & want != want:
        raise _refusal(engine, conn, tx, path, "EACCES", want)
    return node


# ---- reading ----


def read(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    payload = message.payload
    if tx is None and payload[-1:] == b"\0":
        # What is in the tree under this very name needs no further looking at.
        path = payload[:-1]
        first = path[:1]
        if conn.guest:
            node = None if first == b"@" else engine.nodes.get(path if first == b"/" else conn.home + path)
            if (
                node is not None
                and access_of(node.perms, conn.ids) & READ
                and len(path) <= conn.domain.quotas.path_max
            ):
                return node.value
        elif first == b"/":
            node = engine.nodes.get(path)
            if node is not None:
                return node.value
    return find(engine, conn, tx, canonical(conn, one_word(payload)), READ).value


def _names(node: Node) -> bytes:
    return b"\0".join(node.children) + b"\0" if node.children else b""


def directory(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    node = find(engine, conn, tx, canonical(conn, one_word(message.payload)), READ)
    if node.childlen > PAYLOAD_MAX:
        raise Fail("E2BIG")
    return _names(node)


def directory_part(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) != 2:
        raise Fail("EINVAL")
    node = find(engine, conn, tx, canonical(conn, words[0]), READ)
    offset = atoi(words[1])
    head = b"%d\0" % node.generation
    if not 0 <= offset < node.childlen:
        return head + b"\0"
    names = _names(node)
    room = PAYLOAD_MAX - len(head) - 1
    if len(names) - offset <= room:
        return head + names[offset:] + b"\0"
    return head + names[offset : names.rfind(b"\0", offset, offset + room) + 1]


def get_perms(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    path = canonical(conn, one_word(message.payload), special=True)
    perms = find(engine, conn, tx, path, READ).perms
    return b"".join([b"%c%d\0" % (b"nrwb"[access & 3], domid) for access, domid in perms])


# ---- writing ----


def _charge(engine: Engine, conn: Connection, owner: int, size: int) -> None:
    """ENOMEM if a guest would take `owner` past the memory that a domain may have."""
    limit = conn.domain.quotas.memory
    domain = engine.domains.get(owner)
    if limit and size > 0 and domain is not None and domain.memory + size > limit:
        raise Fail("ENOMEM")


def _check_size(conn: Connection, tx: Transaction | None, size: int) -> None:
    """ENOSPC for a node of a guest's that gets too large; a transaction can then only fail (write_node)."""
    limit = conn.domain.quotas.node_size
    if limit and size >= limit:
        if tx is not None:
            tx.failed = True
        raise Fail("ENOSPC")


def create(engine: Engine, conn: Connection, tx: Transaction | None, path: bytes, value: bytes) -> Node:
    """A node with the parents it lacks, which have its nearest ancestor's entries (construct_node). Every
    quota is looked at before anything changes."""
    missing = [path]
    above = parent_of(path)
    while (parent := engine.lookup(tx, above)) is None:
        missing.append(above)
        above = parent_of(above)
    if tx is not None:
        # Whether it may or not: the quota of nodes is looked at in the end (ta_node_created).
        tx.created = True
    perms = parent.perms
    if conn.guest:
        perms = ((perms[0][0], conn.domid), *perms[1:])
        _check_creation(engine, conn, tx, parent, missing, perms, value)
    if tx is not None or parent.snaps:
        parent = engine.modify(tx, above, parent)
    else:
        engine.generation += 1
        parent.generation = engine.generation
    for name in reversed(missing):
        base = name[name.rindex(b"/") + 1 :]
        parent.add_child(base)
        if tx is None:
            # Not within a transaction: its copy of a node may have an owner that is gone.
            engine.domain(parent.perms[0][1]).memory += len(base) + 1
        node = Node(value if name is path else b"", perms, 0)
        engine.put(tx, name, node)
        parent = node
    return parent


def _check_creation(
    engine: Engine,
    conn: Connection,
    tx: Transaction | None,
    parent: Node,
    missing: list[bytes],
    perms: Perms,
    value: bytes,
) -> None:
    quotas, domain = conn.domain.quotas, conn.domain
    # What a transaction makes is counted at its end (acc_fix_domains).
    more = len(missing) if tx is None else 1
    if quotas.nodes and domain.nodes + more > quotas.nodes:
        raise Fail("ENOSPC")
    names = [len(name) - name.rindex(b"/") for name in missing]
    base = HEADER_COST + PERM_COST * len(perms)
    _check_size(conn, tx, base + len(value))
    _check_size(conn, tx, parent.size + names[-1])
    for length in names[:-1]:
        _check_size(conn, tx, base + length)
    total = len(value) + sum(len(name) + base for name in missing) + sum(names)
    _charge(engine, conn, conn.domid, total)


def write(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    raw, found, value = message.payload.partition(b"\0")
    if not found:
        raise Fail("EINVAL")
    path = raw
    node = engine.nodes.get(raw) if tx is None and not conn.guest and raw[:1] == b"/" else None
    if node is None:
        path = canonical(conn, raw)
        try:
            node = find(engine, conn, tx, path, WRITE)
        except Fail as fail:
            if fail.name != "ENOENT":
                raise
            node = create(engine, conn, tx, path, value)
            _changed(engine, conn, tx, path, node.perms)
            return OK
    delta = len(value) - len(node.value)
    owner = node.perms[0][1]
    if conn.guest:
        _check_size(conn, tx, node.size + delta)
        _charge(engine, conn, owner, delta)
    node = engine.modify(tx, path, node)
    node.value = value
    if tx is None:
        engine.domains[owner].memory += delta
    _changed(engine, conn, tx, path, node.perms)
    return OK


def _changed(
    engine: Engine,
    conn: Connection,
    tx: Transaction | None,
    path: bytes,
    perms: Perms,
    old: Perms | None = None,
) -> None:
    if tx is None:
        engine.fire(conn, path, perms, old)
    else:
        tx.queue_event(path, FIRE_SUBTREE)


def mkdir(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    path = canonical(conn, one_word(message.payload))
    try:
        find(engine, conn, tx, path, WRITE)
    except Fail as fail:
        if fail.name != "ENOENT":
            raise
        node = create(engine, conn, tx, path, b"")
        _changed(engine, conn, tx, path, node.perms)
    return OK


def rm(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    path = canonical(conn, one_word(message.payload))
    try:
        find(engine, conn, tx, path, WRITE)
    except Fail as fail:
        # Gone already is fine, if there is a parent that it could have been in.
        if fail.name == "ENOENT" and engine.lookup(tx, parent_of(path)) is not None:
            return OK
        raise
    if path == b"/":
        raise Fail("EINVAL")
    remove_tree(engine, conn, tx, path)
    return OK


def remove_tree(engine: Engine, conn: Connection | None, tx: Transaction | None, path: bytes) -> None:
    """The node with all below it. Each node fires for watches on itself, the root for those above too."""
    above = parent_of(path)
    parent = engine.lookup(tx, above)
    try:
        doomed = engine.subtree(tx, path)
    except Fail:
        # Past the quota of a transaction's nodes: what rm_node makes of it.
        raise Fail("EIO") from None
    # First the events: who may hear of a node is judged by the tree as it still is.
    for here, node in doomed:
        if tx is None:
            engine.fire(conn, here, node.perms, exact=here != path)
    for here, node in doomed:
        engine.remove(tx, here, node)
        if tx is not None:
            tx.queue_event(here, FIRE_SUBTREE if here == path else FIRE_EXACT)
    if parent is not None:
        parent = engine.modify(tx, above, parent)
        name = path[path.rindex(b"/") + 1 :]
        parent.drop_child(name)
        if tx is None:
            engine.domain(parent.perms[0][1]).memory -= len(name) + 1


# ---- permissions ----


def _parse_perms(engine: Engine, conn: Connection, words: list[bytes]) -> Perms:
    """Entries for domains that do not exist are kept but ignored (domain_alloc_permrefs)."""
    entries = []
    for word in words:
        access = LETTERS.get(word[:1])
        if access is None:
            raise Fail("EINVAL")
        entries.append((access, domid_of(word[1:])))
    perms = []
    for access, domid in entries:
        if domid == DOMID_ANY:
            known = engine.features_of(conn) & FEATURE_DOMID_ANY != 0
        else:
            known = engine.exists(domid)
            if known and not conn.guest:
                # There from now on (domain_alloc_permrefs). A guest does not get to fill the table.
                engine.domain(domid)
        perms.append((access if known else access | IGNORED, domid))
    return tuple(perms)


def set_perms(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) < 2:
        raise Fail("EINVAL")
    limit = conn.domain.quotas.node_permissions
    if conn.guest and limit and len(words) - 1 > limit:
        raise Fail("ENOSPC")
    perms = _parse_perms(engine, conn, words[1:])
    if perms[0][0] & IGNORED:
        raise Fail("ENOENT")
    if words[0][:1] == b"@":
        _set_special_perms(engine, conn, words[0], perms)
        return OK
    path = canonical(conn, words[0])
    node = find(engine, conn, tx, path, WRITE | OWNER)
    old = node.perms
    if conn.guest:
        if perms[0][1] != old[0][1]:
            raise Fail("EPERM")
        growth = PERM_COST * (len(perms) - len(old))
        _check_size(conn, tx, node.size + growth)
        _charge(engine, conn, old[0][1], growth)
    set_node_perms(engine, tx, path, node, perms)
    _changed(engine, conn, tx, path, perms, old)
    return OK


def _set_special_perms(engine: Engine, conn: Connection, name: bytes, perms: Perms) -> None:
    """At once, in a transaction too; nobody is told, and who owns it may give it away (set_perms_special)."""
    node = engine.nodes.get(name)
    if node is None:
        raise Fail("EINVAL")
    if conn.guest and not access_of(node.perms, conn.ids) & OWNER:
        raise Fail("EACCES")
    set_node_perms(engine, None, name, node, perms)


def set_node_perms(engine: Engine, tx: Transaction | None, path: bytes, node: Node, perms: Perms) -> None:
    """New entries; count and memory move with the owner."""
    old_owner, new_owner = node.perms[0][1], perms[0][1]
    node = engine.modify(tx, path, node)
    if tx is None:
        before, after = engine.domain(old_owner), engine.domain(new_owner)
        before.nodes -= 1
        before.memory -= len(path) + node.size
        node.perms = perms
        after.nodes += 1
        after.memory += len(path) + node.size
    else:
        node.perms = perms
        tx.count(old_owner, -1)
        tx.count(new_owner, 1)


HANDLERS: dict[int, Handler] = {
    Op.READ: read,
    Op.DIRECTORY: directory,
    Op.DIRECTORY_PART: directory_part,
    Op.GET_PERMS: get_perms,
    Op.WRITE: write,
    Op.MKDIR: mkdir,
    Op.RM: rm,
    Op.SET_PERMS: set_perms,
}
