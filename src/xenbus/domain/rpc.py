"""Control sockets: JSON lines over a unix socket of mode 0600, one request a line, replies by id.

Used by the host (what a hypervisor's domctl is) and by each domain (tree, sysctl, counters). Knows
nothing of what its methods do. A line, a connection's requests in flight and their number are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from xenbus.errors import DeadlineError, LinkDown, NoEntry, NotFound, PeerError, UsageError, XenbusError

log = logging.getLogger(__name__)

REQUEST_MAX = 1 << 20  # bytes of one request line
REPLY_MAX = 64 << 20  # bytes of one reply line: a tree of 10 000 devices is a few MiB
CONNECTIONS_MAX = 64
ACCEPT_PAUSE = 0.5  # seconds without a caller when this process is out of descriptors
CLOSE_DEADLINE = 5.0  # seconds for a connection to end: its calls, what they left open, its last reply
IN_FLIGHT_MAX = 16
SUN_PATH_MAX = 107  # sys/un.h: sun_path less its NUL
# Names of the tasks that serve callers, so that who counts tasks need not count its own call.
CONNECTION_TASK, CALL_TASK = "rpc connection", "rpc call"

# An error keeps its kind across the socket, so that the caller's exit code is right.
_KINDS: dict[str, type[XenbusError]] = {kind.__name__: kind for kind in (NotFound, PeerError, UsageError)}


class RemoteError(XenbusError):
    """The other end of a control socket refused or failed; `kind` is the exception's name there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Call:
    """One request as its method sees it: parameters by name, a way to tell progress, the caller's life."""

    __slots__ = ("_connection", "_id", "params")

    def __init__(self, connection: _Connection, call_id: object, params: dict[str, Any]) -> None:
        self._connection = connection
        self._id = call_id
        self.params = params

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._typed(key, str, default)
        return value

    def number(self, key: str, default: int | None = None) -> int:
        value: int = self._typed(key, int, default)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value: bool = self._typed(key, bool, default)
        return value

    def seconds(self, key: str, default: float) -> float:
        value = self.params.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
            raise UsageError(f"{key}: seconds wanted, got {value!r}")
        return float(value)

    def _typed(self, key: str, kind: type[Any], default: Any) -> Any:
        value = self.params.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"{key}: {kind.__name__} wanted, got {value!r}")
        return value

    async def progress(self, value: object) -> None:
        """Sent at once, before the reply; waits while the caller does not read."""
        await self._connection.send({"id": self._id, "progress": value})

    def on_gone(self, action: Callable[[], Awaitable[None]]) -> None:
        """Run `action` when this connection ends: what a call left open lives no longer than its caller."""
        self._connection.goodbyes.append(action)


Method = Callable[[Call], Awaitable[object]]


def check_socket_path(path: Path) -> Path:
    """UsageError if the kernel could not bind a socket there (sun_path holds 107 bytes)."""
    if len(os.fsencode(path)) > SUN_PATH_MAX:
        raise UsageError(f"{path}: a socket's path has at most {SUN_PATH_MAX} bytes; choose a shorter --dir")
    return path


