"""The exception tree, and the errno names that travel on the XenStore wire.

Every room may import this module; it imports nothing of ours. A peer's fault (`PeerError`) and our
caller's fault (`UsageError`) are different exceptions, so that a driver can blame the right side.
"""

from __future__ import annotations

import errno as _errno

# xen/include/public/io/xs_wire.h, xsd_errors[]: a daemon answers with these names, never with numbers.
WIRE_ERRORS: dict[str, int] = {
    name: getattr(_errno, name)
    for name in (
        "EINVAL EACCES EEXIST EISDIR ENOENT ENOMEM ENOSPC EIO ENOTEMPTY "
        "ENOSYS EROFS EBUSY EAGAIN EISCONN E2BIG EPERM"
    ).split()
}


class XenbusError(Exception):
    """Whatever this package raises on purpose."""


class UsageError(XenbusError, ValueError):
    """The caller on this side asked for something that makes no sense."""


class NotFound(XenbusError):
    """What was named (a domain, a device, a variable) is not there."""


class PeerError(XenbusError):
    """The other side broke the protocol; nothing it said after that is believed."""


class LinkDown(XenbusError, ConnectionError):
    """A connection (store, broker, control socket) is gone; every waiter on it gets this at once."""


class DeadlineError(XenbusError, TimeoutError):
    """A wait ended by its deadline. Says what was waited for and who owed the next move.

    what:    e.g. "backend state Connected"
    owed_by: e.g. "domain 0, /local/domain/0/backend/vbd/1/51712"
    seconds: the deadline that passed
    """

    def __init__(self, what: str, owed_by: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:g} s for {what}; {owed_by} owed the next move")
        self.what = what
        self.owed_by = owed_by
        self.seconds = seconds


class StoreError(XenbusError):
    """An error that the store answered (or that a client foresaw): `name` is the one on the wire.

    A name that we do not know is kept as it came (oxenstored sends EQUOTA); `errno` is 0 then.
    """

    def __init__(self, name: str, op: str = "", path: str = "", tx_id: int = 0, detail: str = "") -> None:
        self.name = name
        self.errno = WIRE_ERRORS.get(name, 0)
        self.op = op
        self.path = path
        self.tx_id = tx_id
        self.detail = detail
        text = " ".join(part for part in (op, path) if part) or "store"
        if tx_id:
            text += f" in transaction {tx_id}"
        super().__init__(f"{text}: {name}" + (f" ({detail})" if detail else ""))


class NoEntry(StoreError):
    """ENOENT: the node is not there. The only error that means "gone"."""


class Conflict(StoreError):
    """EAGAIN: a transaction met a change from outside and must be run again.

    The store does not say which node it was. One of these, of the last run: `read` (also listed, or missed)
    and `wrote`. `attempts`: how often it ran.
    """

    attempts = 1
    read: tuple[str, ...] = ()
    wrote: tuple[str, ...] = ()


class Denied(StoreError):
    """EACCES or EPERM: the right is not held."""


_STORE_ERRORS: dict[str, type[StoreError]] = {
    "ENOENT": NoEntry,
    "EAGAIN": Conflict,
    "EACCES": Denied,
    "EPERM": Denied,
}


def store_error(name: str, op: str = "", path: str = "", tx_id: int = 0, detail: str = "") -> StoreError:
    """The exception for an errno name from the wire, known or not."""
    return _STORE_ERRORS.get(name, StoreError)(name, op, path, tx_id, detail)


class HypervisorError(XenbusError):
    """A grant or event-channel operation was refused. `name` is an errno name (EPERM, ENOENT, ...)."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{what}: {name}")
        self.name = name
        self.what = what
