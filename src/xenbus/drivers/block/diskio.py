"""What the queue of a disk handles: an I/O, the parts it may come to, and the error it may end with.

Knows how a task waits; knows no ring and no pages but for the buffer that an I/O holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import Final

from xenbus.drivers.block.blkif import BLKIF_MAX_SEGMENTS_PER_REQUEST, PAGE_SIZE, Op
from xenbus.drivers.block.xbd_pool import Buffer
from xenbus.errors import UsageError, XenbusError

READ: Final = int(Op.READ)
WRITE: Final = int(Op.WRITE)
WRITE_BARRIER: Final = int(Op.WRITE_BARRIER)
FLUSH: Final = int(Op.FLUSH_DISKCACHE)
DISCARD: Final = int(Op.DISCARD)
INDIRECT: Final = int(Op.INDIRECT)
DIRECT_MAX: Final = BLKIF_MAX_SEGMENTS_PER_REQUEST * PAGE_SIZE  # bytes
OP_NAMES: Final = {
    READ: "read",
    WRITE: "write",
    WRITE_BARRIER: "write with barrier",
    FLUSH: "flush",
    DISCARD: "discard",
}


class DiskError(XenbusError):
    """The back end could not do an I/O. `name` is EIO, or EOPNOTSUPP where it does not know how."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{what}: {name}")
        self.name = name
        self.what = what


class Io:
    """One call of a user, and, where one request carries all of it, that request too.

    A task awaits it as it would a future, by the protocol of future-like objects that asyncio.Task honours
    (`_asyncio_future_blocking`), with two differences: `wake` resumes the task in place, while a future goes
    through the loop once more; and one task awaits it, no second one.

    offset, length: bytes. view: where the data is or goes; None for flush, discard, and a read that makes its
    own bytes (which are its value, or `view` after all where it took several requests).
    buffer: of its one request. parts: set where it takes more than one. begun: the tick it was submitted in.
    over: then `error` or `value` is what came of it.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_loop",
        "begun",
        "buffer",
        "error",
        "length",
        "offset",
        "op",
        "over",
        "parts",
        "value",
        "view",
    )

    # Not set before they mean something; a page is read in few microseconds, and each store is a part of one.
    _asyncio_future_blocking: bool
    _context: Context
    begun: int
    error: BaseException | None
    value: bytes | None

    def __init__(
        self, op: int, offset: int, length: int, view: memoryview | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        # A task asks for this of whoever has no `get_loop`, which would be a call for each I/O (and with
        # get_running_loop in it, which asks for the process id, a system call before Python 3.12).
        self._loop = loop
        self.op = op
        self.offset = offset
        self.length = length
        self.view = view
        self.buffer: Buffer | None = None
        self.parts: Parts | None = None
        self.over = False
        self._callback: Callable[[Io], object] | None = None

    def what(self) -> str:
        if self.op == FLUSH:
            return "flush"
        return f"{OP_NAMES[self.op]} of {self.length} bytes at {self.offset}"

    def split(self) -> Parts:
        if self.parts is None:
            self.parts = Parts(self.length)
        return self.parts

    # -- for the queue

    def settle(self, error: BaseException | None = None, value: bytes | None = None) -> None:
        """It is over. Its task goes on at `wake`, which is up to whoever called this."""
        self.error = error
        self.value = value
        self.over = True

    def wake(self) -> None:
        """Run its task up to the next await, now. Never from within a task."""
        callback = self._callback
        if callback is not None:
            self._callback = None
            self._context.run(callback, self)

    def fail(self, error: BaseException) -> None:
        """`settle`, and `wake` when the loop comes to it."""
        self.settle(error)
        self._loop.call_soon(self.wake)

    # -- for the task that awaits it

    def __await__(self) -> Generator[Io, None, bytes | None]:
        if not self.over:
            if self._callback is not None:
                raise UsageError(f"{self.what()} is awaited already")  # the first would never be woken
            self._asyncio_future_blocking = True
            yield self
        if self.error is not None:
            raise self.error
        return self.value

    def result(self) -> bytes | None:
        """What the task asks for when it is woken; the answer it hears from `__await__`."""
        if self.error is not None:
            raise self.error
        return self.value

    def add_done_callback(self, callback: Callable[[Io], object], *, context: Context | None = None) -> None:
        self._callback = callback
        self._context = context if context is not None else copy_context()
        if self.over:
            self._loop.call_soon(self.wake)

    def cancel(self, msg: object = None) -> bool:
        if self.over:
            return False
        self.fail(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return True


class Parts:
    """An I/O of several requests. left: bytes not answered yet; inflight: requests on the ring."""

    __slots__ = ("error", "inflight", "left")

    def __init__(self, length: int) -> None:
        self.left = length
        self.inflight = 0
        self.error: Exception | None = None


class Span:
    """Bytes of an I/O that must go out (again): [cursor, end)."""

    __slots__ = ("cursor", "end", "io")

    def __init__(self, io: Io, cursor: int, end: int) -> None:
        self.io = io
        self.cursor = cursor
        self.end = end


class Part:
    """One of several requests: bytes [start, start + length) of its I/O."""

    __slots__ = ("buffer", "io", "length", "start")

    def __init__(self, io: Io, start: int, length: int, buffer: Buffer) -> None:
        self.io = io
        self.start = start
        self.length = length
        self.buffer = buffer
