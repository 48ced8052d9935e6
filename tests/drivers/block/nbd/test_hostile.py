"""Whatever the other end sends is bounded, answered or hung up on, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import socket
import stat
import struct
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.until import descriptors, until

from xenbus.drivers.block.nbd import Address, NbdClient, NbdError, NbdServer
from xenbus.drivers.block.nbd import protocol as nbd
from xenbus.drivers.block.nbd import server as server_module
from xenbus.drivers.block.storage import StorageError, open_storage
from xenbus.errors import DeadlineError, LinkDown, UsageError, XenbusError

GREETING = nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 3)
HELLO = nbd.CLIENT_FLAGS.pack(3)
SIZE = 1 << 20


def option(number, data=b""):
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data


def option_reply(number, kind, data=b""):
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def request(command, offset=0, length=0, *, flags=0, cookie=1, data=b""):
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length) + data


GO = option(nbd.Option.GO, struct.pack(">IH", 0, 0))


@asynccontextmanager
async def served(tmp_path, target=f"memory:{SIZE}"):
    disk = await open_storage(target)
    try:
        async with NbdServer(disk) as server:
            await server.serve_unix(tmp_path / "nbd")
            yield server
    finally:
        await disk.close()


@asynccontextmanager
async def talk(server, *parts):
    """A raw client that has read the greeting and sent these bytes."""
    reader, writer = await asyncio.open_unix_connection(server.path)
    try:
        async with asyncio.timeout(10):
            assert await reader.readexactly(len(GREETING)) == GREETING
            writer.write(b"".join(parts))
            yield reader, writer
    finally:
        writer.close()


async def agreed(reader):
    """Skip GO's replies."""
    kind = None
    while kind != nbd.Rep.ACK:
        head = await reader.readexactly(nbd.OPTION_REPLY.size)
        _, _, kind, length = nbd.OPTION_REPLY.unpack(head)
        await reader.readexactly(length)


async def reply(reader):
    """(error, cookie)"""
    magic, error, cookie = nbd.SIMPLE_REPLY.unpack(await reader.readexactly(16))
    assert magic == nbd.SIMPLE_REPLY_MAGIC
    return error, cookie


async def still_serves(server):
    async with await NbdClient.connect(Address(path=str(server.path)), timeout=5) as other:
        await other.write(512, b"alive" + bytes(507))
        assert (await other.read(512, 5)) == b"alive"


HANGS_UP = {
    "client flags": struct.pack(">I", 0xFF),
    "option magic": HELLO + b"x" * 16,
    "option length": HELLO + nbd.OPTION.pack(nbd.IHAVEOPT, nbd.Option.GO, 1 << 31),
    "option flood": HELLO + option(99) * 65,
    "long name": HELLO + option(nbd.Option.GO, struct.pack(">I", 5000) + b"n" * 5000 + b"\0\0"),
    "name not utf-8": HELLO + option(nbd.Option.EXPORT_NAME, b"\xff\xfe"),
    "unknown old name": HELLO + option(nbd.Option.EXPORT_NAME, b"other"),
    "abort": HELLO + option(nbd.Option.ABORT),
    "request magic": HELLO + GO + b"\0" * 28,
    "write too long": HELLO + GO + request(nbd.Command.WRITE, 0, nbd.LENGTH_MAX + 1),
    "goodbye": HELLO + GO + request(nbd.Command.DISC),
}


@pytest.mark.parametrize("name", HANGS_UP)
def test_the_server_hangs_up_and_serves_on(tmp_path, name):
    async def main():
        async with served(tmp_path) as server:
            async with talk(server, HANGS_UP[name]) as (reader, _):
                await reader.read()  # to the end of file, within the deadline
            await still_serves(server)

    asyncio.run(main())


