"""An asyncio NBD client: several requests in flight, one deadline timer, one send and receive a wake-up.

A thin shell over client_session. It is a `Storage`, so a back driver can stand on it directly.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from xenbus.drivers.block.nbd.client_session import ClientSession, check_export_name
from xenbus.drivers.block.nbd.intake import Intake
from xenbus.drivers.block.nbd.link import Link
from xenbus.drivers.block.nbd.protocol import Command, CommandFlag, Export, Flag
from xenbus.drivers.block.nbd.uri import Address, parse_uri
from xenbus.drivers.block.storage.interface import Buffers, StorageError, check_range, from_oserror, total
from xenbus.errors import DeadlineError, LinkDown, UsageError, XenbusError

TIMEOUT = 30.0  # seconds, for the handshake and for each request
ZEROES_MAX = 0x40000000  # bytes of one TRIM or WRITE_ZEROES: the length field has 32 bits


@dataclass(slots=True, eq=False)
class NbdClient:
    """One connection to one export. Made by `connect`.

    `size` in bytes, rounded down to whole sectors; `sector_size` is at least the server's minimum block.
    A request that passes `timeout` seconds ends the connection: nothing says what became of it.
    """

    target: str
    export: Export
    size: int
    sector_size: int
    readonly: bool
    timeout: float
    _session: ClientSession
    _link: Link
    _timer: asyncio.TimerHandle | None = None
    _lost: XenbusError | None = None

    @classmethod
    async def connect(
        cls,
        where: str | Address,
        *,
        readonly: bool = False,
        sector_size: int | None = None,
        timeout: float = TIMEOUT,
    ) -> NbdClient:
        """`nbd://host:port/export`, `nbd+unix:///export?socket=/path`, or an Address.

        Raises UsageError, StorageError (cannot connect, read-only export), NbdError, DeadlineError.
        """
        address = parse_uri(where) if isinstance(where, str) else where
        check_export_name(address.export)
        try:
            async with asyncio.timeout(timeout):
                return await _connect(cls, address, readonly, sector_size, timeout)
        except TimeoutError as error:
            if isinstance(error, XenbusError):
                raise
            raise DeadlineError("an NBD handshake", str(address), timeout) from None

    @property
    def discards(self) -> bool:
        return bool(self.export.flags & Flag.SEND_TRIM) and not self.readonly

    @property
    def outlives(self) -> bool:
        """A write on its way to the server may be done after we are gone, over a later one."""
        return self.readonly

    @property
    def closed(self) -> bool:
        return self._link.closed

    # Requests

    async def _run(
        self, command: Command, offset: int, length: int, buffers: Sequence[memoryview] = (), flags: int = 0
    ) -> None:
        if command is Command.WRITE:
            await self._link.room()
        if self._link.closed:
            raise self._lost or LinkDown(f"{self.target}: closed")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[str | None] = loop.create_future()

        def done(result: str | XenbusError | None) -> None:
            if waiter.done():
                return
            if isinstance(result, XenbusError):
                waiter.set_exception(result)
            else:
                waiter.set_result(result)

        request = self._session.request(
            command, offset, length, flags=flags, buffers=buffers, done=done, since=loop.time()
        )
        if self._timer is None:
            self._timer = loop.call_later(self.timeout, self._check_deadline)
        try:
            error = await waiter
        except asyncio.CancelledError:
            # The reply is still to come and keeps its deadline; the buffers are let go of.
            if self._session.abandon(request):
                self._link.divert()
            raise
        if error is not None:
            raise StorageError(error, self.target, f"{command.name} of {length} bytes", offset)

    def _check_deadline(self) -> None:
        """The oldest request's deadline; armed while anything is in flight."""
        self._timer = None
        loop = asyncio.get_running_loop()
        pending = self._session.pending
        if not pending:
            return
        request = next(iter(pending.values()))
        left = request.since + self.timeout - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._check_deadline)
            return
        what = f"the reply to an NBD {request.command.name} at {request.offset}"
        self._link.fail(DeadlineError(what, self.target, self.timeout))

    def _on_lost(self, error: XenbusError) -> None:
        if isinstance(error, LinkDown):
            error = LinkDown(f"{self.target}: {error}")
        self._lost = error
        self._session.drop_all(error)
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Storage

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return False

    def try_read_into(self, offset: int, buffer: memoryview, /) -> bool:
        return False

    def try_writev(self, offset: int, buffers: Buffers) -> bool:
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        length = total(buffers)
        check_range(self, self.target, "read", offset, length)
        if length <= self.export.block_max:
            await self._run(Command.READ, offset, length, buffers)
            return
        for at, piece in _pieces(offset, buffers, self.export.block_max):
            await self._run(Command.READ, at, piece.nbytes, (piece,))

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        """fua: the server answers once the data is on its disk (UsageError where it cannot)."""
        length = total(buffers)
        self._check_write("write", offset, length)
        if fua and not self.export.flags & Flag.SEND_FUA:
            raise UsageError(f"{self.target}: the server has no FUA")
        flags = CommandFlag.FUA if fua else 0
        if length <= self.export.block_max:
            await self._run(Command.WRITE, offset, length, buffers, flags)
            return
        for at, piece in _pieces(offset, buffers, self.export.block_max):
            await self._run(Command.WRITE, at, piece.nbytes, (piece,), flags)

    async def read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self.readv(offset, (buffer,))

    async def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        await self.readv(offset, (memoryview(data),))
        return bytes(data)

    async def write(self, offset: int, data: bytes | bytearray | memoryview, /, *, fua: bool = False) -> None:
        await self.writev(offset, (memoryview(data).cast("B"),), fua=fua)

    async def flush(self) -> None:
        if self.export.flags & Flag.SEND_FLUSH:
            await self._run(Command.FLUSH, 0, 0)

    async def discard(self, offset: int, length: int, /) -> None:
        """TRIM: advice, the server may leave the bytes as they are."""
        self._check_write("discard", offset, length)
        if not self.discards:
            raise StorageError("EOPNOTSUPP", self.target, "discard", offset, "the server has no TRIM")
        await self._ranged(Command.TRIM, offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        self._check_write("write zeroes", offset, length)
        if self.export.flags & Flag.SEND_WRITE_ZEROES:
            await self._ranged(Command.WRITE_ZEROES, offset, length)
            return
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        for at in range(offset, offset + length, 1 << 20):
            await self.writev(at, (zeroes[: offset + length - at],))

    async def _ranged(self, command: Command, offset: int, length: int) -> None:
        for at in range(offset, offset + length, ZEROES_MAX):
            await self._run(command, at, min(ZEROES_MAX, offset + length - at))

    def _check_write(self, what: str, offset: int, length: int) -> None:
        if self.readonly:
            raise StorageError("EROFS", self.target, what, offset, "opened read-only")
        check_range(self, self.target, what, offset, length)

    async def close(self) -> None:
        """Say goodbye (DISC) and hang up; whoever still waits gets LinkDown."""
        if not self._link.closed:
            self._session.goodbye()
            try:
                async with asyncio.timeout(self.timeout):
                    await self._link.room(1)
            except TimeoutError:
                pass
        self._link.fail(LinkDown("closed"))

    async def __aenter__(self) -> NbdClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _pieces(offset: int, buffers: Buffers, limit: int) -> list[tuple[int, memoryview]]:
    """Scattered buffers as (offset, view) of at most `limit` bytes each."""
    pieces = []
    for buffer in buffers:
        for start in range(0, buffer.nbytes, limit):
            view = buffer[start : start + limit]
            pieces.append((offset, view))
            offset += view.nbytes
    return pieces


async def _open_socket(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if address.path is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    error: OSError = OSError("no address")
    for family, kind, proto, _, place in await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
        except BaseException:
            sock.close()
            raise
    raise error


async def _connect(
    cls: type[NbdClient], address: Address, readonly: bool, sector_size: int | None, timeout: float
) -> NbdClient:
    name = str(address)
    try:
        sock = await _open_socket(address)
    except OSError as error:
        raise from_oserror(error, name, "connect") from None
    ready: asyncio.Future[Export] = asyncio.get_running_loop().create_future()
    client: NbdClient | None = None

    def lost(error: XenbusError) -> None:
        if client is not None:
            client._on_lost(error)
        elif not ready.done():
            ready.set_exception(error)

    session = ClientSession(address.export, lambda pieces: link.send(pieces), ready.set_result)
    link = Link(sock, Intake(session.script()), lost)
    try:
        link.start()
        export = await ready
        low = max(512, export.block_min)
        if sector_size is not None and sector_size < low:
            raise UsageError(f"{name}: sectors of {sector_size} bytes, but the server's are {low}")
        if export.flags & Flag.READ_ONLY and not readonly:
            raise StorageError("EROFS", name, "open for writing", detail="the export is read-only")
    except BaseException:
        link.close()
        raise
    sector = sector_size or low
    client = cls(name, export, export.size - export.size % sector, sector, readonly, timeout, session, link)
    if link.closed:
        raise LinkDown(f"{name}: the server closed the connection after the handshake")
    return client
