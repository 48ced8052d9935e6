"""/dev/xen/xenbus without Xen: the device's documented ways, spoken over a socket of packets.

The real device is met by tests/xen. Source of the ways: Linux drivers/xen/xenbus/xenbus_dev_frontend.c.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from xenbus.errors import LinkDown, StoreError
from xenbus.xenstore import calls
from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport import device
from xenbus.xenstore.transport.device import DevicePipe, DeviceTransport
from xenbus.xenstore.wire.message import Op, Parser, encode


class Kernel:
    """Answers as the device does. numbered: a WATCH's reply has the request's id, as newer kernels do."""

    def __init__(self, numbered: bool) -> None:
        self.client, self.side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side.setblocking(False)
        self.numbered = numbered
        self.packets: list[int] = []

    def serve(self) -> None:
        packet = self.side.recv(8192)
        if not packet:
            return
        messages = Parser().feed(packet)
        self.packets.append(len(messages))
        (message,) = messages
        req_id = message.req_id
        payload = b"OK\0"
        if message.op in (Op.WATCH, Op.UNWATCH) and not self.numbered:
            req_id = 0
        elif message.op == Op.READ:
            payload = b"value"
        self.side.send(encode(message.op, req_id, 0, payload))
        if message.op == Op.WATCH:
            path, token, _ = message.payload.split(b"\0")
            self.side.send(encode(Op.WATCH_EVENT, 0, 0, path + b"\0" + token + b"\0"))


@pytest.mark.parametrize("numbered", [False, True])
def test_each_message_is_a_write_of_its_own(numbered: bool) -> None:
    async def main() -> None:
        kernel = Kernel(numbered)
        loop = asyncio.get_running_loop()
        loop.add_reader(kernel.side, kernel.serve)
        client = await Client.connect(DeviceTransport(kernel.client.detach()), timeout=5)
        heard: list[str] = []
        watches = await asyncio.gather(*(client.watch(f"/{n}", heard.append) for n in range(3)))
        assert sorted(heard) == ["/0", "/1", "/2"]
        values = await asyncio.gather(*(client.read("/a") for _ in range(50)))
        assert set(values) == {b"value"}
        for watch in watches:
            await watch.close()
        assert set(kernel.packets) == {1}
        assert set(client.counts().values()) == {0}
        loop.remove_reader(kernel.side)
        await client.close()
        kernel.side.close()

    asyncio.run(main())


def test_a_write_that_fails_is_the_reply(monkeypatch) -> None:
    """Linux fails the write of a WATCH that it refuses, and of a message that its buffer cannot hold."""
    real = os.write

    def write(fd: int, data: bytes) -> int:
        if data[:1] == b"\x04":
            raise OSError(errno.EEXIST, "no")
        if len(data) > 4096:
            raise OSError(errno.EINVAL, "too long")
        return real(fd, data)

    monkeypatch.setattr(device.os, "write", write)

    async def main() -> None:
        kernel = Kernel(True)
        loop = asyncio.get_running_loop()
        loop.add_reader(kernel.side, kernel.serve)
        client = await Client.connect(DeviceTransport(kernel.client.detach()), timeout=5)
        with pytest.raises(StoreError, match="EEXIST"):
            await client.watch("/a", print)
        with pytest.raises(StoreError, match="EINVAL"):
            await client.write("/a", b"x" * 4090)
        assert await client.read("/a") == b"value"
        loop.remove_reader(kernel.side)
        kernel.side.close()
        with pytest.raises(LinkDown):
            await client.read("/a")
        await client.close()

    asyncio.run(main())


def test_a_blocking_caller(monkeypatch) -> None:
    kernel = Kernel(False)
    fd = kernel.client.detach()
    pipe = DevicePipe(fd)
    client = SyncClient(pipe, 5)
    sends = pipe.send

    def send(messages, timeout: float) -> None:
        sends(messages, timeout)
        for _ in messages:
            kernel.serve()

    monkeypatch.setattr(pipe, "send", send)
    assert client.read("/a") == b"value"
    watch = client.watch("/w")
    assert client.poll_watch(1) == (watch, "/w")
    watch.close()
    assert client.poll_watch(0.01) is None
    monkeypatch.setattr(device.os, "write", _refuse)
    monkeypatch.setattr(pipe, "send", sends)
    with pytest.raises(StoreError, match="ENOSPC"):
        client.watch("/x")
    kernel.side.close()
    with pytest.raises(LinkDown):
        client.poll_watch(1)
    client.close()
    client.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_caller_that_never_waits(monkeypatch) -> None:
    """One request at a time; a write that the kernel refuses is answered without anything to read."""
    kernel = Kernel(False)
    with SyncClient(DevicePipe(kernel.client.detach()), 5) as client, kernel.side:
        replies = [client.submit(calls.read(f"/{n}")) for n in range(3)]
        for done in range(3):
            client.process()
            assert [reply.done for reply in replies].count(True) == done
            kernel.serve()
        client.process()
        assert [reply.result() for reply in replies] == [b"value"] * 3
        assert kernel.packets == [1, 1, 1] and not client.wants_write
        monkeypatch.setattr(device.os, "write", _refuse)
        refused = client.submit(calls.write("/a", ""))
        client.process()
        assert "ENOSPC" in str(refused.error)


def _refuse(fd: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, "no")


def test_where_there_is_no_device(tmp_path) -> None:
    with pytest.raises(LinkDown, match="no store at"):
        SyncClient.connect(f"device:{tmp_path}/xenbus")