ANSWERS = {
    "read beyond": (request(nbd.Command.READ, SIZE - 512, 1024), "EINVAL"),
    "read far beyond": (request(nbd.Command.READ, (1 << 64) - 1, 0xFFFFFFFF), "EINVAL"),
    "read too long": (request(nbd.Command.READ, 0, 0xFFFFFFFF), "EINVAL"),
    "write beyond": (request(nbd.Command.WRITE, SIZE, 512, data=bytes(512)), "ENOSPC"),
    "zeroes beyond": (request(nbd.Command.WRITE_ZEROES, 0, 0xFFFFFFFF), "ENOSPC"),
    "trim beyond": (request(nbd.Command.TRIM, SIZE, 1), "EINVAL"),
    "unknown command": (request(77), "EINVAL"),
    "unknown flags": (request(nbd.Command.FLUSH, flags=0x80), "EINVAL"),
    "write, unknown flags": (request(nbd.Command.WRITE, 0, 4, flags=0x80, data=b"evil"), "EINVAL"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_bad_request_is_answered_and_the_next_one_served(tmp_path, name):
    bad, error = ANSWERS[name]
    good = request(nbd.Command.READ, 0, 4, cookie=2)

    async def main():
        async with served(tmp_path) as server, talk(server, HELLO, GO, bad, good) as (reader, _):
            await agreed(reader)
            assert await reply(reader) == (nbd.ERRORS[error], 1)
            assert await reply(reader) == (0, 2)
            assert await reader.readexactly(4) == bytes(4)

    asyncio.run(main())


def test_malformed_and_unknown_options_are_refused_by_kind(tmp_path):
    cases = [
        (option(nbd.Option.STARTTLS), nbd.Rep.ERR_UNSUP),
        (option(nbd.Option.LIST, b"x"), nbd.Rep.ERR_INVALID),
        (option(nbd.Option.GO, b""), nbd.Rep.ERR_INVALID),
        (option(nbd.Option.GO, struct.pack(">IH", 0xFFFFFFFF, 0)), nbd.Rep.ERR_INVALID),
        (option(nbd.Option.INFO, struct.pack(">IH", 0, 9)), nbd.Rep.ERR_INVALID),
        (option(nbd.Option.GO, struct.pack(">I", 1) + b"x" + b"\0\0"), nbd.Rep.ERR_UNKNOWN),
    ]

    async def main():
        async with (
            served(tmp_path) as server,
            talk(server, HELLO, *(data for data, _ in cases), GO) as (reader, _),
        ):
            for _, expected in cases:
                _, _, kind, length = nbd.OPTION_REPLY.unpack(await reader.readexactly(20))
                await reader.readexactly(length)
                assert kind == expected
            await agreed(reader)

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), how=st.sampled_from([b"", HELLO, HELLO + GO]))
def test_no_bytes_hurt_the_server(tmp_path_factory, data, how):
    async def main():
        async with served(tmp_path_factory.mktemp("fuzz")) as server:
            async with talk(server, how, data) as (reader, writer):
                writer.write_eof()
                await reader.read()
            await still_serves(server)

    asyncio.run(main())


class Stuck:
    """Blocks whose reads wait until let go; counts how many are inside."""

    size, sector_size, readonly = 64 << 20, 512, False

    def __init__(self):
        self.inside = self.most = 0
        self.go = asyncio.Event()

    async def read_into(self, offset, buffer):
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.go.wait()
        finally:
            self.inside -= 1

    async def write(self, offset, data):
        raise RuntimeError("a bug in the disk")

    async def flush(self):
        raise StorageError("ENOSPC", "disk", "flush")

    async def discard(self, offset, length):
        raise StorageError("EOPNOTSUPP", "disk", "discard")


