"""The ring whose answers are made in a log: what is on it when, and what of a former process's it takes over.

Deaths between any two stores are in tests/drivers/net/test_killed.py, with real packets.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import UsageError
from xenbus.ring.answers import AnswerLog, AnswerRing, answer_log_size
from xenbus.ring.journal import JournalError
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

SLOTS, SLOT = 4, 6


class Pair:
    def __init__(self, start: int = 0) -> None:
        self.memory = memoryview(bytearray(HEADER_SIZE + SLOTS * SLOT))
        self.log = AnswerLog(memoryview(bytearray(answer_log_size(SLOTS, SLOT))))
        self.front = FrontRing(self.memory, SLOT)
        self.front.init()
        self.front.words[REQ_PROD] = self.front.words[RSP_PROD] = start
        self.front.words[REQ_EVENT] = self.front.words[RSP_EVENT] = start + 1 & MASK
        self.front.req_prod_pvt = self.front.rsp_cons = self.front._published = start
        self.back = AnswerRing(self.memory, SLOT, self.log)

    def ask(self, *what: bytes) -> None:
        for each in what:
            self.front.put_request(each.ljust(SLOT))
        self.front.push_requests()

    def answer(self, *what: bytes) -> None:
        at = self.back.claim_answers(len(what))
        for each in what:
            self.back.answers[at : at + SLOT] = each.ljust(SLOT)
            at += SLOT

    def resume(self) -> None:
        self.back = AnswerRing(self.memory, SLOT, self.log, resumes=True)


def cut(*raws: bytes) -> list[bytes]:
    return [raw.rstrip() for raw in raws]


@pytest.mark.parametrize("start", [0, 2, 3, MASK - 1])
def test_requests_stand_on_the_ring_until_their_answers_are_pushed(start):
    pair = Pair(start)
    pair.ask(b"a", b"b", b"c", b"d")
    assert cut(*pair.back.take_requests()) == [b"a", b"b", b"c", b"d"]
    before = bytes(pair.back.slots)
    pair.answer(b"A")
    pair.answer(b"B", b"C")
    assert bytes(pair.back.slots) == before
    pair.resume()
    assert cut(*pair.back.take_requests()) == [b"a", b"b", b"c", b"d"]
    pair.answer(b"A")
    pair.answer(b"B", b"C")
    assert pair.back.push_responses()
    assert not pair.back.push_responses()
    assert cut(*pair.front.take_responses()) == [b"A", b"B", b"C"]
    pair.ask(b"e")
    pair.resume()
    assert cut(*pair.back.take_requests()) == [b"d", b"e"]
    pair.answer(b"D", b"E")
    pair.back.push_responses()
    assert cut(*pair.front.take_responses()) == [b"D", b"E"]


@pytest.mark.parametrize("start", [0, 3, MASK - 1])
def test_answers_that_were_made_are_pushed_by_the_next(start):
    pair = Pair(start)
    pair.ask(b"a", b"b", b"c")
    pair.back.take_requests()
    pair.answer(b"A", b"B", b"C")
    pair.log.span[0] = start << 32 | start + 3 & MASK
    for torn in (b"?" * 9, b""):  # the second one finds them pushed
        pair.back.slots[: len(torn)] = torn
        pair.resume()
    assert cut(*pair.front.take_responses()) == [b"A", b"B", b"C"]
    pair.ask(b"d")
    assert cut(*pair.back.take_requests()) == [b"d"]


def test_a_request_each():
    pair = Pair()
    pair.ask(b"a", b"b")
    pair.back.take_requests()
    assert pair.back.claim_answers(2) == 0
    with pytest.raises(UsageError, match="without a request"):
        pair.back.claim_answers(1)


def test_a_log_that_is_too_small():
    with pytest.raises(JournalError, match="4 slots of 6"):
        AnswerRing(Pair().memory, SLOT, AnswerLog(memoryview(bytearray(answer_log_size(2, SLOT)))))


@pytest.mark.parametrize(("start", "end"), [(0, 0), (4, 6), (6, 4), (5, 10), (MASK, 3)])
def test_a_log_of_another_ring(start, end):
    pair = Pair(5)
    pair.ask(b"a", b"b", b"c")
    pair.log.span[0] = start << 32 | end
    before = bytes(pair.memory)
    with pytest.raises(JournalError, match="rsp_prod 5 does not fit"):
        pair.resume()
    assert bytes(pair.memory) == before


@given(st.integers(0, 8) | st.integers(0, MASK), st.integers(0, 8) | st.integers(0, MASK), st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_whatever_stands_there_it_is_refused_or_bounded(start, end, rsp_prod):
    pair = Pair()
    pair.ask(b"a", b"b", b"c", b"d")
    pair.log.span[0] = start << 32 | end
    pair.front.words[RSP_PROD] = rsp_prod
    try:
        pair.resume()
        assert len(pair.back.take_requests()) <= SLOTS
        assert pair.back.rsp_prod_pvt == end and (end - rsp_prod) & MASK <= SLOTS
    except (JournalError, RingError):
        pass


def test_release_lets_go_of_the_log():
    memory = memoryview(bytearray(answer_log_size(SLOTS, SLOT)))
    log = AnswerLog(memory)
    log.release()
    log.release()
    with pytest.raises(ValueError, match="released"):
        log.answers[0]
    assert struct.unpack_from("<Q", memory) == (0,)
