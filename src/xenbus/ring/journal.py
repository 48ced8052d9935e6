"""A back ring whose private state outlives its process: what was taken is written down in shared memory.

Knows rings, and that a request and its response share an id of 8 bytes; knows no files, and nothing else of
what a slot means. Its writer may die between any two stores: the kernel keeps what was stored, in order, so
there are no fences here. It is no help against a crash of the machine, which takes the guests too.

The shared ring tells a new process how many responses were published (`rsp_prod`). What it cannot tell is
which requests those answered, and how many were taken: their slots may hold responses by now. So, 8-aligned:

    header   magic, version, slot size, entries, identity (32 bytes), TAKEN
    seq[]    which request an entry holds
    rsp[]    which response answers it, 0 while none does
    raw[]    its slot as it was taken

Requests and responses are counted in 64 bits from COUNT_BASE, whose low half is the ring's index: 0 is nobody
and nothing wraps. An entry is live when its request is below TAKEN and its response is not below `rsp_prod`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from xenbus.errors import UsageError, XenbusError
from xenbus.ring.shared import MASK, BackRing, RingError

MAGIC: Final = b"XENBUSJ1"
VERSION: Final = 1
IDENTITY_SIZE: Final = 32
ID_SIZE: Final = 8
COUNT_BASE: Final = 1 << 32
HEAD_SIZE: Final = 64  # of any journal; the last 8 bytes are its layout's own
_HEAD: Final = struct.Struct("<8sIII4x32s")
_TAKEN_AT: Final = _HEAD.size
MAX_ENTRIES: Final = 1 << 16


class JournalError(XenbusError):
    """A journal that cannot be used: none of ours, another connection's, or one that contradicts itself."""


def journal_size(entries: int, slot_size: int) -> int:
    """Bytes of a journal for a ring of so many slots of that size. UsageError."""
    if not (0 < entries <= MAX_ENTRIES and 0 < slot_size <= 4096):
        raise UsageError(f"no journal for {entries} slots of {slot_size} bytes")
    return HEAD_SIZE + entries * (16 + slot_size)


class Head:
    """What a journal is, and whose: the first bytes of each of them, whatever comes behind.

    magic:  8 bytes that name its layout; sizes: those that its layout depends on
    """

    __slots__ = ("_magic", "_octets", "_sizes")

    def __init__(self, view: memoryview, magic: bytes, sizes: tuple[int, int]) -> None:
        if struct.calcsize("P") < 8:
            raise JournalError("a journal takes a machine that stores 8 bytes at once")
        self._octets = view[: _HEAD.size]
        self._magic = magic
        self._sizes = sizes

    def release(self) -> None:
        self._octets.release()

    def begin(self, identity: bytes) -> None:
        """In a zeroed buffer."""
        # The magic comes last: what bears it is whole.
        _HEAD.pack_into(self._octets, 0, bytes(8), VERSION, *self._sizes, identity)
        self._octets[: len(self._magic)] = self._magic

    def check(self, identity: bytes) -> None:
        """JournalError unless it was begun for this very connection."""
        magic, version, *sizes, whose = _HEAD.unpack_from(self._octets)
        if magic != self._magic or version != VERSION:
            raise JournalError(f"no journal of version {VERSION}: it begins with {magic!r}, {version}")
        if tuple(sizes) != self._sizes:
            raise JournalError(f"it is made for sizes of {tuple(sizes)}, not {self._sizes}")
        if whose != identity:
            raise JournalError("it is another connection's")


class Journal:
    """The layout over a writable buffer of `journal_size` bytes, zeroed or an earlier process's.

    identity: 32 bytes that say whose ring this is; one of another connection is of no use
    """

    __slots__ = ("_head", "entries", "raw", "rsp", "seq", "slot_size", "taken")

    def __init__(self, view: memoryview, entries: int, slot_size: int) -> None:
        size = journal_size(entries, slot_size)
        if view.nbytes != size:
            raise JournalError(f"a journal of {view.nbytes} bytes, not {size}")
        self.entries = entries
        self.slot_size = slot_size
        octets = view.cast("B")
        at = HEAD_SIZE + 8 * entries
        self._head = Head(octets, MAGIC, (slot_size, entries))
        self.taken = octets[_TAKEN_AT:HEAD_SIZE].cast("Q")
        self.seq = octets[HEAD_SIZE:at].cast("Q")
        self.rsp = octets[at : at + 8 * entries].cast("Q")
        self.raw = octets[at + 8 * entries :]
        octets.release()

    def release(self) -> None:
        """Let go of the buffer. Idempotent."""
        for view in (self._head, self.taken, self.seq, self.rsp, self.raw):
            view.release()

    def begin(self, identity: bytes, index: int) -> None:
        """Make it a new ring's, in a zeroed buffer. index: where the ring stands, 0 for one just made."""
        self.taken[0] = COUNT_BASE + index
        self._head.begin(identity)

    def check(self, identity: bytes) -> None:
        """JournalError unless it was begun for this very ring."""
        self._head.check(identity)

    def slot(self, entry: int) -> bytes:
        return bytes(self.raw[entry * self.slot_size : (entry + 1) * self.slot_size])

    def recover(self, rsp_prod: int) -> tuple[int, list[int]]:
        """(the count of responses that were published, the live entries, oldest first).

        rsp_prod: as it stands in the ring, where the front may have written it. JournalError if it does not
        fit; then nothing was changed. Otherwise all other entries are free from now on.
        """
        taken = self.taken[0]
        waiting = (taken - rsp_prod) & MASK
        published = taken - waiting
        if waiting > self.entries or not COUNT_BASE <= published <= taken < 1 << 63:
            raise JournalError(f"rsp_prod {rsp_prod} does not fit {taken - COUNT_BASE} requests taken")
        seq, rsp = self.seq, self.rsp
        live = [
            entry
            for entry in range(self.entries)
            if COUNT_BASE <= seq[entry] < taken and not 0 < rsp[entry] < published
        ]
        live.sort(key=seq.__getitem__)
        if len(live) != waiting or len({seq[entry] for entry in live}) != waiting:
            raise JournalError(
                f"{len(live)} requests are unanswered, by rsp_prod {rsp_prod} it should be {waiting}"
            )
        # An entry that was begun and not taken would come alive once TAKEN passes it.
        for entry in set(range(self.entries)).difference(live):
            seq[entry] = 0
        # A response that was tied and not published will be another request's.
        for entry in live:
            rsp[entry] = 0
        return published, live


