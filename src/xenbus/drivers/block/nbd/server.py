"""An asyncio NBD server for one disk, several clients: what qemu-img, nbdcopy and the kernel read it through.

A shell over server_session. Knows the Blocks protocol (a Storage, or xbd's Disk). A client can waste its
own connection and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from xenbus.drivers.block.nbd.aligned import AlignedBlocks
from xenbus.drivers.block.nbd.intake import Intake, Script
from xenbus.drivers.block.nbd.link import Link
from xenbus.drivers.block.nbd.protocol import Command, CommandFlag, Export, Flag
from xenbus.drivers.block.nbd.server_session import Incoming, ServerSession
from xenbus.drivers.block.storage.interface import Blocks, StorageError, from_oserror
from xenbus.errors import DeadlineError, LinkDown, UsageError, XenbusError

log = logging.getLogger(__name__)

CLIENTS_MAX = 64
IN_FLIGHT_MAX = 64  # requests of one client being served
BYTES_MAX = 64 << 20  # bytes of one client's requests being served, from which it is not read on
HANDSHAKE_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # for what is in flight when a client or the server goes
SUN_PATH_MAX = 107  # sys/un.h: sun_path less its NUL


class NbdServer:
    """Serve `disk` under `export` and as the default export.

    `await server.serve_unix(path)`, later `await server.close()`. The disk stays its owner's.
    """

    def __init__(self, disk: Blocks, *, export: str = "", description: str = "") -> None:
        flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN
        flags |= Flag.READ_ONLY if disk.readonly else Flag.SEND_WRITE_ZEROES
        if not disk.readonly and getattr(disk, "discards", True):
            flags |= Flag.SEND_TRIM
        sector = disk.sector_size
        self.export = Export(export, disk.size, flags, sector, max(4096, sector), description=description)
        self.path: Path | None = None
        self._blocks = AlignedBlocks(disk)
        self._clients: set[_Client] = set()
        self._listener: socket.socket | None = None
        self._inode = 0

    @property
    def clients(self) -> int:
        """Connections at the moment."""
        return len(self._clients)

    async def serve_unix(self, path: Path | str) -> None:
        """Listen on a socket of mode 0600. A socket that nobody serves any more is replaced.

        Raises UsageError (already serving, path too long), StorageError (EADDRINUSE, EACCES, ...).
        """
        if self._listener is not None:
            raise UsageError(f"this NBD server is serving {self.path} already")
        name = str(path)
        if len(name.encode()) > SUN_PATH_MAX:
            raise UsageError(f"{name}: longer than the {SUN_PATH_MAX} bytes that a socket's path may have")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            _remove_stale(name)
            os.fchmod(listener.fileno(), 0o600)  # before bind: the socket is never there with more
            listener.bind(name)
            Path(name).chmod(0o600)
            listener.listen(CLIENTS_MAX)
            self._inode = Path(name).stat().st_ino
        except BaseException as error:
            listener.close()
            if isinstance(error, OSError):
                raise from_oserror(error, name, "serve NBD") from None
            raise
        self.path = Path(name)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors: the client waits in the backlog
            log.warning("%s: accept: %s", self.path, error.strerror)
            self._pause_accepting()
            return
        if len(self._clients) >= CLIENTS_MAX:
            log.warning("%s: more than %d clients", self.path, CLIENTS_MAX)
            sock.close()
            return
        sock.setblocking(False)
        self._clients.add(_Client(sock, self.export, self._blocks, self._clients.discard))

    def _pause_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        listener = self._listener
        if listener is not None:
            loop.remove_reader(listener.fileno())
            loop.call_later(0.1, self._go_on_accepting, listener)

    def _go_on_accepting(self, listener: socket.socket) -> None:
        if self._listener is listener:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop listening, remove the socket, end every client after what it has in flight (10 s at most)."""
        listener, self._listener = self._listener, None
        if listener is not None and self.path is not None:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
            try:
                if self.path.stat().st_ino == self._inode:  # not somebody else's new one
                    self.path.unlink()
            except FileNotFoundError:
                pass
        await asyncio.gather(*(client.close() for client in list(self._clients)))

    async def __aenter__(self) -> NbdServer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _remove_stale(path: str) -> None:
    """Remove a socket whose server is gone; refuse to touch anything else."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        if Path(path).is_socket():
            Path(path).unlink()
    except FileNotFoundError:
        pass
    else:
        raise StorageError("EADDRINUSE", path, "serve NBD", detail="another server has it")
    finally:
        probe.close()


class _Client:
    """One connection: its requests in flight, each a task, and the bytes that they hold."""

    def __init__(
        self, sock: socket.socket, export: Export, blocks: AlignedBlocks, gone: Callable[[_Client], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._blocks = blocks
        self._gone = gone
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._closing = False
        self._leaving: asyncio.Task[None] | None = None
        self._timer = loop.call_later(HANDSHAKE_SECONDS, self._too_slow)
        self._session = ServerSession(
            export, lambda data: self._link.send(data), self._serve, self._timer.cancel
        )
        self._intake = Intake(self._script())
        self._link = Link(sock, self._intake, self._lost)
        self._link.start()

    def _script(self) -> Script:
        yield from self._session.script()
        # The client took its leave: what it asked for before is still done and answered.
        self._leaving = asyncio.get_running_loop().create_task(self.close())

    def _too_slow(self) -> None:
        self._link.fail(DeadlineError("an NBD handshake", "the client", HANDSHAKE_SECONDS))

    def _lost(self, error: XenbusError) -> None:
        log.log(logging.DEBUG if isinstance(error, LinkDown) else logging.WARNING, "NBD client: %s", error)
        self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._gone(self)

    # Requests

    def _serve(self, request: Incoming) -> None:
        self._bytes += request.length if request.command in _CARRIES else 0
        task = asyncio.get_running_loop().create_task(self._work(request))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, request))
        self._throttle()

    def _throttle(self) -> None:
        if len(self._tasks) >= IN_FLIGHT_MAX or self._bytes >= BYTES_MAX:
            self._intake.paused = True

    def _done(self, task: asyncio.Task[None], request: Incoming) -> None:
        self._tasks.discard(task)
        self._bytes -= request.length if request.command in _CARRIES else 0
        if self._link.closed:
            if not self._tasks:
                self._gone(self)
        elif not self._closing and len(self._tasks) < IN_FLIGHT_MAX and self._bytes < BYTES_MAX:
            self._link.resume()

    async def _work(self, request: Incoming) -> None:
        data: bytearray | None = None
        error: str | None = None
        try:
            if request.command is Command.READ:
                data = bytearray(request.length)
                await self._blocks.read_into(request.offset, memoryview(data))
            else:
                await _WORK[request.command](self._blocks, request)
            if request.flags & CommandFlag.FUA and request.command is not Command.READ:
                await self._blocks.flush()
        except XenbusError as failed:
            log.warning("NBD %s at %d: %s", request.command.name, request.offset, failed)
            error, data = getattr(failed, "name", "EIO"), None
        except Exception:
            log.exception("NBD %s at %d", request.command.name, request.offset)
            error, data = "EIO", None
        self._session.answer(request.cookie, error, data)
        await self._link.room()  # a client that does not read its replies is not served on

    async def close(self) -> None:
        """Serve what was asked for, within a deadline, then hang up."""
        self._closing = True
        self._link.pause()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_SECONDS)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._link.room(1)
        except TimeoutError:
            pass
        self._link.fail(LinkDown("closed"))
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_SECONDS)


_CARRIES = (Command.READ, Command.WRITE)


async def _write(blocks: AlignedBlocks, request: Incoming) -> None:
    if request.data is not None:
        await blocks.write(request.offset, request.data)


async def _trim(blocks: AlignedBlocks, request: Incoming) -> None:
    try:
        await blocks.discard(request.offset, request.length)
    except XenbusError as error:
        if getattr(error, "name", "") != "EOPNOTSUPP":  # advice that cannot be taken is no failure
            raise


async def _write_zeroes(blocks: AlignedBlocks, request: Incoming) -> None:
    await blocks.write_zeroes(request.offset, request.length)


async def _flush(blocks: AlignedBlocks, request: Incoming) -> None:
    await blocks.flush()


_WORK: dict[Command, Callable[[AlignedBlocks, Incoming], Awaitable[None]]] = {
    Command.WRITE: _write,
    Command.TRIM: _trim,
    Command.WRITE_ZEROES: _write_zeroes,
    Command.FLUSH: _flush,
}
