"""The same bad input against a daemon that serves others meanwhile: on a socket, and in a guest's ring page.

Targets as in store_fuzz: `socket` is a stream in pieces, `ring` what a guest does to its page, command after
command: bytes put, words set, octets changed, kicks. Others do work meanwhile whose answers are known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as sockets
from collections.abc import AsyncIterator, Iterator

from tests.support.raw_store import until
from tests.support.store_fuzz import EVIL, GOOD, PIECES, SENDERS
from tests.support.store_host import Host, RawGuest, host
from xenbus.xenstore.client import Client
from xenbus.xenstore.transport.unix import UnixTransport
from xenbus.xenstore.wire import Op, Parser, parse_error

DEADLINE = 10.0


class _Log(logging.Handler):
    """What a daemon must never say: a traceback, an error."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.lines.append(self.format(record))


@contextlib.contextmanager
def no_tracebacks() -> Iterator[None]:
    """AssertionError if this process logs an error or a traceback; warnings are not shown meanwhile.

    asyncio's log is where the traceback of a callback goes.
    """
    log, root, callbacks = _Log(), logging.getLogger("xenbus"), logging.getLogger("asyncio")
    level, propagate = root.level, root.propagate
    root.addHandler(log)
    callbacks.addHandler(log)
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(log)
        callbacks.removeHandler(log)
        root.setLevel(level)
        root.propagate = propagate
    assert log.lines == []


class Bystander:
    """A client whose every answer is known beforehand."""

    def __init__(self, client: Client, home: str) -> None:
        self.client, self.home, self.rounds = client, home, 0
        self.heard: asyncio.Queue[str] = asyncio.Queue()

    @classmethod
    async def ready(cls, client: Client, home: str) -> Bystander:
        self = cls(client, home)
        await client.write(f"{home}/n", "0")
        await client.watch(f"{home}/n", self.heard.put_nowait)
        assert await self.heard.get() == f"{home}/n"
        return self

    async def work(self) -> None:
        """A write, its event, a read, a list and a transaction, within the deadline."""
        client, path = self.client, f"{self.home}/n"
        self.rounds += 1
        value = b"%d" % self.rounds
        async with asyncio.timeout(DEADLINE):
            await client.write(path, value)
            assert await self.heard.get() == path
            assert await client.read(path) == value
            assert "n" in await client.directory(self.home)
            await client.transaction(lambda tx: tx.write(path, value + b"!"))
            assert await self.heard.get() == path
            assert await client.read(path) == value + b"!"
        assert self.heard.empty()


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[tuple[Host, Bystander, Bystander]]:
    """(host, domain 0's bystander, guest 6's over its ring); at the end all is as before."""
    with no_tracebacks():
        async with host() as one:
            # The commands that reach out of the daemon are for others to test.
            one.daemon.write_report = lambda name, text: False  # type: ignore[method-assign]
            dom0 = await Bystander.ready(one.dom0, "/bystander")
            client = await one.guest(GOOD)
            guest = await Bystander.ready(client, "data")
            yield one, dom0, guest
            await dom0.work()
            await client.close()


def socket(data: bytes) -> None:
    """A stream into a socket of domain 0's or of a guest's, in pieces."""
    if data:
        asyncio.run(_socket(data))


async def _socket(data: bytes) -> None:
    domid, size = SENDERS[data[0] & 1], PIECES[data[0] >> 1 & 7] or len(data)
    async with scene() as (one, dom0, guest):
        near, far = sockets.socketpair()
        near.setblocking(False)
        session = one.daemon.open_session(domid, UnixTransport(far, "a fuzzer"))
        session.start()
        reading = asyncio.create_task(_drain(near))
        loop = asyncio.get_running_loop()
        step = max(size, len(data) // 8)  # the others' work is what takes the time
        for start in range(1, len(data), step):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for at in range(start, min(start + step, len(data)), size):
                    await asyncio.wait_for(loop.sock_sendall(near, data[at : at + size]), DEADLINE)
            await dom0.work()
            if domid:
                # What domain 0 sends may be meant for this guest.
                await guest.work()
        # A client may also leave with a request half sent.
        near.shutdown(sockets.SHUT_WR)
        await asyncio.wait_for(reading, DEADLINE)
        near.close()
        await until(lambda: session.closed)
        conn = session.conn
        assert (len(conn.watches), len(conn.transactions), conn.queued) == (0, 0, 0)


async def _drain(sock: sockets.socket) -> None:
    """All that comes is well-formed, each error one of the protocol's."""
    parser, loop = Parser(), asyncio.get_running_loop()
    with contextlib.suppress(ConnectionResetError):
        while data := await loop.sock_recv(sock, 65536):
            for message in parser.feed(data):
                if message.op == Op.ERROR:
                    assert parse_error(message.payload).startswith("E")


def ring(data: bytes) -> None:
    """What a guest does to its page: each command is a byte and what it takes (see `_command`)."""
    asyncio.run(_ring(data))


async def _ring(data: bytes) -> None:
    async with scene() as (one, dom0, guest):
        evil = await one.raw_guest(EVIL)
        at = count = 0
        while at < len(data):
            at = await _command(evil, data, at)
            count += 1
            if count % 8 == 0:
                await guest.work()
        evil.channel.notify()
        await guest.work()
        await dom0.work()
        assert await one.dom0.is_introduced(EVIL)
        one.machine.kill(EVIL)
        await until(lambda: len(one.daemon._guests) == 1)
        await guest.work()
        assert EVIL not in one.daemon.engine.domains


async def _command(evil: RawGuest, data: bytes, at: int) -> int:
    """0 n bytes: into the request ring, as far as the page says that there is room; 1 k word: one of the
    eight words; 2 lo hi octet: anywhere; else a kick, some turns of the loop, and perhaps replies taken."""
    verb, rest = data[at] & 3, data[at + 1 : at + 7]
    if verb == 0 and rest:
        size = rest[0]
        piece = data[at + 2 : at + 2 + size]
        produced, consumed = evil.word(2052), evil.word(2048)
        room = max(0, 1024 - (produced - consumed) % 2**32)
        for index, octet in enumerate(piece[:room]):
            evil.page[(produced + index) % 1024] = octet
        evil.set(2052, produced + min(room, len(piece)))
        return at + 2 + size
    if verb == 1 and len(rest) >= 5:
        evil.set(2048 + rest[0] % 8 * 4, int.from_bytes(rest[1:5], "little"))
        return at + 6
    if verb == 2 and len(rest) >= 3:
        evil.page[int.from_bytes(rest[:2], "little") % 4096] = rest[2]
        return at + 4
    evil.channel.notify()
    for _ in range(data[at] >> 2 & 7):
        await asyncio.sleep(0)
    if data[at] & 128:
        evil.set(2056, evil.word(2060))
    return at + 1
