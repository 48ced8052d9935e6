"""What a front published of its rings, read and checked: the queues, their refs and ports, what it takes.

Pure: bytes by key in, values or PeerError out. Knows the names of netif.h; knows no store and no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xenbus.drivers.net import netif, offers
from xenbus.drivers.net.netif import MULTICAST_KEY, NUM_QUEUES_KEY, RX_COPY_KEY
from xenbus.errors import PeerError

RX_NOTIFY: Final = "feature-rx-notify"
# What is read first: the names of all the rest follow from it.
HEAD: Final = (NUM_QUEUES_KEY, RX_COPY_KEY, RX_NOTIFY, MULTICAST_KEY, *offers.KEYS)
_REFS: Final = ("tx-ring-ref", "rx-ring-ref")
_SPLIT: Final = ("event-channel-tx", "event-channel-rx")
_ONE: Final = "event-channel"

Said = Mapping[str, bytes | None]  # None: not there


@dataclass(slots=True, frozen=True)
class QueueKeys:
    """Of one queue: the refs of its two rings, and its ports: of both rings, or one for each."""

    tx_ref: int
    rx_ref: int
    ports: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Parameters:
    """Of one connection. rx_notify: it kicks us when it posts pages; takes: its offer, by key, as text"""

    queues: tuple[QueueKeys, ...]
    rx_notify: bool
    takes: tuple[tuple[str, str | None], ...]


@dataclass(slots=True, frozen=True)
class Shape:
    """How many queues, which says what the keys of the rest are called. path: the front's node"""

    path: str
    queues: int
    rx_notify: bool
    takes: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, path: str, said: Said, max_queues: int) -> Shape:
        """From the values of HEAD. PeerError that names the key, and what it may be."""
        queues = _number(path, NUM_QUEUES_KEY, said[NUM_QUEUES_KEY], 1)
        if not 1 <= queues <= max_queues:
            raise PeerError(f"{path}/{NUM_QUEUES_KEY}: {queues}, 1 to {max_queues} it can be")
        if not _number(path, RX_COPY_KEY, said[RX_COPY_KEY], 0):
            raise PeerError(f"{path}/{RX_COPY_KEY} is not 1: page flipping is not served")
        takes = tuple([(key, _text(said[key])) for key in offers.KEYS])
        return cls(path, queues, bool(_number(path, RX_NOTIFY, said[RX_NOTIFY], 0)), takes)

    def _folder(self, queue: int) -> str:
        """Before the keys of a queue: with one queue they stand in the node itself."""
        return f"queue-{queue}/" if self.queues > 1 else ""

    def keys(self) -> list[str]:
        """What `parameters` must be given."""
        names = (*_REFS, *_SPLIT, _ONE)
        return [self._folder(queue) + name for queue in range(self.queues) for name in names]

    def parameters(self, said: Said) -> Parameters:
        """From the values of `keys`. PeerError that names the first key that is missing or makes no sense."""
        refs: dict[int, str] = {}
        ports: dict[int, str] = {}
        queues = []
        for queue in range(self.queues):
            folder = self._folder(queue)
            tx_ref, rx_ref = [self._once(said, folder + name, refs, "grant reference") for name in _REFS]
            # As netback: the pair if both are there, otherwise the one.
            names = _SPLIT if all(said[folder + name] is not None for name in _SPLIT) else (_ONE,)
            found = tuple([self._once(said, folder + name, ports, "port") for name in names])
            queues.append(QueueKeys(tx_ref, rx_ref, found))
        return Parameters(tuple(queues), self.rx_notify, self.takes)

    def _once(self, said: Said, key: str, seen: dict[int, str], what: str) -> int:
        """A number that no other key has."""
        raw = said[key]
        if raw is None:
            raise PeerError(f"{self.path}/{key} is missing")
        value = _number(self.path, key, raw, 0)
        if value in seen:
            raise PeerError(f"{self.path}/{key}: {what} {value} is that of {seen[value]} already")
        seen[value] = key
        return value


def _number(path: str, key: str, raw: bytes | None, default: int) -> int:
    if raw is None:
        return default
    try:
        return netif.number(raw)
    except ValueError as error:
        raise PeerError(f"{path}/{key}: {error}") from None


def _text(raw: bytes | None) -> str | None:
    return raw.decode("utf-8", "surrogateescape") if raw is not None else None
