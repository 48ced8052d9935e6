"""The journalled ring: a back end that dies between any two stores loses no request and answers none twice.

A model front talks to real rings; the back end's stores to shared memory run through a fuse that ends it.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import UsageError
from xenbus.ring.journal import (
    COUNT_BASE,
    MAX_ENTRIES,
    Journal,
    JournalError,
    JournalledRing,
    journal_size,
)
from xenbus.ring.shared import (
    HEADER_SIZE,
    MASK,
    REQ_EVENT,
    REQ_PROD,
    RSP_EVENT,
    RSP_PROD,
    FrontRing,
    RingError,
)

SLOT = 24
SLOTS = 4
REQUEST = struct.Struct("<8xQQ")  # as blkif on x86-64: the id does not come first
RESPONSE = struct.Struct("<QQ8x")
IDENTITY = b"i" * 32


class Killed(BaseException):
    """The process is gone: nothing of it runs on."""


class Fuse:
    """So many stores, and then none. None: it does not blow."""

    def __init__(self, stores: int | None = None) -> None:
        self.left = stores

    def store(self) -> None:
        if self.left is not None:
            if not self.left:
                raise Killed
            self.left -= 1


class Fused:
    """A view whose stores run through a fuse."""

    def __init__(self, view, fuse: Fuse) -> None:
        self._view = view
        self._fuse = fuse

    def __getitem__(self, key):
        return self._view[key]

    def __setitem__(self, key, value):
        self._fuse.store()
        self._view[key] = value

    def release(self) -> None:
        self._view.release()


class Machine:
    """Shared memory, a front that counts, and a back end that may die."""

    def __init__(self, start: int = 0, slots: int = SLOTS) -> None:
        self.ring_memory = memoryview(bytearray(HEADER_SIZE + slots * SLOT))
        self.memory = memoryview(bytearray(journal_size(slots, SLOT)))
        self.front = FrontRing(self.ring_memory, SLOT)
        self.front.init()
        words = self.front.words
        words[REQ_PROD] = words[RSP_PROD] = start
        words[REQ_EVENT] = words[RSP_EVENT] = (start + 1) & MASK
        self.front.req_prod_pvt = self.front.rsp_cons = self.front._published = start
        self.outstanding: dict[int, int] = {}  # id -> payload
        self.sent = 0
        self.slots = slots
        journal = Journal(self.memory, slots, SLOT)
        journal.begin(IDENTITY, start)
        journal.release()
        self.fuse = Fuse()
        self.deaths = 0
        self.back: JournalledRing
        self.inflight: list[bytes] = []
        self.rise()

    # -- the front

    def send(self, count: int) -> None:
        for _ in range(min(count, self.front.free())):
            ident = next(n for n in range(self.slots) if n not in self.outstanding)
            self.sent += 1
            self.outstanding[ident] = self.sent
            self.front.put_request(REQUEST.pack(ident, self.sent))
        self.front.push_requests()

    def collect(self) -> None:
        for raw in self.front.take_responses():
            ident, payload = RESPONSE.unpack(raw)
            assert self.outstanding.pop(ident) == payload, "answered twice, or for another request"

    # -- the back end

    def rise(self, stores: int | None = None) -> None:
        self.inflight = []
        self.fuse = Fuse(stores)
        journal = Journal(self.memory, self.slots, SLOT)
        journal.check(IDENTITY)
        for name in ("taken", "seq", "rsp", "raw"):
            setattr(journal, name, Fused(getattr(journal, name), self.fuse))
        self.back = JournalledRing(self.ring_memory, SLOT, journal, 8)
        self.back.words = Fused(self.back.words, self.fuse)
        self.back.slots = Fused(self.back.slots, self.fuse)

    def alive(self, doing) -> None:
        """Does it; if that is the end of the process, the next one takes over."""
        try:
            doing()
        except Killed:
            self.die()

    def die(self, stores: int | None = None) -> None:
        """stores: how far the next one comes, before one that lives."""
        self.deaths += 1
        if stores is not None:
            try:
                self.rise(stores)
            except Killed:
                pass
        self.rise()

    def take(self, limit: int) -> None:
        slots = self.back.take_request_slots(limit)
        self.inflight += [slots[at : at + SLOT] for at in range(0, len(slots), SLOT)]

    def answer(self, which: int) -> None:
        if self.inflight:
            ident, payload = REQUEST.unpack(self.inflight.pop(which % len(self.inflight)))
            self.back.put_response(RESPONSE.pack(ident, payload))

    def serve(self, which: int) -> None:
        """Take all, answer one or two, publish."""
        self.take(self.slots)
        self.answer(which)
        if which % 2:
            self.answer(which // 2)
        self.back.push_responses()

    def finish(self) -> None:
        """Everything that is outstanding, to its answer."""
        for _ in range(2 * self.slots):
            self.take(3)
            while self.inflight:
                self.answer(0)
            self.back.push_responses()
            self.collect()
        assert not self.back.final_check_for_requests()
        assert not self.outstanding, "requests were lost"


ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.integers(1, SLOTS)),
    st.tuples(st.just("take"), st.integers(1, SLOTS)),
    st.tuples(st.just("answer"), st.integers(0, SLOTS)),
    st.tuples(st.just("push"), st.just(0)),
    st.tuples(st.just("collect"), st.just(0)),
    st.tuples(st.just("burn"), st.integers(0, 16)),
    st.tuples(st.just("serve"), st.integers(0, SLOTS)),
    st.tuples(st.just("fall"), st.integers(0, 12)),
    st.tuples(st.just("die"), st.one_of(st.none(), st.integers(0, 12))),
)


@given(st.lists(ACTIONS, max_size=60), st.sampled_from([0, 3, MASK - 2, MASK]))
@settings(max_examples=400, deadline=None)
def test_every_request_is_answered_once(actions, start):
    machine = Machine(start)
    for what, number in actions:
        match what:
            case "send":
                machine.send(number)
            case "collect":
                machine.collect()
            case "burn":
                machine.fuse.left = number
            case "die":
                machine.die(number)
            case "take":
                machine.alive(lambda: machine.take(number))  # noqa: B023 - called at once
            case "serve" | "fall":
                if what == "fall":
                    machine.fuse.left = number
                machine.send(number % SLOTS)
                machine.alive(lambda: machine.serve(number))  # noqa: B023
                machine.collect()
            case "answer":
                machine.alive(lambda: machine.answer(number))  # noqa: B023
            case "push":
                machine.alive(lambda: machine.back.push_responses())
    machine.fuse.left = None
    machine.collect()
    machine.finish()


def busy(machine: Machine) -> None:
    """Answers out of order, over requests that are still to be done: what a slot alone could not tell."""
    machine.send(4)
    machine.take(4)
    machine.answer(2)
    machine.back.push_responses()
    machine.collect()
    machine.send(1)
    machine.take(4)
    machine.answer(3)
    machine.answer(1)
    machine.back.push_responses()
    machine.collect()
    machine.send(2)
    machine.take(1)


def test_a_death_at_each_store_and_at_each_store_of_the_next():
    deaths, stores = set(), 0
    while True:
        machine = Machine()
        machine.fuse.left = stores
        try:
            busy(machine)
        except Killed:
            pass
        else:
            break
        for second in range(2 * SLOTS + 2):
            memory, ring = bytes(machine.memory), bytes(machine.ring_memory)
            outstanding, rsp_cons = dict(machine.outstanding), machine.front.rsp_cons
            machine.die(second)
            deaths.add((stores, second))
            machine.collect()
            machine.finish()
            machine.memory[:], machine.ring_memory[:] = memory, ring
            machine.outstanding, machine.front.rsp_cons = outstanding, rsp_cons
            front = machine.front
            front.req_prod_pvt = front._published = front.words[REQ_PROD]
        stores += 1
    assert stores > 25 and len(deaths) > 250


def test_what_was_taken_comes_first_and_in_order():
    machine = Machine()
    machine.send(3)
    machine.take(3)
    machine.answer(1)
    machine.back.push_responses()
    machine.collect()
    machine.send(1)
    machine.die()
    assert machine.back.again == 2 and machine.back.unconsumed_requests() == 3
    assert [REQUEST.unpack(raw)[1] for raw in machine.back.take_requests(1)] == [1]
    assert [REQUEST.unpack(raw)[1] for raw in machine.back.take_requests()] == [3]
    assert [REQUEST.unpack(raw)[1] for raw in machine.back.take_requests()] == [4]


def test_a_response_that_was_tied_and_not_published_is_forgotten():
    machine = Machine()
    machine.send(2)
    machine.take(2)
    machine.answer(0)
    machine.fuse.left = 1
    machine.alive(machine.back.push_responses)
    assert machine.deaths == 1 and machine.back.again == 2
    machine.take(2)
    machine.answer(1)
    machine.back.push_responses()
    machine.collect()
    machine.die()
    assert machine.back.again == 1
    machine.finish()


def test_a_request_that_was_begun_and_not_taken_is_forgotten():
    machine = Machine()
    machine.send(2)
    machine.take(2)
    machine.answer(0)
    machine.answer(0)
    machine.back.push_responses()  # so that the next takes another entry than one that begins anew
    machine.collect()
    machine.send(1)
    machine.fuse.left = 2
    machine.alive(lambda: machine.take(1))
    assert machine.deaths == 1 and machine.back.again == 0
    machine.take(1)
    machine.die()
    assert machine.back.again == 1
    machine.finish()


def test_ids_that_are_not_unique_are_the_front_s_own_trouble():
    machine = Machine()
    for payload in (1, 2, 3):
        machine.front.put_request(REQUEST.pack(7, payload))
    machine.front.push_requests()
    machine.take(3)
    machine.answer(2)
    machine.back.push_responses()
    machine.die()
    assert machine.back.again == 2
    machine.take(4)
    machine.answer(0)
    machine.answer(0)
    machine.back.push_responses()
    assert [RESPONSE.unpack(raw)[0] for raw in machine.front.take_responses()] == [7, 7, 7]


def test_a_response_that_the_front_wrote_over():
    machine = Machine()
    machine.send(1)
    machine.take(1)
    machine.answer(0)
    machine.front.slots[0] = 99
    with pytest.raises(RingError, match="wrote over"):
        machine.back.push_responses()
    assert machine.front.unconsumed_responses() == 0


def test_a_front_that_guesses_more_responses_than_it_has_seen():
    machine = Machine()
    machine.send(4)
    machine.take(4)
    machine.answer(0)
    machine.front.words[REQ_PROD] = 5  # room for it there is when the answer is published
    with pytest.raises(RingError, match="more than the 4 slots"):
        machine.take(4)


@pytest.mark.parametrize("rsp_prod", [2, 5, 100, MASK])
def test_an_rsp_prod_that_does_not_fit(rsp_prod):
    machine = Machine()
    machine.send(3)
    machine.take(3)
    machine.answer(0)
    machine.back.push_responses()
    machine.front.words[RSP_PROD] = rsp_prod
    before = bytes(machine.memory)
    with pytest.raises(JournalError, match="rsp_prod"):
        machine.rise()
    assert bytes(machine.memory) == before


@given(
    st.binary(min_size=16 * SLOTS, max_size=16 * SLOTS),
    st.integers(0, (1 << 64) - 1) | st.integers(COUNT_BASE, COUNT_BASE + 8),
    st.integers(0, MASK),
)
@settings(max_examples=200, deadline=None)
def test_whatever_a_journal_holds_it_is_refused_or_bounded(entries, taken, rsp_prod):
    machine = Machine()
    machine.memory[64 : 64 + len(entries)] = entries
    machine.memory[56:64] = struct.pack("<Q", taken)
    machine.front.words[RSP_PROD] = rsp_prod
    try:
        machine.rise()
        assert machine.back.again <= SLOTS
        assert len(machine.back.take_requests()) <= SLOTS
    except (JournalError, RingError):
        pass


def test_another_ring_s_journal_is_refused():
    memory = memoryview(bytearray(journal_size(SLOTS, SLOT)))
    with pytest.raises(JournalError, match="no journal"):
        Journal(memory, SLOTS, SLOT).check(IDENTITY)
    journal = Journal(memory, SLOTS, SLOT)
    journal.begin(IDENTITY, 0)
    journal.check(IDENTITY)
    with pytest.raises(JournalError, match="another connection"):
        journal.check(b"j" * 32)
    memory[16] = 8
    with pytest.raises(JournalError, match="sizes of"):
        journal.check(IDENTITY)
    with pytest.raises(JournalError, match="bytes, not"):
        Journal(memory, SLOTS * 2, SLOT)
    with pytest.raises(JournalError, match="8 slots"):
        JournalledRing(memoryview(bytearray(HEADER_SIZE + 8 * SLOT)), SLOT, journal, 8)
    for entries, slot in ((0, 112), (MAX_ENTRIES + 1, 112), (32, 0), (32, 5000)):
        with pytest.raises(UsageError):
            journal_size(entries, slot)


def test_release_lets_go_of_both_buffers():
    machine = Machine()
    machine.back.release()
    machine.back.release()
    with pytest.raises(ValueError, match="released"):
        machine.memory.release() or bytes(machine.memory)
