"""Feature negotiation: both ends declare, the result with its reasons is one value.

Pure. Knows no store: a driver reads the peer's keys and writes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from xenbus.errors import UsageError

Value = int | str


class Merge(Enum):
    """How two offers become one value."""

    BOTH = "both"  # a flag: 1 if both say so
    LEAST = "least"  # a number: the smaller one; an end that is silent has the default
    EITHER = "either"  # a flag: 1 if one says so
    PEER = "peer"  # what the peer says; the default if it is silent


_MERGE: dict[Merge, Callable[[Value, Value], Value]] = {
    Merge.BOTH: lambda ours, theirs: int(bool(ours) and bool(theirs)),
    Merge.LEAST: lambda ours, theirs: min(int(ours), int(theirs)),
    Merge.EITHER: lambda ours, theirs: int(bool(ours) or bool(theirs)),
    Merge.PEER: lambda ours, theirs: theirs,
}


@dataclass(slots=True, frozen=True)
class Feature:
    """One thing both ends may or may not do.

    name:    the driver's name for it; `key` is our node's key, `peer_key` the peer's (both `name` if unset)
    default: what an end that says nothing means
    least:   a peer's number below this, and `most` above, counts as silence (and the reason says so)
    """

    name: str
    merge: Merge = Merge.BOTH
    default: Value = 0
    key: str = ""
    peer_key: str = ""
    least: int | None = None
    most: int | None = None


@dataclass(slots=True, frozen=True)
class Outcome:
    """What was agreed on one feature, and why."""

    value: Value
    reason: str


class Negotiated:
    """The agreement of one connection: `agreed["persistent"]` is the value, `agreed.why(...)` the reason."""

    __slots__ = ("_outcomes",)

    def __init__(self, outcomes: Mapping[str, Outcome]) -> None:
        self._outcomes = dict(outcomes)

    def __getitem__(self, name: str) -> Value:
        return self._outcomes[name].value

    def number(self, name: str) -> int:
        """The value as a number: flags and sizes."""
        return int(self[name])

    def why(self, name: str) -> str:
        return self._outcomes[name].reason

    def __iter__(self) -> Iterator[str]:
        return iter(self._outcomes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Negotiated) and self._outcomes == other._outcomes

    def __hash__(self) -> int:
        return hash(tuple(self._outcomes.items()))

    def as_dict(self) -> dict[str, dict[str, Value]]:
        """For JSON: name -> value and reason."""
        return {name: {"value": o.value, "reason": o.reason} for name, o in self._outcomes.items()}

    def __str__(self) -> str:
        """`persistent=1 ring-pages=4`: what the sysctl leaf `features` shows."""
        return " ".join(f"{name}={outcome.value}" for name, outcome in self._outcomes.items())

    def __repr__(self) -> str:
        return f"<Negotiated {self}>"


def negotiate(
    features: Iterable[Feature], ours: Mapping[str, Value], theirs: Mapping[str, str | None]
) -> Negotiated:
    """`ours` by feature name (missing: the default); `theirs` by peer key, as read (None or missing: silent).

    A peer's value that is no number where one belongs, or is out of range, is silence: the default holds and
    the reason says what it sent. UsageError if our own offer is out of range.
    """
    return Negotiated({f.name: _settle(f, ours, theirs) for f in features})


def _settle(feature: Feature, ours: Mapping[str, Value], theirs: Mapping[str, str | None]) -> Outcome:
    mine = ours.get(feature.name, feature.default)
    if isinstance(mine, int) and not _in_range(feature, mine):
        raise UsageError(f"our {feature.name}={mine} is out of its own range")
    raw = theirs.get(feature.peer_key or feature.key or feature.name)
    peer, said = _peer_value(feature, raw)
    value = _MERGE[feature.merge](mine, peer)
    offered = f"{mine}" if feature.name in ours else f"{mine} (default)"
    return Outcome(value, f"{feature.merge.value} of ours {offered} and the peer's {said}")


def _peer_value(feature: Feature, raw: str | None) -> tuple[Value, str]:
    if raw is None:
        return feature.default, f"silence, so {feature.default}"
    if isinstance(feature.default, str):
        return raw, repr(raw)
    if not (raw.isascii() and raw.isdecimal() and len(raw) <= 10):
        return feature.default, f"{raw[:32]!r}, which is no number, so {feature.default}"
    if not _in_range(feature, int(raw)):
        return feature.default, f"{raw}, which is out of range, so {feature.default}"
    return int(raw), raw


def _in_range(feature: Feature, value: int) -> bool:
    return (feature.least is None or value >= feature.least) and (
        feature.most is None or value <= feature.most
    )
