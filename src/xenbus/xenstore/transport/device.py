"""`device:PATH`: /dev/xen/xenbus, the kernel's own connection to the store, shared with it.

Knows that device's ways (Linux drivers/xen/xenbus/xenbus_dev_frontend.c): a write is one message, a
refused WATCH is an error of the write, and poll never reports room to write. To be met on real Xen only.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections import deque
from collections.abc import Sequence

from xenbus.errors import WIRE_ERRORS, LinkDown
from xenbus.xenstore.transport import Receiver, register
from xenbus.xenstore.transport._stream import READ_SIZE, StreamTransport, wait_fd
from xenbus.xenstore.wire.message import HEADER, Op, encode

DEVICE = "/dev/xen/xenbus"
# With more than one request under way replies were wrong and the ring stood still, on Linux 6.1: the kernel
# seems to build the next message where the one before still waits to be written.
ONE_AT_A_TIME = 1
# What the device says of itself, not of one message.
_GONE = frozenset((errno.EBADF, errno.ENODEV, errno.ENXIO, errno.EPIPE, errno.ECONNRESET))
_NAMES = {number: name for name, number in WIRE_ERRORS.items()}


def refusal(message: bytes, exc: OSError) -> bytes:
    """The ERROR reply that the kernel did not write: it failed the write instead."""
    _, req_id, tx_id, _ = HEADER.unpack_from(message)
    name = _NAMES.get(exc.errno or 0) or errno.errorcode.get(exc.errno or 0, "EIO")
    return encode(Op.ERROR, req_id, tx_id, name.encode() + b"\0")


def write_message(fd: int, message: bytes) -> bytes:
    """b"", or the reply in place of the kernel's. OSError if the device is gone."""
    try:
        os.write(fd, message)
    except OSError as exc:
        if exc.errno in _GONE:
            raise
        return refusal(message, exc)
    return b""


class DeviceTransport(StreamTransport):
    """An open descriptor of the device, owned from now on."""

    max_outstanding = ONE_AT_A_TIME

    def __init__(self, fd: int, peer: str = DEVICE) -> None:
        os.set_blocking(fd, False)
        super().__init__(fd, peer)

    def send(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            if self._closed:
                return
            try:
                reply = write_message(self._fd, message)
            except OSError as exc:
                self._lost(exc)
                return
            if reply:
                asyncio.get_running_loop().call_soon(self._hand_over, reply)

    def _hand_over(self, reply: bytes) -> None:
        receiver: Receiver | None = self._receiver
        if receiver is not None:
            receiver.data_received(reply)


class DevicePipe:
    """The same device for a caller that blocks."""

    max_outstanding = ONE_AT_A_TIME

    def __init__(self, fd: int, peer: str = DEVICE) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._refused: deque[bytes] = deque()
        self.peer = peer

    def fileno(self) -> int:
        return self._fd

    def send(self, messages: Sequence[bytes], timeout: float) -> None:
        for message in messages:
            if reply := write_message(self._fd, message):
                self._refused.append(reply)

    def receive(self, timeout: float) -> bytes:
        if self._refused:
            return self._refused.popleft()
        wait_fd(self._fd, select.POLLIN, timeout)
        return os.read(self._fd, READ_SIZE)

    def take(self) -> bytes | None:
        if self._refused:
            return self._refused.popleft()
        try:
            return os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return None

    def offer(self, messages: Sequence[bytes]) -> bytes:
        self.send(messages, 0)  # the kernel takes a message as a whole, and at once
        return b""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_device(path: str) -> int:
    """A descriptor. LinkDown if this is no Xen domain."""
    try:
        return os.open(path or DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise LinkDown(f"no store at {path or DEVICE}: {exc.strerror}") from exc


register(
    "device", lambda path: DeviceTransport(open_device(path)), lambda path: DevicePipe(open_device(path))
)
