"""`recording:FILE,ADDRESS`: any other transport, with every message written to a file as it passes.

Knows the message's frame and nothing of its meaning. One JSON object a line, so that people and `jq` can
read it; `replay.py` plays it back. The file holds what the store held: treat it as such (mode 0600).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TextIO

from xenbus.errors import UsageError
from xenbus.xenstore.transport import Pipe, Pollable, Receiver, Scheme, Transport, register, resolve
from xenbus.xenstore.wire.message import Message, Op, Parser, ProtocolError, op_name

# Bytes of file after which recording stops (the connection goes on).
FILE_LIMIT = 256 << 20
# A recording shows what passed; what was too long for the protocol is for the client to judge.
_PAYLOAD_LIMIT = 16 << 20


@dataclass(slots=True, frozen=True)
class Record:
    """One message. `seconds` since the recording began; `outgoing`: from the client to the store;
    `connection`: which one, where several were recorded."""

    seconds: float
    outgoing: bool
    message: Message
    connection: int = 1

    def encode(self) -> str:
        message = self.message
        return json.dumps(
            {
                "seconds": round(self.seconds, 6),
                "connection": self.connection,
                "to": "store" if self.outgoing else "client",
                "op": op_name(message.op),
                "req_id": message.req_id,
                "tx_id": message.tx_id,
                # One character a byte.
                "payload": message.payload.decode("latin-1"),
            }
        )

    @classmethod
    def decode(cls, line: str) -> Record:
        """UsageError for a line that no recording has."""
        try:
            entry = json.loads(line)
            op = Op[entry["op"]] if not entry["op"].isdecimal() else int(entry["op"])
            payload = entry["payload"].encode("latin-1")
            message = Message(op, int(entry["req_id"]), int(entry["tx_id"]), payload)
            if not all(0 <= number < 1 << 32 for number in (op, message.req_id, message.tx_id)):
                raise ValueError("a number that no header holds")
            connection = int(entry.get("connection", 1))
            return cls(float(entry["seconds"]), entry["to"] == "store", message, connection)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
            raise UsageError(f"no line of a recording: {line[:80]!r} ({exc!r})") from exc


def read_recording(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records in order. UsageError for a line that is none; OSError if the file cannot be read."""
    with Path(path).open(encoding="ascii") as file:
        for line in file:
            yield Record.decode(line)


class Tape:
    """The file. It ends at FILE_LIMIT, or where the disk is full (`full`); who is recorded goes on. What
    comes after `close` is appended."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file: TextIO | None = self._open(os.O_TRUNC)
        self._began = monotonic()
        self._left = FILE_LIMIT
        self.full = False
        self.connections = 0
        self.messages = 0

    def _open(self, how: int) -> TextIO:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):  # and not /dev/null
            os.fchmod(fd, 0o600)  # a file that was there may have been anybody's to read
        return os.fdopen(fd, "w", encoding="ascii")

    def track(self) -> Track:
        """For one more connection."""
        self.connections += 1
        return Track(self, self.connections)

    def write(self, outgoing: bool, message: Message, connection: int) -> None:
        if self.full:
            return
        line = Record(monotonic() - self._began, outgoing, message, connection).encode() + "\n"
        self._left -= len(line)
        if self._left < 0:
            self.full = True
            self.close()
            return
        self.messages += 1
        try:
            if self._file is None:
                self._file = self._open(os.O_APPEND)
            self._file.write(line)
        except OSError:
            self.full = True
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                self.full = True  # what was written last is not in there


class Track:
    """One connection on a tape: a parser for each direction."""

    def __init__(self, tape: Tape, connection: int) -> None:
        self.tape = tape
        self._connection = connection
        self._parsers = {True: Parser(_PAYLOAD_LIMIT), False: Parser(_PAYLOAD_LIMIT)}

    def put(self, outgoing: bool, data: bytes | memoryview) -> list[Message]:
        """The messages that `data` completes, which are written."""
        try:
            messages = self._parsers[outgoing].feed(data)
        except ProtocolError as exc:
            messages = exc.messages
        for message in messages:
            self.tape.write(outgoing, message, self._connection)
        return messages


class RecordingTransport:
    """A transport around another; the file is complete once the connection is closed or lost."""

    def __init__(self, inner: Transport, tape: Tape) -> None:
        self._inner = inner
        self._track = tape.track()
        self._receiver: Receiver | None = None

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def max_outstanding(self) -> int:
        return self._inner.max_outstanding

    @property
    def backlog(self) -> int:
        return self._inner.backlog

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._inner.start(self)

    def send(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self._track.put(True, message)
        self._inner.send(messages)

    def pause(self, paused: bool) -> None:
        self._inner.pause(paused)

    def close(self) -> None:
        self._inner.close()
        self._track.tape.close()

    # ---- Receiver ----

    def data_received(self, data: bytes | memoryview) -> None:
        assert self._receiver is not None
        self._track.put(False, data)
        self._receiver.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._receiver is not None
        self._track.tape.close()
        self._receiver.connection_lost(exc)

    def drained(self) -> None:
        assert self._receiver is not None
        self._receiver.drained()


class RecordingPipe:
    """The same around a pipe of a caller that blocks."""

    def __init__(self, inner: Pipe, tape: Tape) -> None:
        self._inner = inner
        self._track = tape.track()

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def max_outstanding(self) -> int:
        return self._inner.max_outstanding

    def send(self, messages: Sequence[bytes], timeout: float) -> None:
        for message in messages:
            self._track.put(True, message)
        self._inner.send(messages, timeout)

    def receive(self, timeout: float) -> bytes:
        data = self._inner.receive(timeout)
        self._track.put(False, data)
        return data

    def close(self) -> None:
        self._inner.close()
        self._track.tape.close()


class RecordingPollable(RecordingPipe):
    """And around one that can be used without waiting."""

    def __init__(self, inner: Pollable, tape: Tape) -> None:
        super().__init__(inner, tape)
        self._pollable = inner

    def fileno(self) -> int:
        return self._pollable.fileno()

    def take(self) -> bytes | None:
        data = self._pollable.take()
        if data:
            self._track.put(False, data)
        return data

    def offer(self, messages: Sequence[bytes]) -> bytes:
        rest = self._pollable.offer(messages)
        data = b"".join(messages)
        self._track.put(True, data[: len(data) - len(rest)])
        return rest


# By absolute path. A client that connects again goes on with the file of its first connection.
_tapes: dict[str, Tape] = {}


def _tape(path: str) -> Tape:
    key = str(Path(path).absolute())
    if key not in _tapes:
        _tapes[key] = Tape(path)
    return _tapes[key]


def _split(rest: str) -> tuple[str, Scheme, str]:
    path, comma, address = rest.partition(",")
    if not (path and comma and address):
        raise UsageError(f"recording:{rest}: expected recording:FILE,ADDRESS")
    return path, *resolve(address)


def _connect(rest: str) -> RecordingTransport:
    path, scheme, inner = _split(rest)
    return RecordingTransport(scheme.connect(inner), _tape(path))


def _blocking(rest: str) -> RecordingPipe:
    path, scheme, inner = _split(rest)
    pipe = scheme.pipe(inner)
    tape = _tape(path)
    return RecordingPollable(pipe, tape) if isinstance(pipe, Pollable) else RecordingPipe(pipe, tape)


register("recording", _connect, _blocking)
