"""Operations on domains: INTRODUCE, RELEASE, RESUME, SET_TARGET, paths, features, quotas. Pure.

Follows domain.c of xenstored; mapping and binding are the daemon's (Hooks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenbus.errors import UsageError
from xenbus.xenstore.engine import nodes
from xenbus.xenstore.engine.connection import FEATURES, Connection, Domain
from xenbus.xenstore.engine.dispatch import Fail, Handler, domid_of, number_of, one_word, words_of
from xenbus.xenstore.engine.quotas import QUOTAS
from xenbus.xenstore.engine.transactions import Transaction
from xenbus.xenstore.engine.tree import IGNORED, Node, Perms, child_path, parent_of
from xenbus.xenstore.wire import DOMID_FIRST_RESERVED, OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

# xen/include/public/xen.h
DOMID_SELF = 0x7FF0
INTRODUCE_DOMAIN = b"@introduceDomain"
RELEASE_DOMAIN = b"@releaseDomain"
_SPECIAL = (INTRODUCE_DOMAIN, RELEASE_DOMAIN)
_NOBODY: Perms = ((0, 0),)


def plant(engine: Engine) -> None:
    """What xenstored starts with (setup_structure)."""
    for path in (b"/", b"/tool", b"/tool/xenstored", *_SPECIAL):
        engine.put(None, path, Node(b"", _NOBODY, 0))
        if path[:1] == b"/" and path != b"/":
            name = path[path.rindex(b"/") + 1 :]
            engine.nodes[parent_of(path)].add_child(name)
            engine.domain(0).memory += len(name) + 1


def introduce(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
    words = words_of(message.payload)
    if len(words) < 3:
        raise Fail("EINVAL")
    domid, port = domid_of(words[0]), number_of(words[2])
    if not 0 < domid < DOMID_FIRST_RESERVED or not port:
        raise Fail("EINVAL")
    # Signed decimal by the protocol, and not looked at: grant 1 is the ring.
    gfn = words[1].removeprefix(b"-")
    if not gfn.isdigit():
        raise Fail("EINVAL")
    if engine.hooks is None:
        engine.introduced(domid)
        return OK

    def done(error: str | None) -> None:
        if error is not None:
            engine.fail(conn, message, error)
            return
        engine.introduced(domid)
        engine.reply(conn, message, OK)

    engine.hooks.introduce(domid, int(gfn), port, done)
    return None


def _introduced(engine: Engine, payload: bytes) -> Domain:
    """The guest that a request names; EINVAL for domain 0, ENOENT unless introduced (onearg_domain)."""
    domid = domid_of(one_word(payload))
    if domid == 0:
        raise Fail("EINVAL")
    return _connected(engine, domid)


def served(engine: Engine, domid: int) -> Domain | None:
    """The domain, if it was introduced."""
    domain = engine.domains.get(domid)
    return domain if domain is not None and domain.introduced else None


def _connected(engine: Engine, domid: int) -> Domain:
    domain = served(engine, domid)
    if domain is None:
        raise Fail("ENOENT")
    return domain


def release(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    domain = _introduced(engine, message.payload)
    if engine.hooks is not None:
        engine.hooks.release(domain.domid)
    engine.domain_died(domain.domid)
    return OK


def resume(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    _introduced(engine, message.payload).shutdown = False
    return OK


def get_domain_path(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    return b"/local/domain/%d\0" % domid_of(one_word(message.payload))


def is_introduced(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    domid = domid_of(one_word(message.payload))
    return b"T\0" if domid == DOMID_SELF or served(engine, domid) else b"F\0"


def set_target(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) < 2:
        raise Fail("EINVAL")
    domid, target = domid_of(words[0]), domid_of(words[1])
    domain = _connected(engine, domid)
    engine.set_target(domain, _connected(engine, target).domid)
    return OK


def introduced(engine: Engine, domid: int) -> None:
    domain = engine.domain(domid)
    if not domain.introduced:
        domain.introduced = True
        domain.shutdown = False
        engine.fire_special(INTRODUCE_DOMAIN, domid)


def shutdown(engine: Engine, domid: int) -> None:
    """@releaseDomain, once until RESUME."""
    domain = served(engine, domid)
    if domain is not None and not domain.shutdown:
        domain.shutdown = True
        engine.fire_special(RELEASE_DOMAIN, domid)


def died(engine: Engine, domid: int) -> None:
    if not domid:
        return
    domain = engine.domains.pop(domid, None)
    if domain is None:
        # It may be named all the same, in permissions that a guest has set.
        forget(engine, domid)
        return
    for conn in list(domain.connections):
        engine.disconnect(conn)
    for other in engine.domains.values():
        if other.target == domid:
            engine.set_target(other, None)
    forget(engine, domid)
    engine.domains.pop(domid, None)
    if domain.introduced:
        engine.fire_special(RELEASE_DOMAIN, domid)


def forget(engine: Engine, domid: int) -> None:
    """A dead domain's nodes go with all below them (domain_tree_remove), and its entries in other nodes'
    lists are there to be seen only, so that the next one of that number does not inherit them
    (domain_adjust_node_perms). A node does not change by that: its generation stays."""
    for name in _SPECIAL:
        _forget_special(engine, name, domid)
    # Most nodes share few lists.
    ignored: dict[Perms, Perms] = {}
    owned: set[bytes] = set()
    for path, node in engine.nodes.items():
        perms = node.perms
        new = ignored.get(perms)
        if new is None:
            new = ignored[perms] = _without(perms, domid)
        if new is not perms:
            node.perms = new
            engine.noted(path)
        if perms[0][1] == domid:
            owned.add(path)
    for domain in engine.domains.values():
        for conn in domain.connections:
            for tx in conn.transactions.values():
                for node in tx.written():
                    node.perms = _without(node.perms, domid)
    if b"/" in owned:
        # xenstored would lose everything.
        owned.remove(b"/")
        nodes.set_node_perms(engine, None, b"/", engine.nodes[b"/"], _NOBODY)
    for path in _in_order(engine, owned):
        nodes.remove_tree(engine, None, None, path)


def _without(perms: Perms, domid: int) -> Perms:
    """The same object if there is no entry for that domain behind the first."""
    if all(entry[1] != domid for entry in perms[1:]):
        return perms
    rest = ((access | IGNORED if one == domid else access, one) for access, one in perms[1:])
    return (perms[0], *rest)


def _forget_special(engine: Engine, name: bytes, domid: int) -> None:
    node = engine.nodes[name]
    (access, owner), *rest = node.perms
    if any(one == domid for _, one in node.perms):
        perms = ((access, 0 if owner == domid else owner), *(entry for entry in rest if entry[1] != domid))
        nodes.set_node_perms(engine, None, name, node, perms)


def _in_order(engine: Engine, owned: set[bytes]) -> list[bytes]:
    """The topmost of these nodes, as one comes by them who walks the tree: events come in that order."""
    above: set[bytes] = set()
    for path in owned:
        while (path := parent_of(path)) not in above:
            above.add(path)
    found: list[bytes] = []
    stack = [b"/"]
    while stack:
        path = stack.pop()
        if path in owned:
            found.append(path)
        elif path in above:
            stack += [child_path(path, name) for name in reversed(engine.nodes[path].children or {})]
    return found


# ---- features and quotas ----


def _existing(engine: Engine, domid: int) -> Domain:
    if not engine.exists(domid):
        raise Fail("ENOENT")
    return engine.domain(domid)


def get_feature(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if not words or words == [b""]:
        return b"%d\0" % engine.features_of(conn)
    if conn.guest:
        raise Fail("EACCES")
    if len(words) > 1:
        raise Fail("EINVAL")
    return b"%d\0" % _existing(engine, domid_of(words[0])).features


def set_feature(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) != 2:
        raise Fail("EINVAL")
    domain, features = _existing(engine, domid_of(words[0])), number_of(words[1])
    if domain.introduced:
        raise Fail("EBUSY")
    if features & ~FEATURES:
        raise Fail("EINVAL")
    domain.features = features
    return OK


def get_quota(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if not words or words == [b""]:
        return " ".join(QUOTAS).encode() + b"\0"
    if len(words) > 2:
        raise Fail("EINVAL")
    quotas = engine.quotas if len(words) == 1 else _existing(engine, domid_of(words[0])).quotas
    try:
        return b"%d\0" % quotas.get(words[-1].decode("ascii", "replace"))
    except UsageError:
        raise Fail("EINVAL") from None


def set_quota(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    words = words_of(message.payload)
    if len(words) not in (2, 3):
        raise Fail("EINVAL")
    quotas = engine.quotas if len(words) == 2 else _existing(engine, domid_of(words[0])).quotas
    try:
        quotas.set(words[-2].decode("ascii", "replace"), number_of(words[-1]))
    except UsageError:
        raise Fail("EINVAL") from None
    return OK


HANDLERS: dict[int, Handler] = {
    Op.INTRODUCE: introduce,
    Op.RELEASE: release,
    Op.RESUME: resume,
    Op.GET_DOMAIN_PATH: get_domain_path,
    Op.IS_DOMAIN_INTRODUCED: is_introduced,
    Op.SET_TARGET: set_target,
    Op.GET_FEATURE: get_feature,
    Op.SET_FEATURE: set_feature,
    Op.GET_QUOTA: get_quota,
    Op.SET_QUOTA: set_quota,
}

DOM0_ONLY = (
    Op.CONTROL,
    Op.INTRODUCE,
    Op.RELEASE,
    Op.RESUME,
    Op.IS_DOMAIN_INTRODUCED,
    Op.SET_TARGET,
    Op.SET_FEATURE,
    Op.GET_QUOTA,
    Op.SET_QUOTA,
)