class RpcServer:
    """Serves a table of methods. `await serve(path)`, then `await close()`."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self.methods = methods
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._path: Path | None = None
        self._inode = 0

    async def serve(self, path: Path) -> None:
        check_socket_path(path)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        except BaseException:
            listener.close()
            raise
        finally:
            os.umask(before)
        listener.listen(CONNECTIONS_MAX)
        listener.setblocking(False)
        self._listener = listener
        self._path = path
        self._inode = path.stat().st_ino
        self._listen()

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._acceptable, self._listener)

    def _acceptable(self, listener: socket.socket) -> None:
        """Not asyncio's own server: out of descriptors, 3.11's makes a timer for each place of its backlog,
        each of which makes as many again, and never sleeps any more."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("control socket: no caller is taken for %g s: %s", ACCEPT_PAUSE, error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE, self._listen)
            return
        if len(self._tasks) >= CONNECTIONS_MAX:
            log.warning("control socket: more than %d connections, one refused", CONNECTIONS_MAX)
            sock.close()
            return
        task = asyncio.create_task(self._serve_one(sock), name=CONNECTION_TASK)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_one(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=REQUEST_MAX)
        connection = _Connection(self.methods, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        ending = [asyncio.ensure_future(c.finished.wait()) for c in self._connections]
        for connection in self._connections:
            connection.reader.feed_eof()  # as if the caller had gone
        if ending:
            _, late = await asyncio.wait(ending, timeout=CLOSE_DEADLINE)
            for task in late:
                task.cancel()
            if late:
                log.warning("control socket: %d connections did not end", len(late))
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                # Not a successor's socket: ours may have been replaced already.
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()


class _Connection:
    def __init__(
        self, methods: Mapping[str, Method], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.methods = methods
        self.reader = reader
        self.writer = writer
        self.goodbyes: list[Callable[[], Awaitable[None]]] = []
        self.finished = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def run(self) -> None:
        try:
            while line := await self.reader.readline():
                await self._places.acquire()
                task = asyncio.create_task(self._answer(line), name=CALL_TASK)
                self._calls.add(task)
                task.add_done_callback(self._done)
        except (ConnectionError, ValueError) as error:  # ValueError: a line over REQUEST_MAX
            log.warning("control socket: connection dropped: %s", error)
        finally:
            for task in list(self._calls):
                task.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            for action in reversed(self.goodbyes):
                try:
                    await action()
                except Exception:
                    log.exception("control socket: clean-up after a caller failed")
            await self._hang_up()
            self.finished.set()

    async def _hang_up(self) -> None:
        """What was said is sent, to a caller who still reads."""
        self.writer.close()
        try:
            async with asyncio.timeout(CLOSE_DEADLINE / 2):
                await self.writer.wait_closed()
        except (ConnectionError, TimeoutError):
            self.writer.transport.abort()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._places.release()

    async def send(self, message: dict[str, object]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def _answer(self, line: bytes) -> None:
        call_id: object = None
        reply: dict[str, object]
        try:
            call_id, method, params = _parse(line)
            if method not in self.methods:
                raise UsageError(f"no such method: {method}")
            reply = {"id": call_id, "result": await self.methods[method](Call(self, call_id, params))}
        except XenbusError as error:
            kind = error.kind if isinstance(error, RemoteError) else type(error).__name__
            reply = {"id": call_id, "error": {"kind": kind, "message": str(error)}}
        except Exception as error:
            log.exception("control socket: a method failed")
            reply = {
                "id": call_id,
                "error": {"kind": "Internal", "message": f"{type(error).__name__}: {error}"},
            }
        with contextlib.suppress(ConnectionError):
            await self.send(reply)


def _parse(line: bytes) -> tuple[object, str, dict[str, Any]]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:  # the second for brackets nested without end
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise UsageError("a request is an object")
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise UsageError("params: an object wanted")
    return message.get("id"), str(message.get("method", "")), params


class RpcClient:
    """The calling side. `await RpcClient.connect(path)`, `await client.call("tree", timeout=5)`."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path = path
        self._reader = reader
        self._writer = writer
        self._next = 0
        self._waiting: dict[int, tuple[asyncio.Future[Any], Callable[[Any], None] | None]] = {}
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, path: Path) -> RpcClient:
        """LinkDown if nobody serves there."""
        try:
            reader, writer = await asyncio.open_unix_connection(check_socket_path(path), limit=REPLY_MAX)
        except PermissionError as error:
            raise LinkDown(f"{path}: {error.strerror}: this socket is another user's") from None
        except OSError as error:
            raise LinkDown(f"{path}: nobody answers there ({error.strerror})") from None
        return cls(path, reader, writer)

    async def call(
        self,
        method: str,
        *,
        timeout: float = 30.0,
        progress: Callable[[Any], None] | None = None,
        **params: object,
    ) -> Any:
        """The method's result. RemoteError (or its own kind), LinkDown, DeadlineError after `timeout` s."""
        if self._task.done():
            raise LinkDown(f"{self.path}: the connection is closed")
        self._next += 1
        call_id = self._next
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = (future, progress)
        try:
            line = json.dumps({"id": call_id, "method": method, "params": params}).encode() + b"\n"
            if len(line) > REQUEST_MAX:
                raise UsageError(f"{method}: a request has at most {REQUEST_MAX} bytes")
            self._writer.write(line)
            # Not wait_for: before 3.12 it loses a cancellation that comes with the result.
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            if future.done() and not future.cancelled() and future.exception() is not None:
                raise
            raise DeadlineError(f"the answer to {method}", str(self.path), timeout) from None
        finally:
            self._waiting.pop(call_id, None)

    async def _receive(self) -> None:
        reason = "closed by the other end"
        try:
            while line := await self._reader.readline():
                self._dispatch(json.loads(line))
        except (ConnectionError, ValueError) as error:
            reason = str(error)
        finally:
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(LinkDown(f"{self.path}: {reason}"))
            self._writer.close()

    def _dispatch(self, message: dict[str, Any]) -> None:
        future, progress = self._waiting.get(message.get("id", 0), (None, None))
        if future is None or future.done():
            return
        if "progress" in message:
            if progress is not None:
                progress(message["progress"])
        elif "error" in message:
            future.set_exception(_remote(message["error"]))
        else:
            future.set_result(message.get("result"))

    async def lost_or(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set; LinkDown if the other end goes before."""
        waiting = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not stop.is_set():
            raise LinkDown(f"{self.path}: closed by the other end")

    async def close(self) -> None:
        self._writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> RpcClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _remote(error: dict[str, str]) -> XenbusError:
    kind, message = error.get("kind", ""), error.get("message", "")
    if kind in _KINDS:
        return _KINDS[kind](message)
    return RemoteError(kind, message)


def is_missing(error: XenbusError) -> bool:
    """Whether an error, ours or one that came over a control socket, says "not there"."""
    return isinstance(error, (NoEntry, NotFound)) or getattr(error, "kind", "") == "NoEntry"
