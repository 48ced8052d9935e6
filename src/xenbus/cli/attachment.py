"""A person's terminal, or a pipe, joined with a console's PTY until one of them ends.

Knows descriptors, the loop and termios; knows no store. Our own terminal is as it was before, whatever ends
it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import termios
import tty
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

from xenbus.drivers.console.terminal import is_served
from xenbus.errors import UsageError, XenbusError

CHUNK = 4096  # bytes of one read; a pipe that is writable has room for as many
FLUSH = 1.0  # seconds
PENDING_MAX = 64 << 10  # bytes that one side has said and the other has no room for
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


class Ending(Enum):
    ESCAPED = "the escape key"
    HUNG_UP = "the console's end"
    IDLE = "silence after the end of the input"
    INTERRUPTED = "a signal"


def parse_escape(text: str) -> int:
    """`^]` or one character, as `xl console` takes it. UsageError."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return ord(text[1].upper()) ^ 0x40
    if len(text) == 1 and text.isascii():
        return ord(text)
    raise UsageError(f"{text!r} is no escape key: one character, or ^A to ^_")


def open_terminal(path: str, *, ours: bool = False) -> int:
    """A console's PTY, for us alone. UsageError if somebody is attached, XenbusError for what is none.

    ours: it is none if no xcb has it
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise XenbusError(f"{path}: {error.strerror}") from None
    try:
        if not os.isatty(fd):
            raise XenbusError(f"{path} is no terminal: nothing is sent there")
        if ours and not is_served(fd):
            raise XenbusError(f"{path} is somebody else's by now: the console's back end has gone")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(f"{path}: somebody is attached to this console already") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def raw(fd: int) -> Iterator[Callable[[], None]]:
    """The terminal passes on every key, until the block ends. Yields what makes it so again after a stop."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield lambda: tty.setraw(fd, termios.TCSANOW)
    finally:
        with suppress(termios.error):  # the window is gone, and its terminal with it
            termios.tcsetattr(fd, termios.TCSANOW, before)