@pytest.mark.parametrize(("length", "most"), [(512, server_module.IN_FLIGHT_MAX), (32 << 20, 2)])
def test_what_one_client_has_in_flight_is_bounded(tmp_path, length, most):
    async def main():
        disk = Stuck()
        async with NbdServer(disk) as server:
            await server.serve_unix(tmp_path / "nbd")
            flood = b"".join(request(nbd.Command.READ, 0, length, cookie=n) for n in range(500))
            async with talk(server, HELLO, GO, flood) as (reader, _):
                await agreed(reader)
                await until(lambda: disk.inside >= most)
                for _ in range(20):
                    await asyncio.sleep(0)
                assert disk.most == most
            disk.go.set()  # it hung up: nobody is left once the disk has answered
            await until(lambda: not disk.inside and not server.clients)

    asyncio.run(main())


def test_a_client_that_reads_no_replies_is_not_served_on(tmp_path):
    async def main():
        async with served(tmp_path) as server:
            flood = b"".join(request(nbd.Command.READ, 0, SIZE, cookie=n) for n in range(1000))
            async with talk(server, HELLO, GO, flood):
                (client,) = server._clients
                await until(lambda: client._intake.paused)
                await still_serves(server)
                assert client._link.queued <= server_module.BYTES_MAX + nbd.LENGTH_MAX
                client._link.fail(LinkDown("the test is over"))  # close() would wait its ten seconds

    asyncio.run(main())


def test_a_failing_disk_is_an_errno_and_a_broken_one_eio(tmp_path, caplog):
    async def main():
        async with NbdServer(Stuck()) as server:
            await server.serve_unix(tmp_path / "nbd")
            async with await NbdClient.connect(Address(path=str(server.path))) as disk:
                with pytest.raises(StorageError, match="ENOSPC"):
                    await disk.flush()
                with pytest.raises(StorageError, match="EIO"):
                    await disk.write(0, bytes(512))
                await disk.discard(0, 512)  # advice

    asyncio.run(main())
    assert "a bug in the disk" in caplog.text


def test_clients_are_counted_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 2)

    async def main():
        async with served(tmp_path) as server:
            where = Address(path=str(server.path))
            async with await NbdClient.connect(where), await NbdClient.connect(where):
                assert server.clients == 2
                with pytest.raises(LinkDown):
                    await NbdClient.connect(where)

    asyncio.run(main())


def test_a_client_that_never_finishes_its_handshake_is_hung_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 0.05)

    async def main():
        async with served(tmp_path) as server, talk(server, HELLO) as (reader, _):
            assert await reader.read() == b""

    asyncio.run(main())


def test_the_socket_is_its_owners_and_goes_with_the_server(tmp_path):
    async def main():
        async with served(tmp_path) as server:
            assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
            with pytest.raises(UsageError, match="already"):
                await server.serve_unix(tmp_path / "other")
            second = NbdServer(await open_storage("memory:1M"))
            with pytest.raises(StorageError, match="another server"):
                await second.serve_unix(server.path)
            await second.close()
        assert not (tmp_path / "nbd").exists()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "nbd"))
        async with served(tmp_path) as server:  # a stale one is replaced
            await still_serves(server)
        (tmp_path / "nbd").write_text("a file of somebody's")
        with pytest.raises(StorageError, match="EADDRINUSE"):
            async with served(tmp_path):
                pass
        assert (tmp_path / "nbd").read_text() == "a file of somebody's"
        with pytest.raises(UsageError, match="107"):
            async with served(tmp_path / ("x" * 100)):
                pass

    asyncio.run(main())


def test_nothing_is_left_open(tmp_path):
    async def main():
        before = descriptors()
        async with served(tmp_path) as server:
            await still_serves(server)
            async with talk(server, HELLO):
                pass
        assert descriptors() == before
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(main())


# Hostile servers

INFO = option_reply(nbd.Option.GO, nbd.Rep.INFO, nbd.EXPORT_INFO.pack(0, SIZE, 1 | 4 | 8 | 32 | 64))
NO_SR = option_reply(nbd.Option.STRUCTURED_REPLY, nbd.Rep.ERR_UNSUP)
SR = option_reply(nbd.Option.STRUCTURED_REPLY, nbd.Rep.ACK)
ACK = option_reply(nbd.Option.GO, nbd.Rep.ACK)


