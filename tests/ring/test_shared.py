"""The shared ring against a model: every interleaving delivers, every wild index is refused.

The hold-off is checked exhaustively at the grain of single loads and stores (lost wake-ups), and the real
methods are held to the order of accesses that was checked.
"""

from __future__ import annotations

import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import PeerError, UsageError
from xenbus.ring import fence
from xenbus.ring.shared import (
    HEADER_SIZE,
    MASK,
    REQ_EVENT,
    REQ_PROD,
    RSP_EVENT,
    RSP_PROD,
    BackRing,
    FrontRing,
    RingError,
    RingFull,
    ring_size,
)

SLOT = 16


def pair(slots: int = 4, start: int = 0) -> tuple[FrontRing, BackRing]:
    memory = memoryview(bytearray(HEADER_SIZE + slots * SLOT))
    front = FrontRing(memory, SLOT)
    front.init()
    if start:
        front.words[REQ_PROD] = front.words[RSP_PROD] = start
        front.words[REQ_EVENT] = front.words[RSP_EVENT] = (start + 1) & MASK
        front.req_prod_pvt = front.rsp_cons = front._published = start
    return front, BackRing(memory, SLOT)


def message(n: int) -> bytes:
    return struct.pack("<QQ", n, n ^ 0xFFFF)


def test_sizes_of_the_header():
    # __RING_SIZE: blkif's slot of 112 bytes gives 32 in a page, 64 in two, 512 in sixteen.
    assert [ring_size(112, 4096 * n) for n in (1, 2, 4, 8, 16)] == [32, 64, 128, 256, 512]
    assert ring_size(108, 4096) == 32
    assert ring_size(12, 4096) == 256
    assert ring_size(8, 4096) == 256
    for slot, nbytes in ((112, 64), (112, 175), (0, 4096)):
        with pytest.raises(UsageError):
            ring_size(slot, nbytes)


def test_layout_of_the_header():
    memory = memoryview(bytearray(b"\xff" * 4096))
    front = FrontRing(memory, 112)
    front.init()
    assert bytes(memory[:64]) == struct.pack("<IIII", 0, 1, 0, 1) + bytes(48)
    front.put_request(b"r" * 112)
    assert bytes(memory[:4]) == bytes(4)  # not published yet
    assert front.push_requests()
    assert struct.unpack_from("<I", memory, 0) == (1,)
    assert bytes(memory[64 : 64 + 112]) == b"r" * 112


def test_full_ring_and_too_long_a_slot():
    front, _ = pair()
    for n in range(4):
        assert front.free() == 4 - n
        front.put_request(message(n))
    with pytest.raises(RingFull):
        front.put_request(message(4))
    with pytest.raises(RingFull):
        front.slot_for_request()
    with pytest.raises(UsageError):
        front.put_request(b"x" * (SLOT + 1))


def test_filling_in_place():
    front, back = pair()
    slot = front.slot_for_request()
    struct.pack_into("<QQ", slot, 0, 7, 8)
    slot.release()
    front.commit_request()
    struct.pack_into("<QQ", front.slots, front.request_offset(), 9, 10)
    front.commit_request()
    front.push_requests()
    assert [struct.unpack("<QQ", r) for r in back.take_requests()] == [(7, 8), (9, 10)]
    struct.pack_into("<QQ", back.slots, back.response_offset(), 1, 2)
    back.commit_response()
    back.push_responses()
    assert front.take_responses() == [struct.pack("<QQ", 1, 2)]


def test_what_was_taken_is_private():
    front, back = pair()
    front.put_request(message(1))
    front.push_requests()
    (taken,) = back.take_requests()
    front.slots[:] = b"\xee" * len(front.slots)
    assert taken == message(1)


def test_a_response_without_a_request_is_our_own_fault():
    _, back = pair()
    with pytest.raises(UsageError):
        back.put_response(message(1))


@settings(max_examples=80, deadline=None)
@given(
    start=st.sampled_from([0, 5, 2**31 - 2, 2**32 - 3, 2**32 - 1]),
    steps=st.lists(st.tuples(st.sampled_from("PpTRrC"), st.integers(0, 5)), max_size=120),
)
def test_two_ends_against_a_model(start, steps):
    """P put, p push, T take, R answer, r push answers, C collect: in any order, across the wrap."""
    front, back = pair(4, start)
    prepared, on_ring, taken, answered, visible = deque(), deque(), deque(), deque(), deque()
    serial = 0
    for what, amount in steps:
        if what == "P" and front.free():
            front.put_request(message(serial))
            prepared.append(message(serial))
            serial += 1
        elif what == "p":
            front.push_requests()
            on_ring += prepared
            prepared.clear()
        elif what == "T":
            expected = [on_ring.popleft() for _ in range(min(amount, len(on_ring)))]
            assert back.take_requests(amount) == expected
            taken += expected
        elif what == "R" and taken:
            reply = taken.popleft()[::-1]
            back.put_response(reply)
            answered.append(reply)
        elif what == "r":
            back.push_responses()
            visible += answered
            answered.clear()
        elif what == "C":
            expected = [visible.popleft() for _ in range(min(amount, len(visible)))]
            assert front.take_responses(amount) == expected
        held = sum(map(len, (prepared, on_ring, taken, answered, visible)))
        assert front.free() == 4 - held
        assert back.unconsumed_requests() == len(on_ring)
        assert front.unconsumed_responses() == len(visible)


