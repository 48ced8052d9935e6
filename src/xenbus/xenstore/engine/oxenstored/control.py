"""CONTROL (DEBUG there) as oxenstored has it: what it does not know, or may not tell, is OK. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler
from xenbus.xenstore.engine.oxenstored.parsing import number, words_of
from xenbus.xenstore.engine.oxenstored.views import Transaction, View
from xenbus.xenstore.engine.update import live_update
from xenbus.xenstore.wire import OK, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

# Gives the payload of the reply; b"" for OK.
Word = Callable[["Engine", View, list[bytes]], bytes]


def _print(engine: Engine, view: View, words: list[bytes]) -> bytes:
    if engine.hooks is not None:
        engine.hooks.log("control: " + words[0].decode("utf-8", "replace"))
    return b""


def _quota(engine: Engine, view: View, words: list[bytes]) -> bytes:
    domid = number(words[0])
    owned = view.owned(domid) if domid in engine.domains else 0
    if not owned:
        return b"dom%d quota: not set\0" % domid
    return b"dom%d quota: %d/%d\0" % (domid, owned, engine.quotas.nodes)


def _watches(engine: Engine, view: View, words: list[bytes]) -> bytes:
    """Guests' first, then those of sockets, by number."""
    lines: list[bytes] = []
    anonymous = 0
    for domid, domain in sorted(engine.domains.items(), key=lambda item: (not item[0], item[0])):
        for conn in domain.connections:
            anonymous += not domid
            name = b"D%d" % domid if domid else b"A%d" % anonymous
            lines += [
                b"watch %s: %s %s\n" % (name, watch.path[watch.prefix :], watch.token)
                for watch in conn.watches.values()
            ]
    return b"".join(lines) + b"\0"


def _gfn(engine: Engine, view: View, words: list[bytes]) -> bytes:
    gfn = engine.beside.rings.get(number(words[0]))
    return b"" if gfn is None else b"%d\0" % gfn


def _xenbus(engine: Engine, view: View, words: list[bytes]) -> bytes:
    domain = engine.domains.get(number(words[0]))
    if domain is None or not domain.introduced:
        return b""
    waiting = sum(len(conn.out) for conn in domain.connections)
    return b"xenbus: %d packets, %d bytes wait" % (waiting, sum(conn.queued for conn in domain.connections))


_COMMANDS: dict[bytes, Word] = {
    b"print": _print,
    b"quota": _quota,
    b"watches": _watches,
    b"mfn": _gfn,
    b"xenbus": _xenbus,
}


def control(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
    words = words_of(message.payload)
    if words[0] == b"live-update" and 0 in conn.ids:
        answer = live_update(engine, conn, message, [word.decode("utf-8", "replace") for word in words[1:-1]])
        return None if answer is None else answer.encode() + b"\0"
    command = _COMMANDS.get(words[0])
    if 0 not in conn.ids or command is None:
        return OK
    try:
        return command(engine, engine.beside if tx is None else tx, words[1:]) or OK
    except (Fail, IndexError):
        return OK


HANDLERS: dict[int, Handler] = {Op.CONTROL: control}