@asynccontextmanager
async def fake(path, behave):
    """A server that does what `behave(reader, writer)` does with each connection; gone with its tasks."""
    tasks = set()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await behave(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield Address(path=str(path))
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)


@asynccontextmanager
async def answering(tmp_path, *parts, hang_up=False):
    """A server that sends its bytes whatever it is asked."""

    async def behave(reader, writer):
        writer.write(b"".join(parts))
        if not hang_up:
            await reader.read()

    async with fake(tmp_path / "evil", behave) as where:
        yield where


def infos(*sizes):
    return option_reply(nbd.Option.GO, nbd.Rep.INFO, nbd.BLOCK_SIZE_INFO.pack(nbd.Info.BLOCK_SIZE, *sizes))


BAD_HANDSHAKES = {
    "not nbd": b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
    "old style": nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 0),
    "reply magic": GREETING + b"y" * 20,
    "reply to another": GREETING + option_reply(nbd.Option.LIST, nbd.Rep.ACK),
    "reply length": GREETING + nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, 8, 1, 1 << 31),
    "endless": GREETING + NO_SR + INFO * 65,
    "no size": GREETING + NO_SR + ACK,
    "huge": GREETING + NO_SR + option_reply(7, 3, nbd.EXPORT_INFO.pack(0, 1 << 63, 1)) + ACK,
    "block sizes": GREETING + NO_SR + INFO + infos(3, 4096, 4096) + ACK,
    "block sizes of nothing": GREETING + NO_SR + INFO + infos(0, 0, 0) + ACK,
    "unknown": GREETING + NO_SR + option_reply(nbd.Option.GO, nbd.Rep.ERR_UNKNOWN, b"no"),
}


@pytest.mark.parametrize("name", BAD_HANDSHAKES)
def test_the_client_refuses_a_handshake_that_makes_no_sense(tmp_path, name):
    async def main():
        async with answering(tmp_path, BAD_HANDSHAKES[name]) as where:
            with pytest.raises(NbdError, match="NBD"):
                await NbdClient.connect(where, timeout=5)

    asyncio.run(main())


def chunk(kind, body, *, done=True, cookie=1):
    return nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(body)) + body


BAD_REPLIES = {
    "magic": (NO_SR, b"z" * 16),
    "cookie": (NO_SR, nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 9)),
    "structured unasked": (NO_SR, chunk(0, b"")),
    "data outside": (SR, chunk(1, struct.pack(">Q", 1 << 40) + b"x" * 512)),
    "data too long": (SR, chunk(1, bytes(8) + b"x" * 1024)),
    "data twice": (SR, (chunk(1, bytes(8) + b"x" * 512, done=False)) * 2),
    "data left out": (SR, chunk(1, bytes(8) + b"x" * 100)),
    "hole outside": (SR, chunk(2, struct.pack(">QI", 0, 4096))),
    "unknown chunk": (SR, chunk(77, b"")),
    "endless error": (SR, nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, 0x8001, 1, 1 << 31)),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_makes_no_sense_fails_every_waiter(tmp_path, name):
    mode, evil = BAD_REPLIES[name]

    async def serve(reader, writer):
        writer.write(GREETING + mode + INFO + ACK)
        await reader.readexactly(4 + 16 + 16 + 4 + 8)  # flags, two options
        await reader.readexactly(28)
        writer.write(evil)
        await reader.read()

    async def main():
        async with (
            fake(tmp_path / "evil", serve) as where,
            await NbdClient.connect(where, timeout=5) as client,
        ):
            waiters = await asyncio.gather(client.read(0, 512), client.flush(), return_exceptions=True)
            assert [type(error) for error in waiters] == [NbdError, NbdError]
            with pytest.raises(NbdError):
                await client.read(0, 512)

    asyncio.run(main())


