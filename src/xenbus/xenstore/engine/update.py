"""CONTROL live-update: the words of xenstore-control, in order, and what is refused at once. Pure.

Follows do_control_lu of xenstored: a program, perhaps a command line, then the start. Who replaces the daemon
is asked by Hooks. Any answer but OK says that it did not happen, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail
from xenbus.xenstore.wire import Message

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

# What xenstore-control says if it is not told; of a start without -t nothing is waited for.
TIMEOUT_MAX = 24 * 3600


@dataclass(slots=True)
class LiveUpdate:
    """One that was begun by a connection, and ends with it.

    file:    the program that goes on
    cmdline: its arguments, None: those of this daemon
    timeout: seconds that open transactions may take to end, where they cannot go along; force: then they
             are dropped
    version: of the record stream
    """

    conn: Connection
    file: str
    cmdline: str | None = None
    timeout: int = 0
    force: bool = False
    version: int = 2
    started: bool = False


def live_update(engine: Engine, conn: Connection, message: Message, words: list[str]) -> str | None:
    """The answer; None if it comes later."""
    if engine.update is not None and engine.update.conn.closed:
        _cancel(engine)
    match words:
        case ["-a"]:
            if engine.update is None:
                return "no live update was begun"
            _cancel(engine)
            return "OK"
        case ["-f", file]:
            return _begin(engine, conn, file)
        case ["-c", cmdline]:
            if engine.update is None or engine.update.conn is not conn:
                return "this connection began no live update"
            engine.update.cmdline = cmdline
            return "OK"
        case ["-s", *options]:
            return _start(engine, conn, message, options)
    raise Fail("EINVAL")


def _cancel(engine: Engine) -> None:
    started = engine.update is not None and engine.update.started
    engine.update = None
    if started and engine.hooks is not None:
        engine.hooks.cancel_update()


def _begin(engine: Engine, conn: Connection, file: str) -> str:
    if engine.hooks is None:
        return "there is no program around this store"
    problem = engine.hooks.update_problem(file)
    if problem:
        return problem
    if engine.update is not None:
        return "another live update was begun already"
    engine.update = LiveUpdate(conn, file)
    return "OK"


def _start(engine: Engine, conn: Connection, message: Message, options: list[str]) -> str | None:
    force, values = False, {"-t": 0, "-v": 2}
    rest = iter(options)
    for word in rest:
        if word == "-F":
            force = True
            continue
        number = next(rest, "")
        if word not in values or not (number.isascii() and number.isdigit() and len(number) <= 9):
            raise Fail("EINVAL")
        values[word] = int(number)
    update = engine.update
    if update is None or update.conn is not conn or engine.hooks is None:
        return "this connection began no live update"
    if update.started:
        return "it is started already"
    if values["-v"] not in (1, 2):
        return f"version {values['-v']} of the record stream is not known"
    update.force, update.timeout, update.version = force, min(values["-t"], TIMEOUT_MAX), values["-v"]
    update.started = True

    def failed(text: str) -> None:
        if engine.update is update:
            engine.update = None
        engine.reply(conn, message, text.encode()[:4000] + b"\0")

    engine.hooks.live_update(update, message, failed)
    return None
