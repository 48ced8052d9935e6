"""What the store tells of a split device, judged: who owes the next move, and what else is odd about it.

Pure: knows values of nodes, no store. The tables at the end are in the order in which they are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xenbus.bus.state import Side, XenbusState, owed_by, parse_state, strstate
from xenbus.errors import PeerError

_S = XenbusState
_SHUT = (_S.CLOSING, _S.CLOSED)
_WORDS = {Side.FRONT: "front end", Side.BACK: "back end"}
# The node of one half that leads to the other (io/xenbus.h; xenbus_dev_probe reads the same).
PEER_KEYS = {Side.FRONT: ("backend", "backend-id"), Side.BACK: ("frontend", "frontend-id")}


@dataclass(slots=True)
class Half:
    """One directory of a device. Values are escaped for terminals already.

    path:       absolute, "" if nobody says where it is
    domid:      whose domain it is, -1 if nobody says
    domain:     that domain's name, "" if it may not be read, None if the domain is gone
    type, name: its type on its own bus, and what Linux calls it there (`vbd-51712`, `vbd-1-51712`)
    values:     of the nodes that could be read; `error` is what its driver left in its error node
    unreadable: the keys whose nodes the store refused us for another reason than that they are not there
    there:      whether the directory is; None if that can't be known
    """

    path: str = ""
    domid: int = -1
    domain: str | None = ""
    type: str = ""
    name: str = ""
    values: dict[str, str] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()
    there: bool | None = True

    @property
    def state(self) -> XenbusState:
        """UNKNOWN if it has none, or one that is none."""
        try:
            return parse_state(self.values["state"])
        except (KeyError, PeerError):
            return _S.UNKNOWN

    @property
    def where(self) -> str:
        """Its domain, for people."""
        return self.domain or f"domain {self.domid}"


@dataclass(slots=True)
class Seen:
    """One device as it stands on one domain's bus: its own half, and the other as far as it is known."""

    side: Side
    own: Half
    peer: Half

    @property
    def front(self) -> Half:
        return self.own if self.side is Side.FRONT else self.peer

    @property
    def back(self) -> Half:
        return self.peer if self.side is Side.FRONT else self.own

    @property
    def peer_word(self) -> str:
        return _WORDS[self.side.peer]


def _no_peer(seen: Seen) -> str | None:
    if seen.peer.path:
        return None
    key = PEER_KEYS[seen.side][0]
    named = seen.own.values.get(key)
    what = f"{key} is {named!r}, which is no {seen.peer_word}" if named else f"no {key} node"
    return f"{what}: whoever made the device has to name its {seen.peer_word}"


def _domain_gone(seen: Seen) -> str | None:
    if seen.peer.domain is not None:
        return None
    return f"the domain of its {seen.peer_word} ({seen.peer.domid}) is gone: the toolstack has to remove this"


def _primary_console(seen: Seen) -> str | None:
    """xenconsoled serves /local/domain/N/console: both halves' states stay as the toolstack wrote them."""
    return "" if seen.front.path.endswith("/console") and seen.back.type == "console" else None


def _peer_not_there(seen: Seen) -> str | None:
    if seen.peer.there is not False:
        return None
    return f"the directory of its {seen.peer_word} {seen.peer.path} is not there: the toolstack has to act"


def _no_state(seen: Seen) -> str | None:
    if "state" in seen.own.values or "state" in seen.own.unreadable:
        return None
    return "no state node: whoever made the device has to write it"


def _unreadable(seen: Seen) -> str | None:
    for half in (seen.own, seen.peer):
        if "state" in half.unreadable:
            return f"unknown: {half.path}/state is not ours to read"
    return None


def _gave_up(seen: Seen) -> str | None:
    """A driver that fails writes its error node and closes (xenbus_dev_fatal)."""
    for half, word in ((seen.own, "this end"), (seen.peer, f"its {seen.peer_word}")):
        if half.state in _SHUT and (error := half.values.get("error")):
            return f"{word} gave up: {error}"
    return None


def _hotplug(seen: Seen) -> str | None:
    """The script that a toolstack runs for a back end says how it went (xen-hotplug-common.sh)."""
    values, state = seen.back.values, seen.back.state
    if state in (_S.CONNECTED, *_SHUT):
        return None
    if error := values.get("hotplug-error"):
        return f"the back end's hotplug script failed: {error}"
    status = values.get("hotplug-status")
    if status not in (None, "", "connected"):
        return f"the back end's hotplug script says {status!r}"
    if status is None and values.get("script") and seen.front.state in (_S.INITIALISED, _S.CONNECTED):
        return f"waits for the back end's hotplug script {values['script']}: no hotplug-status yet"
    return None


