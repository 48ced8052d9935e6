"""`unix:PATH`: a socket of the daemon, for an event loop and for a caller that blocks.

Knows sockets only. `XENSTORED_RUNDIR/socket` is domain 0's.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence

from xenbus.errors import LinkDown
from xenbus.xenstore.transport import SOCKET_OUTSTANDING, Busy, register
from xenbus.xenstore.transport._stream import READ_SIZE, StreamTransport

_TIMEVAL = struct.Struct("@ll")
# Seconds that a listener has to accept a blocking caller.
DIAL_TIMEOUT = 5.0


class UnixTransport(StreamTransport):
    """A connected stream socket, owned from now on; made non-blocking."""

    def __init__(self, sock: socket.socket, peer: str = "") -> None:
        sock.setblocking(False)
        super().__init__(
            sock.fileno(), peer or f"xenstored at {_name(sock)}", sock.recv_into, sock.send, sock.close
        )

    def fileno(self) -> int:
        return self._fd


class UnixPipe:
    """The same socket for a caller that blocks.

    It waits in poll, for Linux wakes whoever blocks in recv on a unix socket also when the other end takes
    what was sent (unix_write_space): for nothing, at the cost of two switches a request on one CPU.
    """

    max_outstanding = SOCKET_OUTSTANDING

    def __init__(self, sock: socket.socket, peer: str = "") -> None:
        sock.setblocking(True)
        self._sock = sock
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._send_timeout = 0.0
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        self._poll = poller.poll
        self.peer = peer or f"xenstored at {_name(sock)}"

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, messages: Sequence[bytes], timeout: float) -> None:
        if timeout != self._send_timeout:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
            self._send_timeout = timeout
        try:
            self._sock.sendall(messages[0] if len(messages) == 1 else b"".join(messages))
        except BlockingIOError:
            raise TimeoutError(f"{self.peer} took nothing for {timeout:g} s") from None

    def receive(self, timeout: float) -> bytes:
        if not self._poll(max(timeout, 0.0) * 1000):
            raise TimeoutError(f"{self.peer} sent nothing for {timeout:g} s")
        return bytes(self._view[: self._sock.recv_into(self._buffer)])

    def take(self) -> bytes | None:
        try:
            count = self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return bytes(self._view[:count])

    def offer(self, messages: Sequence[bytes]) -> bytes:
        data = b"".join(messages)
        try:
            return data[self._sock.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data

    def close(self) -> None:
        self._sock.close()


def dial(path: str, timeout: float = DIAL_TIMEOUT) -> socket.socket:
    """A connected socket. LinkDown, naming the path, if nobody listens there; Busy, which is one, if nobody
    accepts within `timeout` seconds."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The kernel waits this long for room in the listener's queue; poll cannot be asked for that.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except OSError as exc:
        sock.close()
        if isinstance(exc, BlockingIOError):
            raise Busy(f"no store at {path}: nobody accepts") from exc
        raise LinkDown(f"no store at {path}: {exc.strerror or exc}") from exc
    return sock


def _timeval(seconds: float) -> bytes:
    # Zero would mean for ever.
    return _TIMEVAL.pack(*divmod(max(1, int(seconds * 1e6)), 1_000_000))


def _name(sock: socket.socket) -> str:
    name = sock.getpeername()
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name or "a socket pair")


# A loop must not stand still while somebody else does not accept: it gets Busy at once, and tries again.
register("unix", lambda path: UnixTransport(dial(path, 0)), lambda path: UnixPipe(dial(path)))
