"""Consoles, as a toolstack describes them: both halves' nodes of a further console, as libxl writes them.

Also where an operator finds a console's terminal. Knows the store's nodes; opens no terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from xenbus.drivers.console.consif import (
    KIND,
    LIMIT,
    LOG_KEY,
    LOG_SIZE_KEY,
    LOG_SIZE_MAX,
    LOG_SIZE_MIN,
    OUTPUT_KEY,
    PROTOCOL,
    TTY_KEY,
)
from xenbus.errors import Denied, NoEntry, NotFound, UsageError
from xenbus.toolstack.devices import DeviceSpec, list_devices
from xenbus.toolstack.paths import DevicePaths, domain_path
from xenbus.xenstore.client import Client

Paths = Callable[[], Awaitable[str]]
NUMBERS = range(1, 32)  # 0 is the first console, which the domain builder makes


@dataclass(slots=True, frozen=True)
class ConsoleSpec:
    """One more console for one guest.

    number:    its own there: `device/console/<number>`
    name:      for the guest's programs, "" for none
    pty:       whether an operator can attach to it
    log:       a file in which the back end keeps what the guest says, None for none
    log_size:  bytes of it; as many again are kept of what came before
    back_kind: the type under which the back end finds it
    """

    front_domid: int
    number: int = 1
    name: str = ""
    pty: bool = True
    log: str | None = None
    log_size: int = 0
    back_domid: int = 0
    back_kind: str = KIND

    def device(self) -> DeviceSpec:
        """UsageError for what no console can have."""
        if self.number not in NUMBERS:
            raise UsageError(f"console {self.number}: {NUMBERS[0]} to {NUMBERS[-1]} are devices")
        if not self.pty and self.log is None:
            raise UsageError("a console without a terminal and without a log would be nobody's")
        if self.log_size and (self.log is None or not LOG_SIZE_MIN <= self.log_size <= LOG_SIZE_MAX):
            raise UsageError(f"a log of {self.log_size} bytes: {LOG_SIZE_MIN} at least, and a file for it")
        for text in (self.name, self.log or ""):
            if "\0" in text:
                raise UsageError(f"{text!r} holds a NUL")
        output = "pty" if self.pty else "null"
        named = {"name": self.name} if self.name else {}
        back = {"protocol": PROTOCOL, OUTPUT_KEY: output, "type": "xenbus", **named}
        if self.log is not None:
            # The back end runs in another process with another working directory.
            back[LOG_KEY] = str(Path(self.log).absolute())
            if self.log_size:
                back[LOG_SIZE_KEY] = str(self.log_size)
        own = "" if self.back_kind == KIND else self.back_kind
        return DeviceSpec(
            DevicePaths(KIND, self.number, self.front_domid, self.back_domid, own),
            {"protocol": PROTOCOL},
            back,
            {"limit": str(LIMIT), "type": "xenbus", OUTPUT_KEY: output, TTY_KEY: "", **named},
        )


async def free_number(store: Client, domid: int) -> int:
    """The lowest one that the domain has no console of. UsageError if it has all."""
    used = {spec.paths.devid for spec in await list_devices(store, domid) if spec.paths.kind == KIND}
    for number in NUMBERS:
        if number not in used:
            return number
    raise UsageError(f"domain {domid} has {len(NUMBERS)} consoles, the most")


@dataclass(slots=True, frozen=True)
class TerminalNode:
    """node: has the path of a console's terminal; ours: its back end is xcb"""

    node: str
    ours: bool = False

    @asynccontextmanager
    async def paths(self, store: Client) -> AsyncIterator[Paths]:
        """What is yielded answers with the path that the node has, and, called again, with the one that it
        has once it was written again: the next back end's terminal mostly has the same path. It waits for
        ever, and raises NoEntry when the device is gone.
        """
        written = asyncio.Event()
        watch = await store.watch(self.node, lambda _: written.set())

        async def path() -> str:
            while True:
                await written.wait()
                written.clear()
                try:
                    if found := await store.read_str(self.node):
                        return found
                except NoEntry:  # with its device, or not written yet
                    if not await store.exists(self.node.rpartition("/")[0]):
                        raise
                except asyncio.CancelledError:
                    written.set()  # it was not looked at
                    raise

        try:
            yield path
        finally:
            await watch.close()


async def find_console(store: Client, domid: int, number: int | None) -> TerminalNode:
    """Of the lowest one there is if no number is given. NotFound, UsageError for one without a terminal.

    Of a device the back end's node is taken, which no guest can write: a terminal that a guest named could be
    any file of ours.
    """
    first = f"{domain_path(domid)}/console/{TTY_KEY}"
    if number == 0 or (number is None and await _read(store, first)):
        if await _read(store, first) is None:
            raise NotFound(f"domain {domid} has no console 0")
        return TerminalNode(first)
    consoles = {
        spec.paths.devid: spec for spec in await list_devices(store, domid) if spec.paths.kind == KIND
    }
    consoles.pop(0, None)
    if number is None:
        number = min(consoles, default=1)
    found = consoles.get(number)
    if found is None:
        raise NotFound(f"domain {domid} has no console {number}: `xenbus attach console` gives it one")
    if found.back.get(OUTPUT_KEY, "pty") != "pty":
        raise UsageError(f"console {number} of domain {domid} has a log alone: {found.back.get(LOG_KEY)}")
    # Another toolstack's back end (QEMU, by libxl's record) says it in the front's node alone.
    ours = found.back.get("type") == "xenbus"
    return TerminalNode(f"{found.paths.back if ours else found.paths.front}/{TTY_KEY}", ours)


async def _read(store: Client, path: str) -> str | None:
    try:
        return await store.read_str(path)
    except (NoEntry, Denied):
        return None
