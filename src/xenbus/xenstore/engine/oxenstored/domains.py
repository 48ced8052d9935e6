"""Operations on domains as oxenstored has them, and what goes with a dead one. Pure.

A domain is what was introduced. Its nodes go without an event; an introduction names its ring, and the
same ring with another port makes only the event channel anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler
from xenbus.xenstore.engine.domains import (
    DOMID_SELF,
    INTRODUCE_DOMAIN,
    RELEASE_DOMAIN,
    served,
)
from xenbus.xenstore.engine.oxenstored import events
from xenbus.xenstore.engine.oxenstored.parsing import NOBODY, first_digits, number, ocaml_number, words_of
from xenbus.xenstore.engine.oxenstored.views import Store, Transaction
from xenbus.xenstore.wire import DOMID_FIRST_RESERVED, OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine


def _need_dom0(conn: Connection) -> None:
    if 0 not in conn.ids:
        raise Fail("EACCES")


def introduce(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
    _need_dom0(conn)
    words = words_of(message.payload)
    if len(words) < 3:
        raise Fail("EINVAL")
    port, gfn = number(words[2]), ocaml_number(words[1])
    if gfn is None:
        raise Fail("EIO")
    domid = number(words[0])
    rings: dict[int, int] = engine.beside.rings
    known = rings.get(domid)
    if known is not None and known != gfn:
        raise Fail("EINVAL")
    if domid == 0 and known is not None:
        return OK
    if known is None and not 0 < domid < DOMID_FIRST_RESERVED:
        raise Fail("EINVAL")

    def done(error: str | None) -> None:
        if error is not None:
            engine.fail(conn, message, "EINVAL")
            return
        rings[domid] = gfn
        engine.introduced(domid)
        engine.reply(conn, message, OK)

    if engine.hooks is None:
        done(None)
    elif known is not None:
        engine.hooks.rebind(domid, port, done)
    else:
        engine.hooks.introduce(domid, gfn, port, done)
    return None


def introduced(engine: Engine, domid: int) -> None:
    domain = engine.domain(domid)
    domain.shutdown = False
    if not domain.introduced:
        domain.introduced = True
        events.fire_special(engine, INTRODUCE_DOMAIN)


def release(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    _need_dom0(conn)
    words = words_of(message.payload)
    if len(words) != 2 or words[1]:
        raise Fail("EINVAL")
    domid = number(words[0])
    if domid == 0:
        # There it takes the whole tree and domain 0's own ring away.
        raise Fail("EINVAL")
    known = served(engine, domid)
    if engine.hooks is not None and known:
        engine.hooks.release(domid)
    bury(engine, domid)
    if not known:
        raise Fail("EINVAL")
    events.fire_special(engine, RELEASE_DOMAIN)
    return OK


def died(engine: Engine, domid: int) -> None:
    """The hypervisor says that it is gone. Of those that were not introduced nothing is known."""
    if not domid or not served(engine, domid):
        return
    bury(engine, domid)
    events.fire_special(engine, RELEASE_DOMAIN)


def shutdown(engine: Engine, domid: int) -> None:
    """It stopped: each time that it is noticed."""
    domain = served(engine, domid)
    if domain is not None:
        domain.shutdown = True
        events.fire_special(engine, RELEASE_DOMAIN)


def bury(engine: Engine, domid: int) -> None:
    """Its connections, its nodes with all below them, and its entries in other lists go; no event tells.
    The tree is a new one then: no transaction that is open can merge."""
    domain = engine.domains.pop(domid, None)
    if domain is not None:
        for conn in list(domain.connections):
            engine.disconnect(conn)
    store: Store = engine.beside
    store.rings.pop(domid, None)
    if domain is not None:
        store.conflicts.gone(domain)
    store.begin()
    owned: list[bytes] = []
    for path, node in list(engine.nodes.items()):
        first, *others = node.perms
        if path == b"/" and first[1] == domid:
            # It cannot go.
            store.set_perms(path, node, ((first[0], NOBODY), *others))
        elif path != b"/" and first[1] in (domid, NOBODY):
            owned.append(path)
        elif any(one == domid for _, one in others):
            store.set_perms(path, node, (first, *(entry for entry in others if entry[1] != domid)))
    for path in owned:
        if path in engine.nodes:
            store.remove(path)
    if store.history.newest is not None:
        store.history.newest.everything = True
    engine.domains.pop(domid, None)


def resume(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    _need_dom0(conn)
    if not served(engine, number(words_of(message.payload)[0])):
        raise Fail("EINVAL")
    return OK


def is_introduced(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    _need_dom0(conn)
    domid = number(words_of(message.payload)[0])
    return b"T\0" if domid == DOMID_SELF or served(engine, domid) else b"F\0"


def set_target(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes:
    """The other one need not be there, and stays the target when it is gone."""
    _need_dom0(conn)
    words = words_of(message.payload)
    if len(words) != 3 or words[2]:
        raise Fail("EINVAL")
    domid, target = first_digits(words[0]), first_digits(words[1])
    if target >= NOBODY:
        raise Fail("EINVAL")
    domain = served(engine, domid)
    if domain is None:
        raise Fail("ENOENT")
    if domid:
        engine.set_target(domain, target)
    return OK


HANDLERS: dict[int, Handler] = {
    Op.INTRODUCE: introduce,
    Op.RELEASE: release,
    Op.RESUME: resume,
    Op.IS_DOMAIN_INTRODUCED: is_introduced,
    Op.SET_TARGET: set_target,
}