def _not_served(seen: Seen) -> str | None:
    back = seen.back
    if back.state is not _S.INITIALISING or seen.front.state in _SHUT:
        return None
    return f"nobody serves {back.path}: no driver for back ends of type {back.type} runs in {back.where}"


def _not_begun(seen: Seen) -> str | None:
    front = seen.front
    if front.state is not _S.INITIALISING or seen.back.state is not _S.INIT_WAIT:
        return None
    return f"waits for {front.where}: no front end driver for {front.type} in the guest, or it is not loaded"


def _half_open(seen: Seen) -> str | None:
    """One end is Connected and the other is not (any more), of which WAITS_FOR knows nothing."""
    own, peer = seen.own.state, seen.peer.state
    if own is _S.CONNECTED and peer in _SHUT:
        return f"its own driver has to close: the {seen.peer_word} is {strstate(peer)}"
    if own is _S.CONNECTED and peer in (_S.INITIALISING, _S.INIT_WAIT, _S.INITIALISED):
        return f"waits for the {seen.peer_word} in {seen.peer.where} to go from {strstate(peer)} to Connected"
    if own is _S.CLOSED and peer in (_S.CONNECTED, _S.CLOSING):
        return f"waits for the {seen.peer_word} in {seen.peer.where} to go from {strstate(peer)} to Closed"
    return None


def _by_states(seen: Seen) -> str | None:
    peer = seen.peer
    return owed_by(seen.side, seen.own.state, peer.state, peer.path, peer.domid)


# The first that answers is right; "" is the answer that nobody owes anything.
_WAITS: tuple[Callable[[Seen], str | None], ...] = (
    _no_peer,
    _domain_gone,
    _primary_console,
    _no_state,
    _peer_not_there,
    _unreadable,
    _gave_up,
    _hotplug,
    _not_served,
    _not_begun,
    _half_open,
    _by_states,
)


def waits(seen: Seen) -> str:
    """Who owes the next move, and why: "" if nobody does."""
    return next(answer for case in _WAITS if (answer := case(seen)) is not None)


# ---- what is worth a line, whoever owes what ----


def _garbage(seen: Seen) -> str:
    text = seen.own.values.get("state")
    return f"state is {text!r}, which is none" if text is not None and seen.own.state is _S.UNKNOWN else ""


def _peer_garbage(seen: Seen) -> str:
    text = seen.peer.values.get("state")
    if text is None or seen.peer.state is not _S.UNKNOWN:
        return ""
    return f"the {seen.peer_word}'s state is {text!r}, which is none"


def _error(seen: Seen) -> str:
    text = seen.own.values.get("error")
    return f"error: {text}" if text else ""


def _peer_error(seen: Seen) -> str:
    text = seen.peer.values.get("error")
    return f"error of the {seen.peer_word}: {text}" if text else ""


def _offline(seen: Seen) -> str:
    if seen.back.values.get("online") != "0":
        return ""
    if seen.back.state is _S.CLOSED:
        return "online is 0 and the back end is Closed: the toolstack may remove the device"
    return "online is 0: the toolstack wants the device gone"


def _hotplug_error(seen: Seen) -> str:
    text = seen.back.values.get("hotplug-error")
    return f"hotplug-error: {text}" if text else ""


def _other_domid(seen: Seen) -> str:
    key = PEER_KEYS[seen.side][1]
    text = seen.own.values.get(key)
    if not seen.peer.path or text == str(seen.peer.domid):
        return ""
    return f"{key} is {text!r}, but the path is of domain {seen.peer.domid}" if text else f"no {key} node"


def _other_partner(seen: Seen) -> str:
    """The other half belongs to somebody else, or to nobody."""
    key = PEER_KEYS[seen.side.peer][0]
    text = seen.peer.values.get(key)
    if not text or text == seen.own.path:
        return ""
    return f"its {seen.peer_word} names another {_WORDS[seen.side]}: {text}"


_NOTES = (
    _garbage,
    _peer_garbage,
    _error,
    _peer_error,
    _hotplug_error,
    _offline,
    _other_domid,
    _other_partner,
)


def notes(seen: Seen) -> list[str]:
    """A sentence each."""
    return [text for case in _NOTES if (text := case(seen))]
