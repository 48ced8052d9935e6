"""What a front published of its rings, read and checked: how many queues, their refs and ports, the layout.

Pure: bytes by key in, values or PeerError out. Knows the names of blkif.h's "Request Transport Parameters"
and "Multiple hardware queues/rings"; knows no store and no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xenbus.drivers.block import blkif
from xenbus.drivers.nodes import Names, Said, number_of, queue_folder
from xenbus.errors import PeerError

NUM_QUEUES: Final = "multi-queue-num-queues"
ORDER: Final = "ring-page-order"
PAGES: Final = "num-ring-pages"
# What is read first: the names of all the rest follow from it.
HEAD: Final = (NUM_QUEUES, ORDER, PAGES, "protocol", "feature-persistent")


@dataclass(slots=True, frozen=True)
class QueueKeys:
    """Of one queue: the ring's refs in order, and the port."""

    refs: tuple[int, ...]
    port: int


@dataclass(slots=True, frozen=True)
class Parameters:
    """Of one connection: its queues, how slots are laid out, whether the front uses its grants again."""

    queues: tuple[QueueKeys, ...]
    abi: blkif.Abi
    persistent: bool


@dataclass(slots=True, frozen=True)
class Shape:
    """How many queues of how large a ring, which says what the keys of the rest are called.

    path: the front's node, for messages
    either: one page, and the order said so: then its ref may be in `ring-ref0`, where Linux's blkback
            looks for it
    """

    path: str
    queues: int
    order: int
    either: bool
    abi: blkif.Abi
    persistent: bool

    @classmethod
    def of(cls, path: str, said: Said, max_queues: int, max_order: int) -> Shape:
        """From the values of HEAD. PeerError that names the key, and what it may be."""
        queues = number_of(path, NUM_QUEUES, said, 1)
        if not 1 <= queues <= max_queues:
            raise PeerError(f"{path}/{NUM_QUEUES}: {queues}, 1 to {max_queues} it can be")
        key, order = ORDER, number_of(path, ORDER, said, 0)
        if said[ORDER] is None and said[PAGES] is not None:  # the older scheme alone (note 3)
            key, pages = PAGES, number_of(path, PAGES, said, 1)
            order = pages.bit_length() - 1
            if not pages or pages & (pages - 1):
                raise PeerError(f"{path}/{PAGES}: {pages} is no power of two")
        if order > max_order:
            most = max_order if key == ORDER else 1 << max_order
            raise PeerError(f"{path}/{key}: {order if key == ORDER else 1 << order}, at most {most}")
        try:
            abi = blkif.abi_of((said["protocol"] or b"").decode())
        except (PeerError, UnicodeDecodeError) as error:
            raise PeerError(f"{path}/protocol: {error}") from None
        persistent = number_of(path, "feature-persistent", said, 0)
        either = not order and said[ORDER] is not None
        return cls(path, queues, order, either, abi, bool(persistent))

    def ref_names(self) -> list[str]:
        return [f"ring-ref{n}" for n in range(1 << self.order)] if self.order else ["ring-ref"]

    def keys(self) -> list[str]:
        """What `parameters` must be given."""
        names = ["event-channel", *self.ref_names()]
        if self.either:
            names.append("ring-ref0")
        return [queue_folder(self.queues, queue) + name for queue in range(self.queues) for name in names]

    def parameters(self, said: Said) -> Parameters:
        """From the values of `keys`. PeerError that names the first key that is missing or makes no sense."""
        grants, ports = Names(self.path, "grant reference"), Names(self.path, "port")
        queues = []
        for queue in range(self.queues):
            folder = queue_folder(self.queues, queue)
            names = [folder + name for name in self.ref_names()]
            if self.either and said[names[0]] is None and said[f"{names[0]}0"] is not None:
                names = [f"{names[0]}0"]
            port = ports.take(said, f"{folder}event-channel")
            refs = tuple([grants.take(said, name) for name in names])
            queues.append(QueueKeys(refs, port))
        return Parameters(tuple(queues), self.abi, self.persistent)
