"""Byte pipes to a XenStore daemon: what one must offer, and how a scheme finds its file.

Knows nothing of requests, replies or watches. A transport is one module of this package that bears its
scheme's name and calls `register`; nothing else is touched to add one (other people's packages use the
entry point group `xenbus.transports`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, runtime_checkable

from xenbus.errors import LinkDown, UsageError

# xenstored lets a guest have this many requests under way and then stops reading from it
# (docs/misc/xenstore.txt knows no number; tools/xenstored, quota "outstanding").
GUEST_OUTSTANDING = 20
# dom0 is exempt; this bounds what we ourselves keep under way on a socket.
SOCKET_OUTSTANDING = 512


class Busy(LinkDown):
    """The other side is there and has no room for one more connection yet."""


class Receiver(Protocol):
    """Who reads a transport. Called in the event loop, never from inside `send`."""

    def data_received(self, data: bytes | memoryview) -> None:
        """Some bytes, cut anywhere. A memoryview is valid during the call only."""
        ...

    def connection_lost(self, exc: Exception | None) -> None:
        """Once; nothing comes after it. None: the other end closed in good order, or we did."""
        ...

    def drained(self) -> None:
        """Everything given to `send` was taken by the other side (called only after a backlog)."""
        ...


class Transport(Protocol):
    """One connection, for an event loop."""

    @property
    def peer(self) -> str:
        """Who is at the other end, for messages to people."""
        ...

    @property
    def max_outstanding(self) -> int:
        """How many unanswered requests the other side lets us have."""
        ...

    @property
    def backlog(self) -> int:
        """Bytes given to `send` that the other side has not taken yet."""
        ...

    def start(self, receiver: Receiver) -> None:
        """Bytes flow from now on. Once, inside a running event loop."""
        ...

    def send(self, messages: Sequence[bytes]) -> None:
        """Never blocks, never raises for a dead link. Each item is one whole message: some pipes
        (/dev/xen/xenbus) must not see two of them in one write."""
        ...

    def pause(self, paused: bool) -> None:
        """Stop, or go on, taking bytes from the other side: back-pressure."""
        ...

    def close(self) -> None:
        """Idempotent. `connection_lost(None)` follows, soon, if it had been started."""
        ...


class Pipe(Protocol):
    """One connection, for a caller that blocks."""

    @property
    def peer(self) -> str: ...
    @property
    def max_outstanding(self) -> int: ...
    def send(self, messages: Sequence[bytes], timeout: float) -> None:
        """TimeoutError after `timeout` seconds; OSError or LinkDown when the other side is gone."""
        ...

    def receive(self, timeout: float) -> bytes:
        """At least one byte; b"" at end of file; TimeoutError after `timeout` seconds."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Pollable(Pipe, Protocol):
    """A pipe with a descriptor, that can also be used without ever waiting."""

    def fileno(self) -> int: ...
    def take(self) -> bytes | None:
        """What is there; None if nothing is, b"" at end of file. OSError or LinkDown."""
        ...

    def offer(self, messages: Sequence[bytes]) -> bytes:
        """What the other side has no room for now, to be offered first next time. OSError or LinkDown."""
        ...


@dataclass(slots=True, frozen=True)
class Scheme:
    """How to open one kind of address. `blocking` is None where only an event loop can drive it."""

    name: str
    connect: Callable[[str], Transport]
    blocking: Callable[[str], Pipe] | None

    @property
    def pipe(self) -> Callable[[str], Pipe]:
        """`blocking`. UsageError where there is none."""
        if self.blocking is None:
            raise UsageError(f"{self.name}: needs an event loop; use xenbus.xenstore.client")
        return self.blocking


_SCHEMES: dict[str, Scheme] = {}


def register(
    name: str, connect: Callable[[str], Transport], blocking: Callable[[str], Pipe] | None = None
) -> None:
    """`connect(rest)` and `blocking(rest)` get what follows `name:` in an address."""
    _SCHEMES[name] = Scheme(name, connect, blocking)


def resolve(address: str | os.PathLike[str]) -> tuple[Scheme, str]:
    """The scheme of an address and the rest of it. A path alone is a socket, or a device if it is one.

    UsageError for a scheme that nobody registered.
    """
    text = os.fspath(address)
    name, colon, rest = text.partition(":")
    if not colon or "/" in name:
        name, rest = ("device" if Path(text).is_char_device() else "unix"), text
    if name not in _SCHEMES:
        _load(name)
    try:
        return _SCHEMES[name], rest
    except KeyError:
        raise UsageError(f"no transport for {text!r}: scheme {name!r} is unknown") from None


def _load(name: str) -> None:
    for entry in entry_points(group="xenbus.transports", name=name):
        entry.load()
    module = f"{__name__}.{name}"
    if name.isidentifier() and not name.startswith("_"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as exc:
            if exc.name != module:
                raise


def default_address() -> str:
    """Where libxenstore looks: $XENSTORED_PATH, else $XENSTORED_RUNDIR/socket, else /dev/xen/xenbus
    (xen-tools/xenstore-common.h, xenstore_daemon_path; tools/libs/store/xs.c, xs_domain_dev)."""
    if path := os.environ.get("XENSTORED_PATH"):
        return path
    rundir = os.environ.get("XENSTORED_RUNDIR", "/run/xenstored")
    socket = Path(rundir) / "socket"
    return str(socket) if socket.exists() else "/dev/xen/xenbus"