class Outlet:
    """A descriptor that is written to as it has room. `waiting` bytes were not written yet."""

    def __init__(self, fd: int, on_room: Callable[[], None]) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._on_room = on_room
        self._data = bytearray()
        self._watched = False
        self.error: OSError | None = None

    @property
    def waiting(self) -> int:
        return len(self._data)

    def put(self, data: bytes) -> None:
        self._data += data
        if not self._data or self._watched or self.error is not None:
            return
        try:
            self._loop.add_writer(self._fd, self._writable)
            self._watched = True
        except PermissionError:  # a file: it always has room
            while self._data and self.error is None:
                self._writable()

    def _writable(self) -> None:
        try:
            del self._data[: os.write(self._fd, self._data[:CHUNK])]
        except BlockingIOError:
            return
        except OSError as error:
            self.error = error
            self._data.clear()
        if not self._data:
            self.close()
        self._on_room()

    def close(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_writer(self._fd)


class Inlet:
    """A descriptor that is read as long as that is `wanted`: a pipe, a terminal, or a file."""

    def __init__(self, fd: int, on_data: Callable[[bytes], None]) -> None:
        """on_data: b"" is its end, after which nothing comes."""
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._on_data = on_data
        self._watched = False
        self._reading: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self.ended = False

    def want(self, wanted: bool) -> None:
        wanted = wanted and not self.ended
        (self._wanted.set if wanted else self._wanted.clear)()
        if self._reading is not None or wanted == self._watched:
            return
        if not wanted:
            self._watched = False
            self._loop.remove_reader(self._fd)
            return
        try:
            self._loop.add_reader(self._fd, self._readable)
            self._watched = True
        except PermissionError:  # a file: it can't be waited for, and reading it may take a moment
            self._reading = asyncio.create_task(self._read_file())
        except OSError:  # closed
            self._end()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal that hung up
            data = b""
        if data:
            self._on_data(data)
        else:
            self._end()

    async def _read_file(self) -> None:
        while not self.ended:
            await self._wanted.wait()
            try:
                data = await self._loop.run_in_executor(None, os.read, self._fd, CHUNK)
            except OSError:  # EISDIR, or open to be written alone
                data = b""
            if data:
                self._on_data(data)
            else:
                self._end()

    def _end(self) -> None:
        self.close()
        self.ended = True
        self._on_data(b"")

    def close(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._fd)
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()


class Attachment:
    """`await Attachment(...).run(pty)`, again with another PTY where the console has got a new one.

    escape: the byte that ends it; None: none does, as from a pipe
    idle:   seconds of silence after the input's end that end it; None: it goes on
    """

    def __init__(self, source: int, sink: int, escape: int | None, idle: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._escape = escape
        self._idle = idle
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._quiet: asyncio.TimerHandle | None = None
        self._input = Inlet(source, self._typed)
        self._output = Outlet(sink, self._flow)
        # Of the PTY that there is at the time.
        self._keys: Outlet | None = None
        self._screen: Inlet | None = None
        self._held = b""  # typed while there was none
        self._searching = False

    async def run(self, pty: int) -> Ending:
        """Until something ends; what was typed and not taken is lost with its PTY. OSError of the output."""
        self._begin()
        keys, screen = Outlet(pty, self._flow), Inlet(pty, self._shown)
        self._keys, self._screen = keys, screen
        try:
            held, self._held = self._held, b""
            keys.put(held)
            self._flow()
            self._restart_quiet()
            ending = await self._ended
            await self._flush()
        finally:
            self._input.want(False)
            self._keys = self._screen = None
            keys.close()
            screen.close()
            if self._quiet is not None:
                self._quiet.cancel()
        if (error := self._output.error) is not None:
            raise OSError(error.errno, error.strerror, "standard output")
        return ending

    async def search(self, terminal: Coroutine[Any, Any, int]) -> int | Ending:
        """`terminal`'s, for one that hung up, or what ended it meanwhile; what is typed waits."""
        self._begin()
        searching = self._loop.create_task(terminal)
        self._searching = True
        try:
            self._flow()
            self._restart_quiet()
            either: set[asyncio.Future[Any]] = {searching, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return searching.result() if searching.done() else self._ended.result()
        finally:
            self._searching = False
            self._input.want(False)
            searching.cancel()

    def _begin(self) -> None:
        if self._ended.done() and self._ended.result() is Ending.HUNG_UP:
            self._ended = self._loop.create_future()

    def end(self, ending: Ending) -> None:
        if not self._ended.done():
            self._ended.set_result(ending)

    def close(self) -> None:
        self._input.close()
        self._output.close()

    async def _flush(self) -> None:
        """What was said and typed before the end gets there, if anybody looks."""
        assert self._keys is not None
        end = self._loop.time() + FLUSH
        while (self._output.waiting or self._keys.waiting) and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _flow(self) -> None:
        """Read what there is room for on the other side."""
        if self._output.error is not None:
            self.end(Ending.HUNG_UP)
        if self._keys is None or self._screen is None:
            if self._searching:
                self._input.want(len(self._held) < PENDING_MAX)
            return
        self._input.want(self._keys.waiting < PENDING_MAX)
        self._screen.want(self._output.waiting < PENDING_MAX)

    def _typed(self, data: bytes) -> None:
        if not data:
            if self._escape is not None:
                self.end(Ending.INTERRUPTED)  # our own terminal hung up
            self._restart_quiet()
            return
        if self._escape is not None and (at := data.find(self._escape)) >= 0:
            data = data[:at]
            self.end(Ending.ESCAPED)
        if self._keys is None:
            self._held += data
        else:
            self._keys.put(data)
        self._flow()

    def _shown(self, data: bytes) -> None:
        if not data:
            self.end(Ending.HUNG_UP)
            return
        self._output.put(data)
        self._restart_quiet()
        self._flow()

    def _restart_quiet(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
        if self._idle is not None and self._input.ended:
            self._quiet = self._loop.call_later(self._idle, self.end, Ending.IDLE)


@contextmanager
def signals(attachment: Attachment, again: Callable[[], None] | None) -> Iterator[None]:
    """A window that closes and a kill end it in order; after a stop the terminal is raw again."""
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, attachment.end, Ending.INTERRUPTED)
    if again is not None:
        loop.add_signal_handler(signal.SIGCONT, again)
    try:
        yield
    finally:
        for number in (*_ENDING, *((signal.SIGCONT,) if again is not None else ())):
            loop.remove_signal_handler(number)
