"""A machine in a folder: domains whose ring pages are files and whose event channels are FIFOs.

`tests/support/preload/machine.c` is the same folder for Debian's daemons, and says what is in it; here are
the toolstack's and the guests' sides of it, and a `Hypervisor` over it for a daemon of ours. Linux only.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import PAGE_SIZE, Channel, CopyOp, GrantedPages, Held, Mapping
from xenbus.xenstore.transport.ringpage import RingPipe

PORT_VIRQ = 1
PORT_ECHO = 2
PORT_BASE = 16
_PORT = struct.Struct("=I")


def _open_fifo(path: Path) -> int:
    """Made if it is missing. Both ends at once, so that a write neither fails nor waits for a reader."""
    if not path.exists():
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _await(fd: int, seconds: float) -> bool:
    """Until there is something to read; False after that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, seconds) * 1000))


class Machine:
    """The folder. Domain 0 is there from the start; `close` closes what it has open and deletes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir(parents=True)
        self._evtchn = _open_fifo(folder / "evtchn")
        self._echo = _open_fifo(folder / "echo")
        self.create(0)
        (folder / "0" / "port").write_text("1")  # as /proc/xen/xsd_port: no newline

    def create(self, domid: int) -> None:
        """A domain begins, with an empty ring page."""
        home = self.folder / str(domid)
        home.mkdir(exist_ok=True)
        (home / "page").write_bytes(bytes(PAGE_SIZE))
        os.close(_open_fifo(home / "kick"))
        (home / "state").write_text("")

    def state(self, domid: int, letters: str) -> None:
        """What the hypervisor says of it from now on: d dying, c crashed, s shut down; and that it does."""
        (self.folder / str(domid) / "state").write_text(letters)
        self.raise_port(PORT_VIRQ)

    def resume(self, domid: int) -> None:
        """It runs again, if it is there. Nobody is told."""
        state = self.folder / str(domid) / "state"
        if state.exists():
            state.write_text("")

    def remove(self, domid: int) -> None:
        """The hypervisor knows the domain no more, and says so."""
        (self.folder / str(domid) / "state").unlink(missing_ok=True)
        self.raise_port(PORT_VIRQ)

    def raise_port(self, port: int) -> None:
        # Full: the daemon has been told often enough.
        with suppress(BlockingIOError):
            os.write(self._evtchn, _PORT.pack(port))

    def settle(self, seconds: float = 10.0) -> None:
        """Until the daemon has dealt with every event so far. TimeoutError."""
        self.raise_port(PORT_ECHO)
        if not _await(self._echo, seconds):
            raise TimeoutError("the daemon does not look at its event channels")
        os.read(self._echo, 1)

    def guest(self, domid: int) -> GuestRing:
        return GuestRing(self, domid)

    def close(self) -> None:
        os.close(self._evtchn)
        os.close(self._echo)


class GuestRing(RingPipe):
    """The guest's end of its ring page."""

    def __init__(self, machine: Machine, domid: int) -> None:
        self.domid = domid
        home = machine.folder / str(domid)
        self._kick = _open_fifo(home / "kick")
        with (home / "page").open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), PAGE_SIZE)
        self.view = memoryview(self._memory)
        super().__init__(
            self.view,
            lambda: machine.raise_port(PORT_BASE + domid),
            self._await_kick,
            f"domain {domid}'s ring",
        )

    def _await_kick(self, seconds: float) -> None:
        if _await(self._kick, seconds):
            with suppress(BlockingIOError):
                os.read(self._kick, 65536)

    def close(self) -> None:
        if not self.page.released:
            super().close()
            self.view.release()
            self._memory.close()
            os.close(self._kick)


class _Mapping:
    """A domain's page, for the daemon."""

    writable = True

    def __init__(self, domid: int, refs: tuple[int, ...], page: mmap.mmap) -> None:
        self.domid, self.refs, self.view = domid, refs, memoryview(page)
        self.page = page


