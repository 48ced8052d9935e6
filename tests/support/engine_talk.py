"""A client of the engine without any I/O: ask, get the answer, look at the events."""

from __future__ import annotations

from typing import Any

from xenbus.errors import store_error
from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import CODECS, Message, Op, Parser, op_name, parse_error, parse_event


class Talk:
    """One connection. `events` are (path, token), in order of arrival."""

    def __init__(self, engine: Engine, domid: int = 0) -> None:
        self.engine = engine
        self.conn = engine.connect(domid)
        self.events: list[tuple[str, str]] = []
        self._req_id = 0

    def raw(self, op: int, payload: bytes, tx: int = 0) -> list[Message]:
        """All messages that this request brought to this connection."""
        self._req_id += 1
        self.engine.handle(self.conn, Message(op, self._req_id, tx, payload))
        return self.take()

    def take(self) -> list[Message]:
        messages = Parser().feed(self.conn.take())
        self.events += [parse_event(one.payload) for one in messages if one.op == Op.WATCH_EVENT]
        return messages

    def payload(self, op: int, payload: bytes, tx: int = 0) -> Any:
        (reply,) = [one for one in self.raw(op, payload, tx) if one.op != Op.WATCH_EVENT]
        assert (reply.req_id, reply.tx_id) == (self._req_id, tx)
        if reply.op == Op.ERROR:
            raise store_error(parse_error(reply.payload), op_name(op), repr(payload), tx)
        assert reply.op == op
        return CODECS[op].parse_reply(reply.payload)

    def ask(self, op: Op, *arguments: Any, tx: int = 0) -> Any:
        return self.payload(op, CODECS[op].request(*arguments), tx)

    def error(self, op: int, *arguments: Any, tx: int = 0) -> str:
        """The name of the error that the request brings, "" if none."""
        return self.raw_error(op, CODECS[op].request(*arguments), tx)

    def raw_error(self, op: int, payload: bytes, tx: int = 0) -> str:
        (reply,) = [one for one in self.raw(op, payload, tx) if one.op != Op.WATCH_EVENT]
        return parse_error(reply.payload) if reply.op == Op.ERROR else ""

    # ---- shorter ----

    def read(self, path: str, tx: int = 0) -> bytes:
        result: bytes = self.ask(Op.READ, path, tx=tx)
        return result

    def write(self, path: str, value: bytes | str = b"", tx: int = 0) -> None:
        self.ask(Op.WRITE, path, value, tx=tx)

    def ls(self, path: str, tx: int = 0) -> list[str]:
        result: list[str] = self.ask(Op.DIRECTORY, path, tx=tx)
        return result

    def perms(self, path: str, tx: int = 0) -> str:
        return " ".join(map(str, self.ask(Op.GET_PERMS, path, tx=tx)))

    def chmod(self, path: str, perms: str, tx: int = 0) -> None:
        self.ask(Op.SET_PERMS, path, perms.split(), tx=tx)

    def watch(self, path: str, token: str = "t", depth: int | None = None) -> None:
        """Sets the watch and forgets its first event."""
        self.ask(Op.WATCH, path, token, depth)
        self.events.clear()

    def start(self) -> int:
        result: int = self.ask(Op.TRANSACTION_START)
        return result

    def end(self, tx: int, commit: bool = True) -> str:
        return self.error(Op.TRANSACTION_END, commit, tx=tx)

    def seen(self) -> list[str]:
        """Paths of the events since the last call."""
        self.take()
        paths = [path for path, _ in self.events]
        self.events.clear()
        return paths


def guest(engine: Engine, dom0: Talk, domid: int) -> Talk:
    """A guest as a toolstack leaves it: introduced, with a home that it owns."""
    dom0.ask(Op.INTRODUCE, domid, 1, 1)
    dom0.write(f"/local/domain/{domid}")
    dom0.chmod(f"/local/domain/{domid}", f"n{domid}")
    return Talk(engine, domid)
