"""A client that sends whatever bytes it likes to a store's socket, from inside the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from xenbus.xenstore.wire import CODECS, Message, Op, Parser, encode, parse_error

DEADLINE = 5.0


async def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Until the condition holds; AssertionError after `seconds`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, "it did not come to that"
        await asyncio.sleep(0.001)


class RawStore:
    """Non-blocking socket; every wait has a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.parser = Parser(limit=1 << 20)
        self.messages: list[Message] = []
        self._req_id = 0

    @classmethod
    async def connect(cls, path: Path) -> RawStore:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), DEADLINE)

    async def receive(self, count: int = 1) -> list[Message]:
        """The next `count` messages; ConnectionError at end of file."""
        loop = asyncio.get_running_loop()
        while len(self.messages) < count:
            data = await asyncio.wait_for(loop.sock_recv(self.sock, 65536), DEADLINE)
            if not data:
                raise ConnectionResetError("end of file")
            self.messages += self.parser.feed(data)
        got, self.messages = self.messages[:count], self.messages[count:]
        return got

    async def ended(self) -> bool:
        """Whether the other side closes, whatever it says before that."""
        try:
            while True:
                await self.receive()
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def request(self, op: Op, *arguments: object, tx: int = 0) -> bytes:
        self._req_id += 1
        return encode(op, self._req_id, tx, CODECS[op].request(*arguments))

    async def ask(self, op: Op, *arguments: object, tx: int = 0) -> bytes:
        """The reply's payload, or the name of the error as bytes after `!`. Events are skipped."""
        await self.send(self.request(op, *arguments, tx=tx))
        while True:
            (message,) = await self.receive()
            if message.op != Op.WATCH_EVENT:
                return (
                    b"!" + parse_error(message.payload).encode()
                    if message.op == Op.ERROR
                    else message.payload
                )

    def close(self) -> None:
        self.sock.close()
