"""What every descriptor-backed transport shares: one read and one write a wake-up, over the loop's selector.

Knows descriptors, not messages or schemes. Raw readers, not asyncio's streams: those allocate a large
buffer for each read and lose half the throughput to page faults.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Callable, Sequence
from functools import partial

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
    """An event loop's end of a descriptor.

    read_into, write, close: how that kind of descriptor does it, if not as os does
    """

    max_outstanding = SOCKET_OUTSTANDING

    def __init__(
        self,
        fd: int,
        peer: str,
        read_into: Callable[[memoryview], int] | None = None,
        write: Callable[[bytes | bytearray], int] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._fd = fd
        self._peer = peer
        self._read_into = read_into or (lambda buffer: os.readv(fd, [buffer]))
        self._write = write or partial(os.write, fd)
        self._close_fd = close or partial(os.close, fd)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receiver: Receiver | None = None
        self._out = bytearray()
        self.backlog = 0  # len(self._out), looked at for each request
        self._closed = False
        self._why: Exception | None = None
        self._paused = False

    @property
    def peer(self) -> str:
        return self._peer

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
            self._queue(data)
            return
        try:
            taken = self._write(data)
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError as exc:
            self._lost(exc)
            return
        if taken < len(data):
            self._queue(data[taken:])
            if self._loop is not None:
                self._loop.add_writer(self._fd, self._writable)

    def _queue(self, data: bytes) -> None:
        self._out += data
        self.backlog = len(self._out)

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
        self.backlog = len(self._out)
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
        self.backlog = 0
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
