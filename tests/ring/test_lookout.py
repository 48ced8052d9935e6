"""Looking at an index: seen at once, seen while looking, given up where it does not pay."""

from __future__ import annotations

import os

import pytest

from xenbus.ring import lookout
from xenbus.ring.lookout import CREDIT, PAUSE, TURNS, Lookout


class Words:
    """A word that counts how often it is read, and moves at the reads that are said."""

    def __init__(self) -> None:
        self.reads = 0
        self.moves_at: set[int] = set()
        self.value = 7

    def __getitem__(self, index: int) -> int:
        assert index == 2
        self.reads += 1
        if self.reads in self.moves_at:
            self.value += 1
        return self.value


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_what_moved_is_seen_at_once_and_what_moves_while_we_look():
    words = Words()
    look = Lookout(words, 2)
    assert look.moved(6) and words.reads == 1
    words.moves_at = {50}
    assert look.moved(7) and words.reads == 50


def test_it_is_bounded():
    words = Words()
    assert not Lookout(words, 2).moved(7)
    assert words.reads == TURNS


def test_looking_in_vain_ends_and_is_tried_again_now_and_then():
    words = Words()
    look = Lookout(words, 2)
    for _ in range(2 * CREDIT):
        assert look.moved(0)
    words.reads = 0
    for _ in range(CREDIT + PAUSE):
        assert not look.moved(7)
    assert words.reads == CREDIT * TURNS
    assert look.moved(0)  # tried again, and it pays: it goes on
    for _ in range(2):
        assert not look.moved(7)
    assert words.reads == (CREDIT + 2) * TURNS + 1
    for _ in range(PAUSE):
        assert not look.moved(0)  # False says nothing
    assert look.moved(0)


def test_one_cpu_is_not_spent_on_looking(monkeypatch):
    monkeypatch.setattr(lookout.os, "cpu_count", lambda: 1)
    words = Words()
    look = Lookout(words, 2)
    for _ in range(2 * PAUSE):
        assert not look.moved(0)
    assert not words.reads
