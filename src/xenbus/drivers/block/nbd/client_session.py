"""The client's side of NBD without I/O: the handshake, requests in flight, replies of both kinds.

Pure. Knows views to fill and a callable that sends. Knows no socket, no loop and no clock.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from xenbus.drivers.block.nbd import protocol as nbd
from xenbus.drivers.block.nbd.intake import Script, take
from xenbus.drivers.block.nbd.protocol import Chunk, Command, Export, Flag, Info, NbdError, Option, Rep
from xenbus.errors import UsageError, XenbusError

Send = Callable[[Sequence[bytes | memoryview]], None]
Done = Callable[[str | XenbusError | None], None]
OPTION_REPLIES_MAX = 64  # replies to one option: the infos that exist are few
_SINK = 64 << 10

_REFUSALS = {
    Rep.ERR_UNSUP: "the server does not know the option",
    Rep.ERR_POLICY: "the server's policy forbids it",
    Rep.ERR_INVALID: "the server calls the option malformed",
    Rep.ERR_TLS_REQD: "the server wants TLS",
    Rep.ERR_UNKNOWN: "there is no such export",
    Rep.ERR_SHUTDOWN: "the server is shutting down",
    Rep.ERR_BLOCK_SIZE_REQD: "the server wants its block size obeyed",
}


@dataclass(slots=True)
class Request:
    """One command in flight. `done` is called once: None, an errno name, or the error that ended the link.

    `since` is the owner's clock when it was sent.
    """

    cookie: int
    command: Command
    offset: int
    length: int
    buffers: list[memoryview]
    done: Done
    since: float = 0.0
    error: str | None = None
    covered: int = 0
    unfilled: deque[memoryview] = field(default_factory=deque)


@dataclass(slots=True)
class ClientSession:
    """`script()` is what an Intake runs. `ready` is called with the export when the handshake is over."""

    export_name: str
    send: Send
    ready: Callable[[Export], None]
    pending: dict[int, Request] = field(default_factory=dict)
    structured: bool = False
    _next_cookie: int = 1
    _filling: Request | None = None

    def script(self) -> Script:
        export = yield from self._negotiate()
        self.ready(export)
        while True:
            yield from self._reply()

    # Handshake

    def _negotiate(self) -> Generator[memoryview, None, Export]:
        magic, ihaveopt, flags = nbd.GREETING.unpack((yield from take(nbd.GREETING.size)))
        if magic != nbd.NBDMAGIC or ihaveopt != nbd.IHAVEOPT:
            raise NbdError("NBD: no newstyle NBD server answered there")
        if not flags & nbd.FIXED_NEWSTYLE:
            raise NbdError("NBD: the server knows the old handshake only")
        self.send([nbd.CLIENT_FLAGS.pack(flags & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES))])
        replies = yield from self._option(Option.STRUCTURED_REPLY, b"")
        self.structured = replies is not None
        name = self.export_name.encode()
        infos = struct.pack(">HHHH", 3, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        replies = yield from self._option(Option.GO, struct.pack(">I", len(name)) + name + infos)
        if replies is not None:
            return self._export(replies)
        return (yield from self._old_export(name, flags))

    def _option(self, option: Option, data: bytes) -> Generator[memoryview, None, list[bytes] | None]:
        """The infos that came before the ACK, or None where the option is not known."""
        self.send([nbd.OPTION.pack(nbd.IHAVEOPT, option, len(data)), data])
        infos: list[bytes] = []
        for _ in range(OPTION_REPLIES_MAX):
            header = yield from take(nbd.OPTION_REPLY.size)
            magic, about, kind, length = nbd.OPTION_REPLY.unpack(header)
            if magic != nbd.OPTION_REPLY_MAGIC or about != option or length > nbd.OPTION_MAX:
                raise NbdError(f"NBD: a malformed reply to option {option.name}")
            body = bytes((yield from take(length)))
            if kind == Rep.ACK:
                return infos
            if kind == Rep.INFO:
                infos.append(body)
            elif kind == Rep.ERR_UNSUP or (option is Option.STRUCTURED_REPLY and kind & 0x80000000):
                return None
            else:
                raise NbdError(self._refusal(option, kind, body))
        raise NbdError(f"NBD: more than {OPTION_REPLIES_MAX} replies to option {option.name}")

    def _refusal(self, option: Option, kind: int, body: bytes) -> str:
        reason = _REFUSALS.get(kind, f"reply {kind:#x}")  # type: ignore[call-overload]
        said = body[:200].decode(errors="replace")
        text = f"NBD: export {self.export_name!r}, option {option.name}: {reason}"
        return text + (f" ({said})" if said.strip() else "")

    def _export(self, infos: list[bytes]) -> Export:
        export: Export | None = None
        for body in infos:
            kind = int.from_bytes(body[:2], "big")
            if kind == Info.EXPORT and len(body) == nbd.EXPORT_INFO.size:
                _, size, flags = nbd.EXPORT_INFO.unpack(body)
                export = Export(self.export_name, size, Flag(flags))
        if export is None:
            raise NbdError("NBD: the server did not say how large the export is")
        for body in infos:
            self._info(export, int.from_bytes(body[:2], "big"), body)
        return _checked(export)

    def _info(self, export: Export, kind: int, body: bytes) -> None:
        if kind == Info.BLOCK_SIZE and len(body) == nbd.BLOCK_SIZE_INFO.size:
            _, export.block_min, export.block_preferred, maximum = nbd.BLOCK_SIZE_INFO.unpack(body)
            export.block_max = min(maximum, nbd.LENGTH_MAX)
        elif kind == Info.DESCRIPTION:
            export.description = body[2:].decode(errors="replace")

    def _old_export(self, name: bytes, flags: int) -> Generator[memoryview, None, Export]:
        """EXPORT_NAME, for servers without GO: the server answers with data or hangs up."""
        self.send([nbd.OPTION.pack(nbd.IHAVEOPT, Option.EXPORT_NAME, len(name)), name])
        size, export_flags = nbd.EXPORT_NAME_REPLY.unpack((yield from take(nbd.EXPORT_NAME_REPLY.size)))
        if not flags & nbd.NO_ZEROES:
            yield from take(124)
        return _checked(Export(self.export_name, size, Flag(export_flags)))

    # Requests

    def request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        buffers: Sequence[memoryview] = (),
        done: Done,
        since: float = 0.0,
    ) -> Request:
        """Send a command. The buffers of a WRITE are sent, those of a READ are filled by the reply."""
        cookie = self._next_cookie
        self._next_cookie = (cookie + 1) & 0xFFFFFFFFFFFFFFFF
        request = Request(cookie, command, offset, length, [], done, since)
        header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length)
        if command is Command.READ:
            request.buffers = [*buffers]
        self.pending[cookie] = request
        self.send([header, *buffers] if command is Command.WRITE else [header])
        return request

    def abandon(self, request: Request) -> bool:
        """Whoever waited is gone: its buffers are not to be touched again. True: divert the intake, too."""
        request.buffers = []
        request.unfilled.clear()
        request.done = _nobody
        filling = self._filling is request
        self._filling = None if filling else self._filling
        return filling

    def goodbye(self) -> None:
        """DISC, which has no reply."""
        self.send([nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0)])

    def drop_all(self, error: XenbusError) -> None:
        """The link is dead: every waiter hears of it."""
        requests, self.pending = list(self.pending.values()), {}
        for request in requests:
            request.buffers = []
            request.unfilled.clear()
            request.done(error)

    # Replies

    def _reply(self) -> Script:
        head = yield from take(nbd.SIMPLE_REPLY.size)
        magic = int.from_bytes(head[:4], "big")
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            _, error, cookie = nbd.SIMPLE_REPLY.unpack(head)
            request = self._find(cookie)
            if error:
                request.error = nbd.error_name(error)
            elif request.command is Command.READ:
                yield from self._fill(request, 0, request.length)
                request.covered = request.length
            self._finish(request)
        elif magic == nbd.STRUCTURED_REPLY_MAGIC and self.structured:
            yield from self._chunk(head + (yield from take(nbd.STRUCTURED_REPLY.size - len(head))))
        else:
            raise NbdError(f"NBD: a reply with magic {magic:#x}")

    def _find(self, cookie: int) -> Request:
        request = self.pending.get(cookie)
        if request is None:
            raise NbdError(f"NBD: a reply to a request that is not in flight (cookie {cookie})")
        return request

    def _chunk(self, head: bytearray) -> Script:
        _, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(head)
        request = self._find(cookie)
        if kind == Chunk.OFFSET_DATA and request.command is Command.READ and length > 8:
            offset = int.from_bytes((yield from take(8)), "big")
            start = self._within(request, offset, length - 8)
            yield from self._fill(request, start, length - 8)
        elif kind == Chunk.OFFSET_HOLE and request.command is Command.READ and length == 12:
            offset, hole = struct.unpack(">QI", (yield from take(12)))
            start = self._within(request, offset, hole)
            for view in _spans(request.buffers, start, hole):
                view[:] = bytes(view.nbytes)
        elif kind & nbd.CHUNK_ERROR_BIT and 6 <= length <= nbd.OPTION_MAX:
            body = yield from take(length)
            request.error = nbd.error_name(int.from_bytes(body[:4], "big"))
        elif kind == Chunk.NONE and length == 0:
            pass
        else:
            raise NbdError(
                f"NBD: a reply chunk of type {kind:#x} and {length} bytes to {request.command.name}"
            )
        if flags & nbd.CHUNK_DONE:
            self._finish(request)

    def _within(self, request: Request, offset: int, length: int) -> int:
        """The place in the request for a chunk. Each byte comes once, so their sum cannot pass the length."""
        start = offset - request.offset
        request.covered += length
        if start < 0 or start + length > request.length or request.covered > request.length:
            raise NbdError(f"NBD: a chunk at {offset} of {length} bytes, outside the read it answers")
        return start

    def _fill(self, request: Request, start: int, length: int) -> Script:
        # Kept in the request, never in a local: what is abandoned must not be held by this frame.
        request.unfilled = deque(_spans(request.buffers, start, length))
        left = length
        while request.unfilled:
            self._filling = request
            left -= request.unfilled[0].nbytes
            yield request.unfilled.popleft()
        if self._filling is request:
            self._filling = None
        while left:
            count = min(left, _SINK)
            left -= count
            yield memoryview(bytearray(count))

    def _finish(self, request: Request) -> None:
        if request.command is Command.READ and not request.error and request.covered != request.length:
            raise NbdError("NBD: a reply that left a part of the read out")
        del self.pending[request.cookie]
        request.buffers = []
        request.done(request.error)


def _nobody(error: str | XenbusError | None) -> None:
    """Takes the reply of an abandoned request."""


def _spans(buffers: list[memoryview], start: int, length: int) -> Iterator[memoryview]:
    """The slices of scattered buffers that hold `length` bytes from `start` of the whole."""
    for buffer in buffers:
        size = buffer.nbytes
        if start >= size:
            start -= size
            continue
        if not length:
            return
        view = buffer[start : start + length]
        start = 0
        length -= view.nbytes
        yield view


def _checked(export: Export) -> Export:
    """Refuse block sizes that make no sense (proto.md: powers of two, minimum at most 64 KiB)."""
    low, best, high = export.block_min, export.block_preferred, export.block_max
    if not 1 <= low <= 65536 or low & (low - 1) or best < low or high < low or high > nbd.LENGTH_MAX:
        raise NbdError(f"NBD: block sizes {low}, {best}, {high} make no sense")
    if export.size > 0x7FFFFFFFFFFFFFFF:
        raise NbdError(f"NBD: an export of {export.size} bytes")
    if not export.flags & Flag.HAS_FLAGS:
        export.flags = Flag.HAS_FLAGS
    return export


def check_export_name(name: str) -> str:
    """Raises UsageError for a name that cannot be sent."""
    if len(name.encode()) > nbd.NAME_MAX or "\0" in name:
        raise UsageError(f"NBD export name of {len(name)} characters: too long, or with a NUL")
    return name