def test_a_chunked_read_is_put_together_in_any_order(tmp_path):
    async def serve(reader, writer):
        writer.write(GREETING + SR + INFO + ACK)
        await reader.readexactly(4 + 16 + 16 + 4 + 8 + 28)
        writer.write(chunk(1, struct.pack(">Q", 1024) + b"B" * 512, done=False))
        writer.write(chunk(2, struct.pack(">QI", 1536, 1024), done=False))
        writer.write(chunk(1, struct.pack(">Q", 512) + b"A" * 512, done=False) + chunk(0, b""))
        await reader.read()

    async def main():
        async with (
            fake(tmp_path / "nbd", serve) as where,
            await NbdClient.connect(where, timeout=5) as client,
        ):
            parts = [memoryview(bytearray(b"?" * size)) for size in (700, 1, 1347)]
            await client.readv(512, parts)
            assert b"".join(parts) == b"A" * 512 + b"B" * 512 + bytes(1024)

    asyncio.run(main())


@pytest.mark.parametrize("when", ["handshake", "request"])
def test_a_server_that_says_nothing_meets_the_deadline(tmp_path, when):
    said = () if when == "handshake" else (GREETING, NO_SR, INFO, ACK)

    async def main():
        async with answering(tmp_path, *said) as where:
            with pytest.raises(DeadlineError, match=r"nbd\+unix.*evil"):
                async with await NbdClient.connect(where, timeout=0.1) as client:
                    await asyncio.gather(client.read(0, 512), client.flush())

    asyncio.run(main())


@pytest.mark.parametrize("said", [(), (GREETING,), (GREETING, NO_SR, INFO, ACK)])
def test_a_server_that_hangs_up_is_a_dead_link(tmp_path, said):
    async def main():
        async with answering(tmp_path, *said, hang_up=True) as where:
            with pytest.raises(LinkDown):
                async with await NbdClient.connect(where, timeout=5) as client:
                    await client.read(0, 512)

    asyncio.run(main())


def test_nobody_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nothing.*ENOENT"):
        asyncio.run(NbdClient.connect(f"nbd+unix:///x?socket={tmp_path}/nothing"))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/.*ECONNREFUSED"):
        asyncio.run(NbdClient.connect("nbd://127.0.0.1:1/"))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=120), how=st.sampled_from([GREETING, GREETING + NO_SR + INFO + ACK]))
def test_no_bytes_hang_the_client(tmp_path_factory, data, how):
    async def main():
        async with answering(tmp_path_factory.mktemp("fuzz"), how, data, hang_up=True) as where:
            with pytest.raises(XenbusError):
                async with await NbdClient.connect(where, timeout=5) as client:
                    await client.read(0, 4096)
                    await client.read(0, 4096)

    asyncio.run(main())


# Cancelling


def test_a_cancelled_read_leaves_its_buffer_alone_and_the_link_alive(tmp_path):
    payload = b"P" * (256 << 10)
    head = nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1)

    async def main():
        go = asyncio.Event()

        async def serve(reader, writer):
            writer.write(GREETING + NO_SR + INFO + ACK)
            await reader.readexactly(4 + 16 + 16 + 4 + 8 + 28)
            writer.write(head + payload[: 100 << 10])
            await go.wait()
            writer.write(payload[100 << 10 :])
            await reader.readexactly(28)
            writer.write(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 2) + b"n" * 512)
            await reader.read()

        async with (
            fake(tmp_path / "nbd", serve) as where,
            await NbdClient.connect(where, timeout=5) as client,
        ):
            buffer, second = bytearray(200 << 10), bytearray(56 << 10)
            task = asyncio.create_task(client.readv(0, [memoryview(buffer), memoryview(second)]))
            await until(lambda: buffer.count(b"P") >= 100 << 10)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            del task
            buffer.clear()  # BufferError if a view of it were still held
            second += b"!"
            go.set()
            assert await client.read(0, 512) == b"n" * 512
            assert not client._session.pending
            assert b"P" not in second

    asyncio.run(main())
