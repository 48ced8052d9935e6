"""The server's side of NBD without I/O: the handshake and the requests, every length of theirs bounded.

Pure. What a client may send is decided here; what is done about it is the owner's (`serve`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from xenbus.drivers.block.nbd import protocol as nbd
from xenbus.drivers.block.nbd.intake import Script, take
from xenbus.drivers.block.nbd.protocol import Command, CommandFlag, Export, Flag, Info, NbdError, Option, Rep

OPTIONS_MAX = 64  # options before the client must have made up its mind
Send = Callable[[Sequence[bytes | bytearray | memoryview]], None]


@dataclass(slots=True)
class Incoming:
    """A request that passed its checks; `data` is what a WRITE carries."""

    command: Command
    flags: int
    cookie: int
    offset: int
    length: int
    data: memoryview | None = None


@dataclass(slots=True)
class ServerSession:
    """`script()` is what an Intake runs. It ends when the client takes its leave.

    serve:  called with each request, in order
    agreed: called when the handshake is over
    """

    export: Export
    send: Send
    serve: Callable[[Incoming], None]
    agreed: Callable[[], None]

    def script(self) -> Script:
        self.send([nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)])
        (flags,) = nbd.CLIENT_FLAGS.unpack((yield from take(nbd.CLIENT_FLAGS.size)))
        if flags & ~(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES):
            raise NbdError(f"NBD: client flags {flags:#x}")
        if not (yield from self._options(bool(flags & nbd.NO_ZEROES))):
            return
        self.agreed()
        while (yield from self._request()):
            pass

    # Handshake

    def _options(self, no_zeroes: bool) -> Generator[memoryview, None, bool]:
        """True: on to the requests. False: the client left."""
        for _ in range(OPTIONS_MAX):
            magic, option, length = nbd.OPTION.unpack((yield from take(nbd.OPTION.size)))
            if magic != nbd.IHAVEOPT or length > nbd.OPTION_MAX:
                raise NbdError(f"NBD: a malformed option ({magic:#x}, {length} bytes)")
            data = bytes((yield from take(length)))
            if option == Option.EXPORT_NAME:
                self._export_name(data, no_zeroes)
                return True
            if option == Option.ABORT:
                self._reply(option, Rep.ACK)
                return False
            if option == Option.LIST:
                self._list(data)
            elif option in (Option.INFO, Option.GO):
                if self._describe(option, data) and option == Option.GO:
                    return True
            else:
                self._reply(option, Rep.ERR_UNSUP)
        raise NbdError(f"NBD: more than {OPTIONS_MAX} options")

    def _reply(self, option: int, kind: Rep, data: bytes = b"") -> None:
        self.send([nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)), data])

    def _known(self, name: bytes) -> bool:
        return nbd.check_name(name) in ("", self.export.name)

    def _export_name(self, data: bytes, no_zeroes: bool) -> None:
        if not self._known(data):  # the old option has no way to say no
            raise NbdError("NBD: an export that is not here, asked for with EXPORT_NAME")
        reply = nbd.EXPORT_NAME_REPLY.pack(self.export.size, self.export.flags)
        self.send([reply if no_zeroes else reply + bytes(124)])

    def _list(self, data: bytes) -> None:
        if data:
            self._reply(Option.LIST, Rep.ERR_INVALID)
            return
        name = self.export.name.encode()
        self._reply(Option.LIST, Rep.SERVER, struct.pack(">I", len(name)) + name)
        self._reply(Option.LIST, Rep.ACK)

    def _describe(self, option: int, data: bytes) -> bool:
        """INFO and GO: uint32 length, name, uint16 count, that many uint16 infos."""
        length = int.from_bytes(data[:4], "big")
        name, tail = data[4 : 4 + length], data[4 + length :]
        count = int.from_bytes(tail[:2], "big")
        if len(data) < 6 + length or len(tail) != 2 + 2 * count:
            self._reply(option, Rep.ERR_INVALID, b"malformed")
            return False
        if not self._known(name):
            self._reply(option, Rep.ERR_UNKNOWN, b"no such export")
            return False
        export = self.export
        self._reply(option, Rep.INFO, nbd.EXPORT_INFO.pack(Info.EXPORT, export.size, export.flags))
        wanted = set(struct.unpack(f">{count}H", tail[2:]))
        texts = {Info.NAME: export.name, Info.DESCRIPTION: export.description}
        for info, text in texts.items():
            if info in wanted and text:
                self._reply(option, Rep.INFO, info.to_bytes(2, "big") + text.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = (export.block_min, export.block_preferred, export.block_max)
            self._reply(option, Rep.INFO, nbd.BLOCK_SIZE_INFO.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Rep.ACK)
        return True

    # Requests

    def _request(self) -> Generator[memoryview, None, bool]:
        head = yield from take(nbd.REQUEST.size)
        magic, flags, number, cookie, offset, length = nbd.REQUEST.unpack(head)
        if magic != nbd.REQUEST_MAGIC:
            raise NbdError(f"NBD: a request with magic {magic:#x}")
        if number == Command.DISC:
            return False
        data = None
        if number == Command.WRITE:
            if length > nbd.LENGTH_MAX:  # its payload cannot be skipped at any sensible price
                raise NbdError(f"NBD: a write of {length} bytes (at most {nbd.LENGTH_MAX})")
            data = memoryview((yield from take(length)))
        error = self._refuse(number, flags, offset, length)
        if error:
            self.answer(cookie, error)
        else:
            self.serve(Incoming(Command(number), flags, cookie, offset, length, data))
        return True

    def _refuse(self, number: int, flags: int, offset: int, length: int) -> str | None:
        """The errno name a request deserves before anything is done, or None."""
        allowed = _FLAGS.get(number)
        if allowed is None or flags & ~allowed:
            return "EINVAL"
        if number == Command.FLUSH:
            return None
        if number != Command.READ and self.export.flags & Flag.READ_ONLY:
            return "EPERM"
        if offset + length > self.export.size:
            return "ENOSPC" if number in (Command.WRITE, Command.WRITE_ZEROES) else "EINVAL"
        if number == Command.READ and length > nbd.LENGTH_MAX:
            return "EINVAL"
        return None

    def answer(self, cookie: int, error: str | None, data: bytearray | None = None) -> None:
        """A simple reply; `data` is what a READ asked for."""
        number = nbd.error_number(error) if error else 0
        head = nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, number, cookie)
        self.send([head] if data is None else [head, data])


# Plain numbers: the inverse of an IntFlag has only the bits that it knows.
_FLAGS: dict[int, int] = {
    Command.READ: int(CommandFlag.FUA),
    Command.WRITE: int(CommandFlag.FUA),
    Command.FLUSH: 0,
    Command.TRIM: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE),
}
