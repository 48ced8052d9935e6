"""`error/<node>/error`: written by xenbus_dev_error, taken away with the device that it was about.

Knows the store's client alone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

from xenbus.errors import DeadlineError, NoEntry, PeerError, XenbusError
from xenbus.xenstore.client import Client, Transaction

log = logging.getLogger("xenbus.bus")
# Bytes of an error node's text: with its header it stays far below a guest's node size quota (2048).
ERROR_TEXT_MAX = 1024
Run = Callable[[Callable[[Transaction], Awaitable[None]]], Awaitable[None]]


class ErrorNodes:
    """Which devices of one bus have an error node of ours."""

    __slots__ = ("_nodes", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run
        self._nodes: set[str] = set()

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    async def write(self, store: Client, node: str, value: bytes) -> None:
        self._nodes.add(node)
        await store.write(f"error/{node}/error", value)

    async def clear(self, node: str) -> None:
        """Removes it, and the directories above that nothing else is in. Never raises."""
        if node not in self._nodes:
            return
        self._nodes.discard(node)
        try:
            await self._run(lambda tx: _prune(tx, f"error/{node}"))
        except XenbusError as exc:
            log.warning("error/%s could not be removed: %s", node, exc)

    def forget_all(self) -> None:
        """After a restore: the old domain's nodes went with it."""
        self._nodes.clear()


async def _prune(tx: Transaction, path: str) -> None:
    """In one transaction, so that an error written meanwhile beside it is a Conflict and not a loss. `error`
    itself is the domain builder's and stays, as toolstack/devices.py has it."""
    try:
        await tx.rm(path)
        while path.count("/") > 1:
            path = path.rpartition("/")[0]
            if await tx.directory(path):
                return
            await tx.rm(path)
    except NoEntry:
        return


class Doing(XenbusError):
    """An error with what was being done: xenbus_dev_fatal(dev, err, "writing new state")."""

    def __init__(self, what: BaseException | str, doing: str) -> None:
        super().__init__(f"{doing}: {what}")
        self.__cause__ = what if isinstance(what, BaseException) else None


def errno_of(what: BaseException | str) -> int:
    """The number before an error node's text: xenbus_dev_verror writes one, and tools show it."""
    if isinstance(what, Doing) and what.__cause__ is not None:
        return errno_of(what.__cause__)
    number = getattr(what, "errno", None)  # StoreError, OSError, and a driver's own kinds (StorageError)
    if isinstance(number, int) and number:
        return number
    name = getattr(what, "name", "")
    if isinstance(name, str) and name in errno.errorcode.values():
        return int(getattr(errno, name))
    return next((code for kind, code in _BY_KIND if isinstance(what, kind)), errno.EIO)


_BY_KIND = ((DeadlineError, errno.ETIMEDOUT), (PeerError, errno.EPROTO))