class _Channel:
    """The daemon's end of a domain's event channel."""

    def __init__(self, hypervisor: FileHypervisor, domid: int, fd: int, handler: Callable[[], None]) -> None:
        self.port, self.remote_domid = PORT_BASE + domid, domid
        self._hypervisor, self._fd, self.handler = hypervisor, fd, handler

    def notify(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._fd, b"\0")

    def mask(self) -> None:
        raise NotImplementedError("a store daemon masks nothing")

    unmask = mask

    async def close(self) -> None:
        if self._hypervisor.channels.get(self.port) is self:
            del self._hypervisor.channels[self.port]
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileHypervisor:
    """Domain 0's handle, as far as a store daemon needs one. Make it inside the daemon's loop."""

    domid = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.channels: dict[int, _Channel] = {}
        self._mapped = 0
        self._dead: Callable[[int], None] = lambda domid: None
        # Not of the interface, since no real handle tells it yet: a domain is shut down. Told at each event.
        self.on_shutdown: Callable[[int], None] = lambda domid: None
        self._evtchn = _open_fifo(folder / "evtchn")
        self._echo = _open_fifo(folder / "echo")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._evtchn, self._pending)

    @property
    def grants(self) -> FileHypervisor:
        return self

    gntdev = evtchn = grants

    def held(self) -> Held:
        return Held(0, self._mapped, len(self.channels))

    async def close(self) -> None:
        self._loop.remove_reader(self._evtchn)
        os.close(self._evtchn)
        os.close(self._echo)

    # ---- events ----

    def _pending(self) -> None:
        data = os.read(self._evtchn, 4096 * _PORT.size)
        for (port,) in _PORT.iter_unpack(data):
            if port == PORT_VIRQ:
                self._look_at_domains()
            elif port == PORT_ECHO:
                os.write(self._echo, b"\0")
            elif port in self.channels:
                self.channels[port].handler()

    def _look_at_domains(self) -> None:
        """VIRQ_DOM_EXC: something has changed about some domain. What is told twice means nothing."""
        for domid in sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit()):
            state = self._state(domid)
            if state is None or "d" in state:
                self._dead(domid)
            elif state:
                self.on_shutdown(domid)

    def _state(self, domid: int) -> str | None:
        try:
            return (self._folder / str(domid) / "state").read_text()
        except FileNotFoundError:
            return None

    def domain_exists(self, domid: int) -> bool:
        return self._state(domid) is not None

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead = callback

    def on_lost(self, callback: Callable[[], None]) -> None:
        """It never is."""

    async def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> Channel:
        raise NotImplementedError("a store daemon allocates no port")

    async def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> Channel:
        try:
            fd = os.open(self._folder / str(remote_domid) / "kick", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HypervisorError("EINVAL", f"no domain {remote_domid}") from None
        channel = _Channel(self, remote_domid, fd, handler)
        self.channels[channel.port] = channel
        self._loop.call_soon(handler)
        return channel

    # ---- grants ----

    async def map(self, domid: int, refs: Sequence[int], *, writable: bool = True) -> Mapping:
        try:
            with (self._folder / str(domid) / "page").open("r+b") as file:
                page = mmap.mmap(file.fileno(), PAGE_SIZE)
        except FileNotFoundError:
            raise HypervisorError("EINVAL", f"no domain {domid}") from None
        self._mapped += 1
        return _Mapping(domid, tuple(refs), page)

    async def unmap(self, mapping: Mapping) -> None:
        assert isinstance(mapping, _Mapping)
        mapping.view.release()
        mapping.page.close()
        self._mapped -= 1

    async def copy(self, ops: Sequence[CopyOp]) -> list[int]:
        raise NotImplementedError("a store daemon copies nothing")

    async def alloc(self, domid: int, count: int, *, writable: bool = True) -> GrantedPages:
        raise NotImplementedError("a store daemon grants nothing")

    async def revoke(self, pages: GrantedPages) -> None:
        raise NotImplementedError("a store daemon grants nothing")