@settings(max_examples=150, deadline=None)
@given(wild=st.integers(0, MASK), published=st.integers(0, 4), consumed=st.integers(0, 4))
def test_req_prod_that_jumps(wild, published, consumed):
    front, back = pair(4, 2**32 - 2)
    for n in range(published):
        front.put_request(message(n))
    front.push_requests()
    done = len(back.take_requests(consumed))
    front.words[REQ_PROD] = wild
    legal = {(back.req_cons + n) & MASK for n in range(4 - done + 1)}
    if wild in legal:
        back.take_requests()
        return
    for operation in (back.take_requests, back.unconsumed_requests, back.final_check_for_requests):
        with pytest.raises(RingError, match=str(wild)) as caught:
            operation()
        assert isinstance(caught.value, PeerError)


@settings(max_examples=150, deadline=None)
@given(wild=st.integers(0, MASK), asked=st.integers(0, 4))
def test_rsp_prod_that_jumps(wild, asked):
    front, _ = pair(4, 2**32 - 2)
    for n in range(asked):
        front.put_request(message(n))
    front.push_requests()
    front.words[RSP_PROD] = wild
    if wild in {(front.rsp_cons + n) & MASK for n in range(asked + 1)}:
        front.take_responses()
        return
    for operation in (front.take_responses, front.unconsumed_responses, front.final_check_for_responses):
        with pytest.raises(RingError, match=str(wild)):
            operation()


def test_a_peer_that_rewrites_our_own_index_does_not_move_us():
    front, back = pair()
    front.words[REQ_PROD] = 3  # as a hostile back would
    front.words[REQ_EVENT] = 1
    front.put_request(message(1))
    assert front.push_requests()
    assert front.words[REQ_PROD] == 1
    assert back.take_requests() == [message(1)]


def test_back_attaches_to_a_ring_in_progress():
    front, back = pair()
    for n in range(3):
        front.put_request(message(n))
    front.push_requests()
    back.take_requests()
    back.put_response(message(0))
    back.push_responses()
    again = BackRing(memoryview(front.words.obj), SLOT)  # the first back died with two unanswered
    assert again.final_check_for_requests()
    assert again.take_requests() == [message(1), message(2)]


def test_release_lets_the_page_go():
    memory = bytearray(4096)
    front, back = FrontRing(memoryview(memory), 112), BackRing(memoryview(memory), 112)
    for end in (front, back):
        end.release()
        end.release()
    memory.clear()


def test_a_read_only_view_is_refused():
    with pytest.raises(UsageError):
        FrontRing(memoryview(bytes(4096)), 112)


def test_without_a_fence_every_push_notifies(monkeypatch):
    front, back = pair()
    front.put_request(message(1))
    front.words[REQ_EVENT] = 3
    assert not front.push_requests()
    monkeypatch.setattr(fence, "FENCED", False)
    front.put_request(message(2))
    front.words[REQ_EVENT] = 9
    assert front.push_requests()
    back.take_requests()
    back.put_response(message(1))
    assert back.push_responses()


def test_nothing_new_nothing_to_notify():
    front, back = pair()
    assert not front.push_requests()
    assert not back.push_responses()


# The hold-off, model-checked: every schedule of a producer and a consumer is walked, one shared access at a
# time. The models are generators; the tests after them hold the real methods to the same order of accesses.


class Traced:
    """`words` that tells of every access."""

    def __init__(self, words, trace):
        self._words, self._trace = words, trace

    def __getitem__(self, index):
        self._trace("load", index)
        return self._words[index]

    def __setitem__(self, index, value):
        self._trace("store", index)
        self._words[index] = value


def producer_steps(prod: int, event: int, batches: list[int]):
    """What `_publish` does, access by access, as `test_publish_is_what_the_model_says` holds it to."""
    old = 0
    for batch in batches:
        new = old + batch
        yield ("store", prod, new)
        seen = yield ("load", event)
        yield ("notify", (new - seen) & MASK < (new - old) & MASK)
        old = new


def consumer_steps(prod: int, event: int, total: int):
    """The loop of a kick handler: take all, final check, sleep until notified."""
    cons = 0
    while cons < total:
        seen = yield ("load", prod)
        if seen != cons:
            cons = seen
            continue
        yield ("store", event, cons + 1)
        seen = yield ("load", prod)
        if seen == cons:
            yield ("sleep",)


