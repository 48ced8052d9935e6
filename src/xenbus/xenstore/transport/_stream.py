"""What every descriptor-backed transport shares: one read and one write a wake-up, over the loop's selector.

Knows descriptors, not messages or schemes. Raw readers, not asyncio's streams: those allocate a large
buffer for each read and lose half the throughput to page faults.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Sequence

from xenbus.errors import LinkDown
from xenbus.xenstore.transport import SOCKET_OUTSTANDING, Receiver

READ_SIZE = 65536


class _Scratch(threading.local):
    """Where a thread's transports read into, one after the other: receivers keep nothing of it, and a buffer
    for each of a thousand connections would be 64 MiB."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_SIZE))


_scratch = _Scratch()


class StreamTransport:
    """An event loop's end of a descriptor. Subclasses say how to read, write and close it."""

    max_outstanding = SOCKET_OUTSTANDING

    def __init__(self, fd: int, peer: str) -> None:
        self._fd = fd
        self._peer = peer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receiver: Receiver | None = None
        self._out = bytearray()
        self._closed = False
        self._why: Exception | None = None
        self._paused = False

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def backlog(self) -> int:
        return len(self._out)

    # What a kind of descriptor may do in its own way.

    def _read_into(self, buffer: memoryview) -> int:
        return os.readv(self._fd, [buffer])

    def _write(self, data: bytes | bytearray) -> int:
        return os.write(self._fd, data)

    def _close_fd(self) -> None:
        os.close(self._fd)

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        if self._closed:
            self._loop.call_soon(receiver.connection_lost, self._why)
            return
        self._loop.add_reader(self._fd, self._readable)
        if self._out:
            self._loop.add_writer(self._fd, self._writable)

    def send(self, messages: Sequence[bytes]) -> None:
        if self._closed:
            return
        data = messages[0] if len(messages) == 1 else b"".join(messages)
        if self._out:
            self._out += data
            return
        try:
            taken = self._write(data)
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError as exc:
            self._lost(exc)
            return
        if taken < len(data):
            self._out += data[taken:]
            if self._loop is not None:
                self._loop.add_writer(self._fd, self._writable)

    def pause(self, paused: bool) -> None:
        if self._closed or self._loop is None or paused == self._paused:
            return
        self._paused = paused
        if paused:
            self._loop.remove_reader(self._fd)
        else:
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        self._lost(None)

    def _readable(self) -> None:
        assert self._receiver is not None
        buffer = _scratch.buffer
        try:
            count = self._read_into(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._lost(exc)
            return
        if count:
            self._receiver.data_received(buffer[:count])
        else:
            self._lost(LinkDown(f"{self._peer} closed the connection"))

    def _writable(self) -> None:
        assert self._loop is not None and self._receiver is not None
        try:
            del self._out[: self._write(self._out)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._lost(exc)
            return
        if not self._out:
            self._loop.remove_writer(self._fd)
            self._receiver.drained()

    def _lost(self, exc: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._why = exc
        loop = self._loop
        if loop is not None:
            loop.remove_reader(self._fd)
            loop.remove_writer(self._fd)
        self._close_fd()
        self._out.clear()
        if loop is not None and self._receiver is not None:
            loop.call_soon(self._receiver.connection_lost, exc)
            self._receiver = _Nobody()


class _Nobody:
    """Stands in after the end, so that a closed transport keeps no client alive."""

    def data_received(self, data: bytes | memoryview) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        pass

    def drained(self) -> None:
        pass


def wait_fd(fd: int, event: int, timeout: float) -> None:
    """Until `fd` is ready for a poll `event`; TimeoutError after `timeout` seconds."""
    poller = select.poll()
    poller.register(fd, event)
    if not poller.poll(max(0.0, timeout) * 1000):
        raise TimeoutError(f"nothing moved for {timeout:g} s")
