"""What of a connection to a guest outlives xnb's process: the answers being given on its rings, its groups.

Knows the layout, in memory that it is given; knows no files. Everything else the next process finds in the
store and on the rings: what was taken and not answered is still there, in order.
"""

from __future__ import annotations

from typing import Final

from xenbus.bus.journals import Layout
from xenbus.drivers.net.netif import PAGE_SIZE, RX_SLOT_SIZE, TX_SLOT_SIZE
from xenbus.drivers.net.xnb_multicast import GROUPS_MAX
from xenbus.ring.answers import AnswerLog, answer_log_size
from xenbus.ring.journal import HEAD_SIZE, Head
from xenbus.ring.shared import ring_size

_MAGIC: Final = b"XENBUSN1"
_GROUPS_END: Final = HEAD_SIZE + 8 * GROUPS_MAX
_TX_SIZE: Final = answer_log_size(ring_size(TX_SLOT_SIZE, PAGE_SIZE), TX_SLOT_SIZE)
_RX_SIZE: Final = answer_log_size(ring_size(RX_SLOT_SIZE, PAGE_SIZE), RX_SLOT_SIZE)


class NetJournal:
    """Over a writable buffer of `size_of(queues)` bytes, zeroed or an earlier process's.

    groups: words for a MulticastFilter; logs: of each queue's transmit and receive ring
    """

    __slots__ = ("_head", "groups", "logs")

    def __init__(self, view: memoryview, queues: int) -> None:
        octets = view.cast("B")
        self._head = Head(octets, _MAGIC, (queues, GROUPS_MAX))
        self.groups = octets[HEAD_SIZE:_GROUPS_END].cast("Q")
        self.logs: list[tuple[AnswerLog, AnswerLog]] = []
        for at in range(_GROUPS_END, octets.nbytes, _TX_SIZE + _RX_SIZE):
            middle = at + _TX_SIZE
            self.logs.append((AnswerLog(octets[at:middle]), AnswerLog(octets[middle : middle + _RX_SIZE])))
        octets.release()

    @staticmethod
    def layout(queues: int) -> Layout[NetJournal]:
        size = _GROUPS_END + queues * (_TX_SIZE + _RX_SIZE)
        return Layout(size, lambda view: NetJournal(view, queues))

    @classmethod
    def private(cls, queues: int) -> NetJournal:
        """In memory that goes with this process."""
        layout = cls.layout(queues)
        return layout.over(memoryview(bytearray(layout.size)))

    def begin(self, identity: bytes) -> None:
        """In a zeroed buffer."""
        self._head.begin(identity)

    def check(self, identity: bytes) -> None:
        self._head.check(identity)

    def release(self) -> None:
        self._head.release()
        self.groups.release()
        for logs in self.logs:
            for log in logs:
                log.release()
