"""A back ring that answers in the order of the requests; its process may be killed between any two stores.

Knows rings; knows no files, and nothing of what a slot means. A response stands where its request stood, and
the process that comes next begins at `rsp_prod`: it must not find responses there that nobody published. So
they are made in a log, in memory that outlives the process, and copied to the ring from there:

    span     which responses the log has: the first one's index << 32 | the index after the last
    answers  those, one after the other

They are made while the ring stands where `span` ends. One store to `span` makes them good, then they are
copied, then `rsp_prod` moves. So a ring that stands where `span` ends has requests in all its slots from
there on; for one that stands where it begins the copy is done again, whatever is in those slots. It stands
nowhere else.
"""

from __future__ import annotations

import struct
from typing import Final

from xenbus.errors import UsageError
from xenbus.ring import fence
from xenbus.ring.journal import JournalError
from xenbus.ring.shared import MASK, RSP_PROD, BackRing

_SPAN_SIZE: Final = 8


def answer_log_size(entries: int, slot_size: int) -> int:
    """Bytes of a log for a ring of so many slots of that size, a multiple of 8."""
    return _SPAN_SIZE + (entries * slot_size + 7 & ~7)


class AnswerLog:
    """Over a writable, 8-aligned buffer of `answer_log_size` bytes, zeroed or an earlier process's.

    answers: as bytes; halves: the same in 16 bits each
    """

    __slots__ = ("answers", "halves", "span")

    def __init__(self, view: memoryview) -> None:
        if struct.calcsize("P") < 8:
            raise JournalError("a journal takes a machine that stores 8 bytes at once")
        octets = view.cast("B")
        self.span = octets[:_SPAN_SIZE].cast("Q")
        self.answers = octets[_SPAN_SIZE:]
        self.halves = self.answers.cast("H")
        octets.release()

    def release(self) -> None:
        """Let go of the buffer. Idempotent."""
        for view in (self.span, self.halves, self.answers):
            view.release()


class AnswerRing(BackRing):
    """A BackRing whose responses are made in a log, and by `claim_answers` alone.

    log:     its owner's to release, after the ring
    resumes: go on where the log's last writer stopped. What that one had answered is published, and the front
             is to be told. JournalError if log and ring do not belong together
    """

    __slots__ = ("_span", "answers", "halves")

    def __init__(self, view: memoryview, slot_size: int, log: AnswerLog, *, resumes: bool = False) -> None:
        super().__init__(view, slot_size)
        if log.answers.nbytes < self.size * slot_size:
            raise JournalError(f"a log of {log.answers.nbytes} bytes for {self.size} slots of {slot_size}")
        self.answers, self.halves = log.answers, log.halves
        self._span = log.span
        if resumes:
            self._catch_up()
        else:
            self._span[0] = self._published << 32 | self._published

    def _catch_up(self) -> None:
        stands = self._published
        start, end = self._span[0] >> 32, self._span[0] & MASK
        if stands == end:
            return
        if stands != start or (end - start) & MASK > self.size:
            raise JournalError(f"rsp_prod {stands} does not fit: the answers from {start} to {end} were made")
        self._put(start, end)
        fence.order_fence()
        self.words[RSP_PROD] = self._published = self.rsp_prod_pvt = self.req_cons = end

    def claim_answers(self, count: int) -> int:
        """Where in `answers` the next `count` responses go: fill them before `push_responses`."""
        prod = self.rsp_prod_pvt
        if count > (self.req_cons - prod) & MASK:
            raise UsageError("a response without a request")
        self.rsp_prod_pvt = (prod + count) & MASK
        return ((prod - self._published) & MASK) * self.slot_size

    def push_responses(self) -> bool:
        old, new = self._published, self.rsp_prod_pvt
        if old == new:
            return False
        self._span[0] = old << 32 | new
        self._put(old, new)
        return super().push_responses()

    def _put(self, start: int, end: int) -> None:
        slots, answers, step = self.slots, self.answers, self.slot_size
        size, at = ((end - start) & MASK) * step, (start & self.slot_mask) * step
        first = self.size * step - at
        if size <= first:
            slots[at : at + size] = answers[:size]
        else:
            slots[at : at + first] = answers[:first]
            slots[: size - first] = answers[first:size]
