"""A socket in the file system that clients connect to: mode 0600 from the start, its own to remove. asyncio.

Knows sockets and the loop; nothing of what is said there. `Daemon` and `Relay` take their clients from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from xenbus.errors import UsageError

# Connections taken in one turn of the loop.
ACCEPTS = 16
# After running out of descriptors, seconds until another client is taken: the socket stays readable.
ACCEPT_PAUSE = 0.5


class Listener:
    """Listens until `close`. Make it inside a running loop, of a socket that listens (see `listening`).

    taken:  gets each client, connected
    failed: why none can be taken for ACCEPT_PAUSE seconds; no descriptor is left, most likely
    OSError if there is no such socket in the file system any more.
    """

    def __init__(
        self,
        sock: socket.socket,
        taken: Callable[[socket.socket], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._path = Path(sock.getsockname())
        self._identity = _identity(self._path)
        self._sock = sock
        self._taken = taken
        self._failed = failed
        self._pause: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    def fileno(self) -> int:
        return self._sock.fileno()

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(ACCEPT_PAUSE, self._accept_again)
                self._failed(exc)
                return
            self._taken(sock)

    def _accept_again(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """The socket is removed, unless somebody put another in its place. Once."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._identity:
                self._path.unlink()


def listening(path: str | os.PathLike[str], *, replace: bool = False) -> socket.socket:
    """A socket that listens there, with mode 0600. UsageError if the path is taken; with `replace` a socket
    that nobody listens at any more does not count."""
    target = Path(path)
    if replace:
        _clear_stale(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        sock.bind(os.fspath(target))
    except OSError as exc:
        sock.close()
        raise UsageError(f"cannot listen at {target}: {exc.strerror or exc}") from exc
    finally:
        os.umask(before)
    sock.listen(128)
    return sock


def _identity(path: Path) -> tuple[int, int]:
    info = path.lstat()
    return info.st_dev, info.st_ino


def _clear_stale(path: Path) -> None:
    """Removes a socket that nobody listens on any more. UsageError if it is not ours to remove."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise UsageError(f"cannot listen at {path}: {exc.strerror or exc}") from exc
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"cannot listen at {path}: there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as exc:
            raise UsageError(f"cannot listen at {path}: {exc.strerror or exc}") from exc
    raise UsageError(f"cannot listen at {path}: a daemon answers there already")
