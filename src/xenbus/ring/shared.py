"""The request/response ring of xen/include/public/io/ring.h over any shared buffer.

Knows indices, slots and the notification hold-off; knows nothing of what a slot means, who the peer is,
or how it is kicked. Whatever the peer wrote is range-checked before it is used, and a slot is handed
out as a private copy, taken once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from xenbus.errors import PeerError, UsageError
from xenbus.ring import fence

# struct SRING of ring.h, as 32-bit words, and where the slots begin.
REQ_PROD: Final = 0
REQ_EVENT: Final = 1
RSP_PROD: Final = 2
RSP_EVENT: Final = 3
HEADER_SIZE: Final = 64
MASK: Final = 0xFFFFFFFF

Bytes = bytes | bytearray | memoryview


class RingError(PeerError):
    """The peer moved an index to where it cannot be."""


class RingFull(UsageError):
    """No free slot: ask `free()` first."""


def ring_size(slot_size: int, nbytes: int) -> int:
    """Slots of `slot_size` bytes in a ring of `nbytes`, rounded down to a power of two (__RING_SIZE)."""
    count = (nbytes - HEADER_SIZE) // slot_size if slot_size > 0 else 0
    if count < 1:
        raise UsageError(f"a ring of {nbytes} bytes has no room for a slot of {slot_size}")
    return 1 << (count.bit_length() - 1)


class SharedRing:
    """What both ends have in common: the shared words, the slots, and the geometry.

    view: writable, contiguous, 4-byte aligned, `HEADER_SIZE` and at least one slot long. The ring keeps
    slices of it until `release()`; only then may the pages be unmapped.
    """

    __slots__ = ("size", "slot_mask", "slot_size", "slots", "words")

    def __init__(self, view: memoryview, slot_size: int) -> None:
        if sys.byteorder != "little":
            raise UsageError("a shared ring is little-endian; this machine is not")
        if view.readonly:
            raise UsageError("a ring needs a writable view")
        self.size = ring_size(slot_size, view.nbytes)
        self.slot_size = slot_size
        self.slot_mask = self.size - 1
        octets = view.cast("B")
        # An aligned 'I' item is read and written by one 32-bit access; a slice of bytes may not be.
        self.words = octets[:HEADER_SIZE].cast("I")
        self.slots = octets[HEADER_SIZE : HEADER_SIZE + self.size * slot_size]
        octets.release()

    def release(self) -> None:
        """Let go of the buffer. Idempotent; the ring is of no use afterwards."""
        self.words.release()
        self.slots.release()


class FrontRing(SharedRing):
    """The end that asks: puts requests, takes responses.

    slot_size:     sizeof(union SRING_ENTRY), bytes
    response_size: how much of a slot is a response (default: all of it)
    """

    __slots__ = ("_published", "req_prod_pvt", "response_size", "rsp_cons")

    def __init__(self, view: memoryview, slot_size: int, response_size: int | None = None) -> None:
        super().__init__(view, slot_size)
        self.response_size = slot_size if response_size is None else response_size
        self.req_prod_pvt = 0
        self.rsp_cons = 0
        self._published = 0

    def init(self) -> None:
        """SHARED_RING_INIT: only the front does this, and before the other end knows of the ring."""
        words = self.words
        for index in range(HEADER_SIZE // 4):
            words[index] = 0
        words[REQ_EVENT] = words[RSP_EVENT] = 1
        self.req_prod_pvt = self.rsp_cons = self._published = 0

    def free(self) -> int:
        """Slots that a request may be put in now (RING_FREE_REQUESTS)."""
        return self.size - ((self.req_prod_pvt - self.rsp_cons) & MASK)

    def request_offset(self) -> int:
        """Where in `slots` the next request goes, for `struct.pack_into`; then `commit_request`. RingFull."""
        if (self.req_prod_pvt - self.rsp_cons) & MASK >= self.size:
            raise RingFull(f"all {self.size} slots of the ring are taken")
        return (self.req_prod_pvt & self.slot_mask) * self.slot_size

    def claim_request(self) -> int:
        """`request_offset` and `commit_request` in one: fill the slot before `push_requests`. RingFull."""
        prod = self.req_prod_pvt
        if (prod - self.rsp_cons) & MASK >= self.size:
            raise RingFull(f"all {self.size} slots of the ring are taken")
        self.req_prod_pvt = (prod + 1) & MASK
        return (prod & self.slot_mask) * self.slot_size

    def slot_for_request(self) -> memoryview:
        """The next slot, to be filled in place; then `commit_request()`. Release it. RingFull."""
        offset = self.request_offset()
        return self.slots[offset : offset + self.slot_size]

    def commit_request(self) -> None:
        """The slot from `request_offset()` is filled. The peer sees it after `push_requests()`."""
        self.req_prod_pvt = (self.req_prod_pvt + 1) & MASK

    def put_request(self, data: Bytes) -> None:
        """Copy one request, at most a slot long, into the next slot. RingFull."""
        if len(data) > self.slot_size:
            raise UsageError(f"a request of {len(data)} bytes in a slot of {self.slot_size}")
        offset = self.request_offset()
        self.slots[offset : offset + len(data)] = data
        self.commit_request()

    @property
    def unpublished(self) -> bool:
        """Whether there is anything for `push_requests` to publish."""
        return self.req_prod_pvt != self._published

    def push_requests(self) -> bool:
        """Publish what was put. True: notify the other end (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY)."""
        old, new = self._published, self.req_prod_pvt
        if old == new:
            return False
        self._published = new
        return _publish(self.words, REQ_PROD, REQ_EVENT, old, new)

    def unconsumed_responses(self) -> int:
        """Responses that wait. RingError if there are more than requests that were published."""
        waiting = (self.words[RSP_PROD] - self.rsp_cons) & MASK
        if waiting > (self._published - self.rsp_cons) & MASK:
            raise RingError(
                f"rsp_prod jumped to {(self.rsp_cons + waiting) & MASK}: "
                f"rsp_cons {self.rsp_cons}, req_prod {self._published}"
            )
        return waiting

    def take_responses(self, limit: int = MASK) -> list[bytes]:
        """Private copies of at most `limit` responses, oldest first. RingError."""
        count = min(self.unconsumed_responses(), limit)
        taken = _copy_out(self, self.rsp_cons, count, self.response_size)
        self.rsp_cons = (self.rsp_cons + count) & MASK
        return taken

    def take_response_slots(self, limit: int = MASK) -> bytes:
        """As `take_responses`, whole slots one after the other, for `Struct.iter_unpack`. RingError."""
        count = min(self.unconsumed_responses(), limit)
        taken = _copy_slots(self, self.rsp_cons, count)
        self.rsp_cons = (self.rsp_cons + count) & MASK
        return taken

    def final_check_for_responses(self, count: int = 1) -> bool:
        """Before going to sleep. True: there is more (RING_FINAL_CHECK_FOR_RESPONSES). RingError.

        count: be notified of that many together, and not of the first; no more than are still to come
        """
        if self.unconsumed_responses() >= count:
            return True
        self.words[RSP_EVENT] = (self.rsp_cons + count) & MASK
        fence.full_fence()
        return self.unconsumed_responses() >= count


class BackRing(SharedRing):
    """The end that answers: takes requests, puts responses. Attaches to a ring in progress as it stands.

    slot_size:    sizeof(union SRING_ENTRY), bytes
    request_size: how much of a slot is a request (default: all of it)
    """

    __slots__ = ("_published", "req_cons", "request_size", "rsp_prod_pvt")

    def __init__(self, view: memoryview, slot_size: int, request_size: int | None = None) -> None:
        super().__init__(view, slot_size)
        self.request_size = slot_size if request_size is None else request_size
        # BACK_RING_ATTACH at rsp_prod: requests that a dead backend took and never answered come again.
        self.rsp_prod_pvt = self.req_cons = self._published = self.words[RSP_PROD]

    def unconsumed_requests(self) -> int:
        """Requests that wait. RingError if there are more than the front has slots for."""
        waiting = (self.words[REQ_PROD] - self.req_cons) & MASK
        # RING_REQUEST_PROD_OVERFLOW; measured from req_cons it catches an index that went back, too.
        if waiting > self.size - ((self.req_cons - self.rsp_prod_pvt) & MASK):
            raise RingError(
                f"req_prod jumped to {(self.req_cons + waiting) & MASK}: req_cons {self.req_cons}, "
                f"rsp_prod {self.rsp_prod_pvt}, {self.size} slots"
            )
        return waiting

    def take_requests(self, limit: int = MASK) -> list[bytes]:
        """Private copies of at most `limit` requests, oldest first. RingError."""
        count = min(self.unconsumed_requests(), limit)
        taken = _copy_out(self, self.req_cons, count, self.request_size)
        self.req_cons = (self.req_cons + count) & MASK
        return taken

    def take_request_slots(self, limit: int = MASK) -> bytes:
        """As `take_requests`, whole slots one after the other, for `Struct.iter_unpack`. RingError."""
        count = min(self.unconsumed_requests(), limit)
        taken = _copy_slots(self, self.req_cons, count)
        self.req_cons = (self.req_cons + count) & MASK
        return taken

    def response_offset(self) -> int:
        """Where in `slots` the next response goes, for `struct.pack_into`; then `commit_response()`."""
        if self.rsp_prod_pvt == self.req_cons:
            raise UsageError("a response without a request")
        return (self.rsp_prod_pvt & self.slot_mask) * self.slot_size

    def commit_response(self) -> None:
        """The slot from `response_offset()` is filled. The peer sees it after `push_responses()`."""
        self.rsp_prod_pvt = (self.rsp_prod_pvt + 1) & MASK

    def put_response(self, data: Bytes) -> None:
        """Copy one response, at most a slot long. UsageError if every request taken is answered already."""
        if len(data) > self.slot_size:
            raise UsageError(f"a response of {len(data)} bytes in a slot of {self.slot_size}")
        offset = self.response_offset()
        self.slots[offset : offset + len(data)] = data
        self.commit_response()

    def push_responses(self) -> bool:
        """Publish what was put. True: notify the front (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY)."""
        old, new = self._published, self.rsp_prod_pvt
        if old == new:
            return False
        self._published = new
        return _publish(self.words, RSP_PROD, RSP_EVENT, old, new)

    def final_check_for_requests(self) -> bool:
        """Before going to sleep. True: there is more (RING_FINAL_CHECK_FOR_REQUESTS). RingError."""
        if self.unconsumed_requests():
            return True
        self.words[REQ_EVENT] = (self.req_cons + 1) & MASK
        fence.full_fence()
        return self.unconsumed_requests() > 0


def _publish(words: memoryview, prod: int, event: int, old: int, new: int) -> bool:
    fence.order_fence()  # the peer sees the slots before the index
    words[prod] = new
    fence.full_fence()  # the peer sees the index before we look whether it sleeps
    if not fence.FENCED:
        return True
    # `old` is our own copy: what stands in shared memory may be the peer's.
    passed: bool = (new - words[event]) & MASK < (new - old) & MASK
    return passed


def _copy_slots(ring: SharedRing, start: int, count: int) -> bytes:
    if not count:
        return b""
    fence.order_fence()  # the index was read before the slots are
    slots, step = ring.slots, ring.slot_size
    first = start & ring.slot_mask
    if first + count <= ring.size:
        return bytes(slots[first * step : (first + count) * step])
    return bytes(slots[first * step :]) + bytes(slots[: (first + count - ring.size) * step])


def _copy_out(ring: SharedRing, start: int, count: int, length: int) -> list[bytes]:
    fence.order_fence()  # the index was read before the slots are
    slots, mask, step = ring.slots, ring.slot_mask, ring.slot_size
    taken: list[bytes] = []
    append: Callable[[bytes], None] = taken.append
    for index in range(start, start + count):
        offset = (index & mask) * step
        append(bytes(slots[offset : offset + length]))
    return taken
