"""One direction of a byte ring: the store's (io/xs_wire.h) and the console's (io/console.h).

Knows a buffer and where four numbers are in it; knows nothing of the bytes that pass, or of how the
peer is kicked: these rings have no hold-off, their user notifies after every read and write.
"""

from __future__ import annotations

from typing import Final

from xenbus.errors import UsageError
from xenbus.ring import fence
from xenbus.ring.shared import RingError

__all__ = ["XENCONS_IN", "XENCONS_OUT", "XENSTORE_REQ", "XENSTORE_RSP", "ByteRingEnd", "RingError"]

MASK: Final = 0xFFFFFFFF

# struct xenstore_domain_interface: (ring_offset, ring_size, cons_offset, prod_offset) of each direction.
XENSTORE_REQ: Final = (0, 1024, 2048, 2052)
XENSTORE_RSP: Final = (1024, 1024, 2056, 2060)
# struct xencons_interface: `in` is what the guest reads.
XENCONS_IN: Final = (0, 1024, 3072, 3076)
XENCONS_OUT: Final = (1024, 2048, 3080, 3084)


class ByteRingEnd:
    """Either end of one direction; which one is said by what is called: `read` or `write`.

    view:        the shared page, writable, 4-byte aligned
    ring_offset, ring_size:   where the bytes are; the size is a power of two
    cons_offset, prod_offset: where the free-running indices are, multiples of 4
    The ring keeps slices of `view` until `release()`.
    """

    __slots__ = ("_cons", "_data", "_mask", "_prod", "_words", "size")

    def __init__(
        self, view: memoryview, ring_offset: int, ring_size: int, cons_offset: int, prod_offset: int
    ) -> None:
        if ring_size & (ring_size - 1) or cons_offset % 4 or prod_offset % 4:
            raise UsageError("a byte ring has a power of two of bytes, and its indices are aligned")
        octets = view.cast("B")
        if (
            octets.nbytes % 4
            or not max(ring_offset + ring_size, cons_offset + 4, prod_offset + 4) <= octets.nbytes
        ):
            raise UsageError(f"the ring does not lie within {octets.nbytes} bytes")
        self.size = ring_size
        self._mask = ring_size - 1
        self._data = octets[ring_offset : ring_offset + ring_size]
        self._words = octets.cast("I")
        self._cons = cons_offset // 4
        self._prod = prod_offset // 4
        octets.release()

    def release(self) -> None:
        """Let go of the buffer. Idempotent."""
        self._data.release()
        self._words.release()

    def _indices(self) -> tuple[int, int, int]:
        """(cons, prod, bytes between them), each index read once."""
        cons, prod = self._words[self._cons], self._words[self._prod]
        used = (prod - cons) & MASK
        if used > self.size:
            raise RingError(f"prod {prod} and cons {cons} are {used} apart in a ring of {self.size} bytes")
        return cons, prod, used

    @property
    def readable(self) -> int:
        """Bytes that wait to be read. RingError."""
        return self._indices()[2]

    @property
    def writable(self) -> int:
        """Bytes there is room for. RingError."""
        return self.size - self._indices()[2]

    def read(self, limit: int = MASK) -> bytes:
        """At most `limit` bytes; b"" if there are none. RingError. Notify the peer if it got any room."""
        cons, _, used = self._indices()
        length = min(used, limit)
        if not length:
            return b""
        fence.order_fence()
        data = self._copy(cons, length)
        fence.full_fence()  # the bytes are out before the peer may write over them
        self._words[self._cons] = (cons + length) & MASK
        fence.full_fence()
        return data

    def _copy(self, index: int, length: int) -> bytes:
        start = index & self._mask
        end = start + length
        if end <= self.size:
            return bytes(self._data[start:end])
        return bytes(self._data[start:]) + bytes(self._data[: end - self.size])

    def unread(self) -> bytes:
        """What was written and not read; it stays. RingError. For the writer, once no reader is left."""
        cons, _, used = self._indices()
        return self._copy(cons, used)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """How many of the bytes went in: 0 when the ring is full. RingError. Notify the peer if any did."""
        _, prod, used = self._indices()
        length = min(self.size - used, len(data))
        if not length:
            return 0
        fence.full_fence()  # the peer's cons was read before its bytes are written over
        start = prod & self._mask
        first = min(length, self.size - start)
        self._data[start : start + first] = data[:first]
        self._data[: length - first] = data[first:length]
        fence.order_fence()
        self._words[self._prod] = (prod + length) & MASK
        fence.full_fence()
        return length