def explore(batches: list[int], fenced: bool) -> list[str]:
    """Walk every schedule (with store buffers, as x86 has, unless `fenced`); the first few that got stuck."""
    stuck = []
    total = sum(batches)

    def run(schedule):
        """Replays choices; returns (choices that were possible, stuck?)."""
        memory = {REQ_PROD: 0, REQ_EVENT: 1}
        ends = [producer_steps(REQ_PROD, REQ_EVENT, batches), consumer_steps(REQ_PROD, REQ_EVENT, total)]
        pending = [next(ends[0]), next(ends[1])]
        buffers = [{}, {}]
        pended, asleep = False, False

        def advance(who, value=None):
            try:
                pending[who] = ends[who].send(value)
            except StopIteration:
                pending[who] = None

        options = []
        for depth in range(200):
            options = [who for who in (0, 1) if pending[who] and not (who == 1 and asleep)]
            options += [who + 2 for who in (0, 1) if buffers[who]]
            if not options:
                return [], pending[1] is not None
            if depth == len(schedule):
                return options, False
            choice = schedule[depth]
            if choice >= 2:  # the store buffer drains
                memory.update(buffers[choice - 2])
                buffers[choice - 2] = {}
                continue
            step = pending[choice]
            if step[0] == "store":
                if fenced:
                    memory[step[1]] = step[2]
                else:
                    buffers[choice][step[1]] = step[2]
                advance(choice)
            elif step[0] == "load":
                advance(choice, buffers[choice].get(step[1], memory[step[1]]))
            elif step[0] == "notify":
                if step[1]:
                    pended = True
                    if asleep:
                        asleep = pended = False
                        advance(1)
                advance(choice)
            elif pended:  # sleep, but a notification is there already: a level, not a count
                pended = False
                advance(1)
            else:
                asleep = True
        raise AssertionError("a schedule did not end")

    todo = [()]
    while todo:
        schedule = todo.pop()
        options, is_stuck = run(schedule)
        if is_stuck:
            stuck.append(schedule)
            if len(stuck) > 3:
                break
        todo += [(*schedule, option) for option in options]
    return stuck


@pytest.mark.parametrize("batches", [[1], [2], [1, 1], [2, 1]])
def test_no_schedule_loses_a_wake_up(batches):
    assert explore(batches, fenced=True) == []


def test_without_the_fences_a_wake_up_is_lost():
    assert explore([1], fenced=False)


def accesses(monkeypatch, operate, build):
    """The order of shared accesses and fences in one real method."""
    seen = []
    front, back = build()
    for end in (front, back):
        end.words = Traced(end.words, lambda what, index: seen.append((what, index)))
    monkeypatch.setattr(fence, "full_fence", lambda: seen.append(("fence",)))
    monkeypatch.setattr(fence, "order_fence", lambda: seen.append(("order",)))
    operate(front, back)
    return seen


def test_publish_is_what_the_model_says(monkeypatch):
    def prepared():
        front, back = pair()
        front.put_request(message(1))
        return front, back

    assert accesses(monkeypatch, lambda front, back: front.push_requests(), prepared) == [
        ("order",),
        ("store", REQ_PROD),
        ("fence",),
        ("load", REQ_EVENT),
    ]

    def answered():
        front, back = prepared()
        front.push_requests()
        back.take_requests()
        back.put_response(message(1))
        return front, back

    monkeypatch.undo()
    assert accesses(monkeypatch, lambda front, back: back.push_responses(), answered) == [
        ("order",),
        ("store", RSP_PROD),
        ("fence",),
        ("load", RSP_EVENT),
    ]


def test_final_check_is_what_the_model_says(monkeypatch):
    assert accesses(monkeypatch, lambda front, back: back.final_check_for_requests(), pair) == [
        ("load", REQ_PROD),
        ("store", REQ_EVENT),
        ("fence",),
        ("load", REQ_PROD),
    ]
    monkeypatch.undo()
    assert accesses(monkeypatch, lambda front, back: front.final_check_for_responses(), pair) == [
        ("load", RSP_PROD),
        ("store", RSP_EVENT),
        ("fence",),
        ("load", RSP_PROD),
    ]


def test_final_check_asks_for_the_next_message():
    front, back = pair()
    assert not back.final_check_for_requests()
    front.put_request(message(1))
    assert front.push_requests()
    front.put_request(message(2))
    assert not front.push_requests()  # the back has not gone to sleep since
    assert back.final_check_for_requests()
    back.take_requests()
    assert not back.final_check_for_requests()
    front.put_request(message(3))
    assert front.push_requests()


def test_a_claimed_slot_is_the_next_one_and_is_published_by_push():
    view = memoryview(bytearray(4096))
    front, back = FrontRing(view, 112), BackRing(view, 112)
    front.init()
    for n in range(front.size):
        at = front.claim_request()
        assert at == n * 112
        front.slots[at] = n
    with pytest.raises(RingFull):
        front.claim_request()
    assert back.unconsumed_requests() == 0
    front.push_requests()
    assert [raw[0] for raw in back.take_requests()] == list(range(front.size))


def test_final_check_can_ask_for_several_responses_together():
    front, back = pair()
    for n in range(4):
        front.put_request(message(n))
    front.push_requests()
    back.take_requests()
    assert not front.final_check_for_responses(3)
    for n in range(2):
        back.put_response(message(n))
        assert not back.push_responses()
    assert not front.final_check_for_responses(3)
    back.put_response(message(2))
    assert back.push_responses()
    assert front.final_check_for_responses(3)
