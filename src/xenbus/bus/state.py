"""XenbusState: what a device's `state` node may hold, read strictly, and which moves are usual.

Pure: tables and a parser. Knows no store and no device.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from xenbus.errors import PeerError


class XenbusState(IntEnum):
    """xen/include/public/io/xenbus.h, enum xenbus_state. Its number is what `state` holds."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


class Side(Enum):
    """Which half of a split device. The value is the half's own name in its peer's node."""

    FRONT = "frontend"
    BACK = "backend"

    @property
    def peer(self) -> Side:
        return Side.BACK if self is Side.FRONT else Side.FRONT


_S = XenbusState

_NAMES = {
    _S.UNKNOWN: "Unknown",
    _S.INITIALISING: "Initialising",
    _S.INIT_WAIT: "InitWait",
    _S.INITIALISED: "Initialised",
    _S.CONNECTED: "Connected",
    _S.CLOSING: "Closing",
    _S.CLOSED: "Closed",
    _S.RECONFIGURING: "Reconfiguring",
    _S.RECONFIGURED: "Reconfigured",
}

_BY_TEXT = {str(int(state)).encode(): state for state in XenbusState}


def parse_state(value: bytes | str) -> XenbusState:
    """One decimal digit that names a state, and nothing else (B14). PeerError otherwise."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)
    state = _BY_TEXT.get(raw)
    if state is None:
        raise PeerError(f"{raw[:32]!r} is not a XenbusState")
    return state


def strstate(state: int) -> str:
    """The name as FreeBSD's xenbus_strstate gives it ("InitWait"); "INVALID" for what is no state."""
    return _NAMES[XenbusState(state)] if state in _NAMES else "INVALID"


# The moves that io/xenbus.h's description of the states and the drivers in use make. Another one is no error
# (a toolstack may write any state into any node), but it is counted, and the tree shows it.
_CLOSE = frozenset({_S.CLOSING, _S.CLOSED})
USUAL_MOVES: dict[XenbusState, frozenset[XenbusState]] = {
    _S.UNKNOWN: frozenset({_S.INITIALISING, *_CLOSE}),
    _S.INITIALISING: frozenset({_S.INIT_WAIT, _S.INITIALISED, _S.CONNECTED, *_CLOSE}),
    _S.INIT_WAIT: frozenset({_S.INITIALISED, _S.CONNECTED, *_CLOSE}),
    _S.INITIALISED: frozenset({_S.CONNECTED, *_CLOSE}),
    _S.CONNECTED: frozenset({_S.RECONFIGURING, *_CLOSE}),
    _S.CLOSING: frozenset({_S.CLOSED}),
    _S.CLOSED: frozenset({_S.INITIALISING, _S.INIT_WAIT}),
    _S.RECONFIGURING: frozenset({_S.RECONFIGURED, *_CLOSE}),
    _S.RECONFIGURED: frozenset({_S.CONNECTED, _S.RECONFIGURING, *_CLOSE}),
}


def usual_move(old: XenbusState, new: XenbusState) -> bool:
    """Whether a half goes from `old` to `new` in an ordinary handshake (staying counts)."""
    return old is new or new in USUAL_MOVES[old]


# Which states of its peer let a half that stands in a state move on: who owes the next move otherwise.
WAITS_FOR: dict[tuple[Side, XenbusState], frozenset[XenbusState]] = {
    (Side.FRONT, _S.INITIALISING): frozenset({_S.INIT_WAIT, _S.INITIALISED, _S.CONNECTED}),
    (Side.FRONT, _S.INITIALISED): frozenset({_S.CONNECTED}),
    (Side.FRONT, _S.CLOSING): frozenset({_S.CLOSING, _S.CLOSED}),
    (Side.BACK, _S.INIT_WAIT): frozenset({_S.INITIALISED, _S.CONNECTED}),
    (Side.BACK, _S.INITIALISED): frozenset({_S.CONNECTED}),
    (Side.BACK, _S.CLOSING): frozenset({_S.CLOSED}),
}


def owed_by(side: Side, state: XenbusState, peer_state: XenbusState, peer_path: str, peer_domid: int) -> str:
    """Who owes the next move of a half that stands in `state`, for people: "" if nobody does."""
    wanted = WAITS_FOR.get((side, state))
    if wanted is None:
        return "" if state in (_S.CONNECTED, _S.CLOSED) else "waits for its driver"
    if peer_state in wanted:
        return f"waits for its own driver: {side.peer.value} is {peer_state.name}"
    first = min(wanted)
    if side is Side.FRONT and state is _S.INITIALISING:
        first = _S.INIT_WAIT
    return (
        f"waits for {side.peer.value} {peer_path} (domain {peer_domid}, {peer_state.name}) "
        f"to reach {first.name}"
    )
