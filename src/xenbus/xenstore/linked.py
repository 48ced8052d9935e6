"""What the links of both clients keep: the session, who is told of a loss, how to connect again. No I/O.

Knows sessions and what addresses mean; neither loop, pipe nor clock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from xenbus.errors import UsageError
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Session
from xenbus.xenstore.transport import Scheme, default_address, resolve

log = logging.getLogger("xenbus.xenstore")
# Of a `Transport` or a `Pipe`.
C = TypeVar("C")
# Seconds.
REQUEST_TIMEOUT = 30.0


def dialer(
    target: str | os.PathLike[str] | C | Callable[[], C] | None,
    opener: Callable[[Scheme], Callable[[str], C]],
    reconnect: Reconnect | None,
) -> Callable[[], C]:
    """How to connect to `target`. UsageError if it is connected already and is to be connected again."""
    if target is None or isinstance(target, (str, os.PathLike)):
        scheme, rest = resolve(target or default_address())
        connect = opener(scheme)
        return lambda: connect(rest)
    if callable(target):
        return target
    if reconnect is not None:
        raise UsageError("reconnect: what is connected cannot be made again; give an address, or a function")
    return lambda: target


class Linked(Generic[C]):
    """One connection, or one after the other."""

    def __init__(
        self,
        session: Session,
        timeout: float,
        dial: Callable[[], C] | None,
        reconnect: Reconnect | None,
    ) -> None:
        self.timeout = timeout
        self._session = session
        self._on_lost: list[Callable[[Exception], None]] = []
        self._on_reconnected: list[Callable[[], None]] = []
        self._dial = dial
        self._policy = reconnect

    @property
    def peer(self) -> str:
        return self._session.peer

    @property
    def connected(self) -> bool:
        """Whether the link stands; the blocking client knows it as of its last call."""
        return self._session.dead is None

    def on_reconnected(self, callback: Callable[[], None]) -> None:
        """`callback()` each time the link stands again and all watches are set again."""
        self._on_reconnected.append(callback)

    def counts(self) -> dict[str, int]:
        """What is held: watches, transactions, waiters, unanswered."""
        return self._session.counts()

    def _tell(self, callbacks: Sequence[Callable[..., None]], *what: Any) -> None:
        for callback in list(callbacks):
            try:
                callback(*what)
            except Exception:
                log.exception("a callback for the link to %s failed", self.peer)
