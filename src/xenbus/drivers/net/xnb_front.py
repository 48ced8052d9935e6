"""What a front published of its rings, read and checked: the queues, their refs and ports, what it takes.

Pure: bytes by key in, values or PeerError out. Knows the names of netif.h; knows no store and no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from xenbus.drivers.net import offers
from xenbus.drivers.net.netif import MULTICAST_KEY, NUM_QUEUES_KEY, RX_COPY_KEY
from xenbus.drivers.nodes import Names, Said, number_of, queue_folder, text
from xenbus.errors import PeerError

RX_NOTIFY: Final = "feature-rx-notify"
# What is read first: the names of all the rest follow from it.
HEAD: Final = (NUM_QUEUES_KEY, RX_COPY_KEY, RX_NOTIFY, MULTICAST_KEY, *offers.KEYS)
_REFS: Final = ("tx-ring-ref", "rx-ring-ref")
_SPLIT: Final = ("event-channel-tx", "event-channel-rx")
_ONE: Final = "event-channel"


@dataclass(slots=True, frozen=True)
class QueueKeys:
    """Of one queue: the refs of its two rings, and its ports: of both rings, or one for each."""

    tx_ref: int
    rx_ref: int
    ports: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Parameters:
    """Of one connection. rx_notify: it kicks us when it posts pages; takes: its offer, by key, as text;
    multicast: whether its filter was on, which it may switch in the middle"""

    queues: tuple[QueueKeys, ...]
    rx_notify: bool
    takes: tuple[tuple[str, str | None], ...]
    multicast: bool = field(compare=False)


@dataclass(slots=True, frozen=True)
class Shape:
    """How many queues, which says what the keys of the rest are called. path: the front's node"""

    path: str
    queues: int
    rx_notify: bool
    takes: tuple[tuple[str, str | None], ...]
    multicast: bool

    @classmethod
    def of(cls, path: str, said: Said, max_queues: int) -> Shape:
        """From the values of HEAD. PeerError that names the key, and what it may be."""
        queues = number_of(path, NUM_QUEUES_KEY, said, 1)
        if not 1 <= queues <= max_queues:
            raise PeerError(f"{path}/{NUM_QUEUES_KEY}: {queues}, 1 to {max_queues} it can be")
        if not number_of(path, RX_COPY_KEY, said, 0):
            raise PeerError(f"{path}/{RX_COPY_KEY} is not 1: page flipping is not served")
        takes = tuple([(key, text(raw) if (raw := said[key]) is not None else None) for key in offers.KEYS])
        rx_notify = bool(number_of(path, RX_NOTIFY, said, 0))
        return cls(path, queues, rx_notify, takes, said[MULTICAST_KEY] == b"1")

    def keys(self) -> list[str]:
        """What `parameters` must be given."""
        names = (*_REFS, *_SPLIT, _ONE)
        return [queue_folder(self.queues, queue) + name for queue in range(self.queues) for name in names]

    def parameters(self, said: Said) -> Parameters:
        """From the values of `keys`. PeerError that names the first key that is missing or makes no sense."""
        grants, ports = Names(self.path, "grant reference"), Names(self.path, "port")
        queues = []
        for queue in range(self.queues):
            folder = queue_folder(self.queues, queue)
            tx_ref, rx_ref = [grants.take(said, folder + name) for name in _REFS]
            # As netback: the pair if both are there, otherwise the one.
            names = _SPLIT if all(said[folder + name] is not None for name in _SPLIT) else (_ONE,)
            found = tuple([ports.take(said, folder + name) for name in names])
            queues.append(QueueKeys(tx_ref, rx_ref, found))
        return Parameters(tuple(queues), self.rx_notify, self.takes, self.multicast)
