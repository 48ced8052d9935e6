"""States: names, the strict parser, which moves are usual, who waits for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.bus import Side, XenbusState, parse_state, strstate, usual_move
from xenbus.bus.state import USUAL_MOVES, WAITS_FOR, owed_by
from xenbus.errors import PeerError

S = XenbusState


def test_numbers_are_those_of_the_header():
    """xen/include/public/io/xenbus.h"""
    assert [state.name for state in sorted(S)] == [
        "UNKNOWN", "INITIALISING", "INIT_WAIT", "INITIALISED", "CONNECTED", "CLOSING", "CLOSED",
        "RECONFIGURING", "RECONFIGURED",
    ]  # fmt: skip


@given(st.one_of(st.binary(max_size=4), st.text("0123456789- x٤", max_size=4)))
def test_nothing_but_the_nine_digits_is_a_state(value):
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    if raw in {b"%d" % n for n in range(9)}:
        assert parse_state(value) == int(raw)
    else:
        with pytest.raises(PeerError):
            parse_state(value)


def test_every_state_can_be_closed_and_no_move_is_to_the_unknown():
    for old in S:
        assert usual_move(old, old) and S.UNKNOWN not in USUAL_MOVES[old]
        assert old is S.CLOSED or usual_move(old, S.CLOSED)
        assert strstate(old) != "INVALID"
    assert not usual_move(S.CLOSING, S.CONNECTED)
    assert strstate(42) == "INVALID"


def test_what_a_half_waits_for_is_what_its_peer_can_say():
    assert Side.FRONT.peer is Side.BACK and Side.BACK.peer is Side.FRONT
    for (_side, state), wanted in WAITS_FOR.items():
        assert wanted and state not in wanted - {S.CLOSING}


def test_who_owes_the_next_move_by_states_alone():
    def owed(side: Side, own: S, peer: S) -> str:
        return owed_by(side, own, peer, "/peer", 7)

    first = {S.INITIALISING: "INIT_WAIT", S.INITIALISED: "CONNECTED", S.CLOSING: "CLOSING"}
    for own, wanted in first.items():
        text = f"waits for backend /peer (domain 7, UNKNOWN) to reach {wanted}"
        assert owed(Side.FRONT, own, S.UNKNOWN) == text
    for (side, own), states in WAITS_FOR.items():
        for peer in states:
            assert owed(side, own, peer) == f"waits for its own driver: {side.peer.value} is {peer.name}"
    for side in Side:
        assert owed(side, S.CONNECTED, S.CONNECTED) == owed(side, S.CLOSED, S.UNKNOWN) == ""
        assert owed(side, S.RECONFIGURING, S.CONNECTED) == "waits for its driver"
