"""What an operation's handler looks like, how it refuses, and what the engine asks of its daemon. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from xenbus.xenstore.wire import Message

if TYPE_CHECKING:
    from xenbus.xenstore.engine.connection import Connection, Domain
    from xenbus.xenstore.engine.engine import Engine
    from xenbus.xenstore.engine.update import LiveUpdate

# Gives the payload of the reply; None if the reply was queued already, or will be (INTRODUCE). The last
# argument is the transaction or None: each profile has a class of its own for it.
Handler = Callable[["Engine", "Connection", Message, Any], bytes | None]


class OpenTransaction(Protocol):
    """What the engine itself knows of a transaction. `memory`: bytes that its domain is charged for it."""

    tx_id: int
    domain: Domain
    memory: int

    def release(self) -> None:
        """It is over. Once."""
        ...


class Fail(Exception):
    """A request is refused: `name` goes out as an ERROR."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def unknown(engine: Engine, conn: Connection, message: Message, tx: Any) -> bytes:
    """The handler of what is no operation."""
    raise Fail("ENOSYS")


class Hooks(Protocol):
    """The side effects that need I/O. The engine works without: INTRODUCE is then book-keeping alone."""

    def introduce(self, domid: int, gfn: int, port: int, done: Callable[[str | None], None]) -> None:
        """Map the domain's ring and bind its channel (again, if it was introduced already), then call
        `done` once: with None, or with the errno name of what went wrong."""
        ...

    def rebind(self, domid: int, port: int, done: Callable[[str | None], None]) -> None:
        """As `introduce`, of a domain whose ring is served: only its channel is bound anew."""
        ...

    def release(self, domid: int) -> None:
        """The domain is no longer served: its ring and channel are given back."""
        ...

    def domain_exists(self, domid: int) -> bool:
        """Whether a domain that was never introduced may own nodes and be named in permissions."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call it once, outside any request; then serve those that have to wait no longer."""
        ...

    def update_problem(self, file: str) -> str:
        """CONTROL live-update: why this cannot be the next program; "" if it may be."""
        ...

    def live_update(self, update: LiveUpdate, message: Message, failed: Callable[[str], None]) -> None:
        """Become that program, which answers `message` with OK; or call `failed` with the reason."""
        ...

    def cancel_update(self) -> None:
        """Call off what `live_update` began; `failed` is called then."""
        ...

    def trouble(self) -> list[str]:
        """CONTROL check: what is wrong outside of the engine, in words."""
        ...

    def log(self, text: str) -> None:
        """A line for people: CONTROL print, log, quota warnings."""
        ...

    def write_report(self, name: str, text: str) -> bool:
        """CONTROL memreport <file>; False if the file cannot be written."""
        ...


def one_word(payload: bytes) -> bytes:
    """The payload's only word (onearg in xenstored): exactly one NUL, at the end."""
    if payload.find(b"\0") != len(payload) - 1 or not payload:
        raise Fail("EINVAL")
    return payload[:-1]


def words_of(payload: bytes) -> list[bytes]:
    """All NUL-terminated words; what follows the last NUL is not looked at (get_strings in xenstored)."""
    return payload.split(b"\0")[:-1]


def number_of(word: bytes, highest: int = 0xFFFF_FFFF) -> int:
    """A decimal number; EINVAL otherwise."""
    if not word.isdigit() or len(word) > 10:
        raise Fail("EINVAL")
    value = int(word)
    if value > highest:
        raise Fail("EINVAL")
    return value


def atoi(word: bytes) -> int:
    """What C's atoi makes of a word: 0 of one that is no number, and what follows the digits is not looked
    at. For the numbers that every xenstored reads like that; the others are strict here."""
    found = re.match(rb"\s*([-+]?[0-9]{1,19})", word)
    return int(found[1]) if found else 0


def domid_of(word: bytes) -> int:
    return number_of(word, 0xFFFF)