class JournalledRing(BackRing):
    """A BackRing that goes on where the journal's last writer stopped: what that one took and did not answer
    is handed out first, oldest first, then what waits in the ring.

    journal: begun, or checked, for this ring. request_id, response_id: where in a slot the id is, bytes.
    `again`: how many requests are to be done once more. Raises JournalError.
    """

    __slots__ = ("_again", "_free", "_journal", "_request_id", "_response_id", "_taken", "_waiting", "again")

    def __init__(
        self, view: memoryview, slot_size: int, journal: Journal, request_id: int, response_id: int = 0
    ) -> None:
        super().__init__(view, slot_size)
        self._journal = journal
        self._request_id = request_id
        self._response_id = response_id
        if journal.entries != self.size or journal.slot_size != slot_size:
            raise JournalError(f"a journal of {journal.entries} entries for a ring of {self.size} slots")
        # By id: the entries of unanswered requests. Fronts have one each; for a liar any of them will do.
        self._waiting: dict[bytes, list[int]] = {}
        _, live = journal.recover(self.rsp_prod_pvt)
        self._taken: int = journal.taken[0]
        self.req_cons = self._taken & MASK
        alive = set(live)
        self._free = [entry for entry in range(self.size) if entry not in alive]
        self.again = len(live)
        self._again = b"".join(map(journal.slot, live))
        self._note(self._again, live)

    def release(self) -> None:
        super().release()
        self._journal.release()

    def _note(self, slots: bytes, entries: Sequence[int]) -> None:
        at, waiting = self._request_id, self._waiting
        for entry in entries:
            waiting.setdefault(slots[at : at + ID_SIZE], []).append(entry)
            at += self.slot_size

    # -- taking

    def take_request_slots(self, limit: int = MASK) -> bytes:
        if self._again:
            cut = limit * self.slot_size
            slots, self._again = self._again[:cut], self._again[cut:]
            return slots
        slots = super().take_request_slots(limit)
        if slots:
            self._record(slots)
        return slots

    def take_requests(self, limit: int = MASK) -> list[bytes]:
        slots, step = self.take_request_slots(limit), self.slot_size
        return [slots[at : at + self.request_size] for at in range(0, len(slots), step)]

    def unconsumed_requests(self) -> int:
        return super().unconsumed_requests() + len(self._again) // self.slot_size

    def final_check_for_requests(self) -> bool:
        return bool(self._again) or super().final_check_for_requests()

    def _record(self, slots: bytes) -> None:
        """Before anybody acts on them. They count from the store to TAKEN on; before it they come again."""
        journal, free, step = self._journal, self._free, self.slot_size
        count = len(slots) // step
        if count > len(free):  # more than it can have seen responses for
            raise RingError(f"{count} requests more than the {self.size} slots of the ring allow")
        entries = [free.pop() for _ in range(count)]
        seq, rsp, raw, number, at = journal.seq, journal.rsp, journal.raw, self._taken, 0
        for entry in entries:
            seq[entry] = number  # first: not below TAKEN, so that the rest may be half done
            rsp[entry] = 0
            raw[entry * step : (entry + 1) * step] = slots[at : at + step]
            number += 1
            at += step
        journal.taken[0] = self._taken = number
        self._note(slots, entries)

    # -- answering

    def push_responses(self) -> bool:
        """As BackRing's; RingError if the front wrote over a response that it could not see yet."""
        count = (self.rsp_prod_pvt - self._published) & MASK
        if not count:
            return False
        tied = self._tie(count)
        notify = super().push_responses()
        self._free += tied
        return notify

    def _tie(self, count: int) -> list[int]:
        """Writes down which requests the next `count` responses answer. It counts once they are published."""
        waiting, rsp, index = self._waiting, self._journal.rsp, self._published
        # Unanswered are as many as were taken and not published: so this is the next response's count.
        number = self._taken - ((self._taken - index) & MASK)
        tied: list[int] = []
        for step in range(count):
            at = ((index + step) & self.slot_mask) * self.slot_size + self._response_id
            ident = bytes(self.slots[at : at + ID_SIZE])
            entries = waiting.get(ident)
            if entries is None:
                raise RingError(
                    f"response {index + step & MASK}: the front wrote over it before it could see it"
                )
            entry = entries.pop(0)
            if not entries:
                del waiting[ident]
            rsp[entry] = number + step
            tied.append(entry)
        return tied
