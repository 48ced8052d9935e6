"""Which multicast packets a guest wants: groups, kept in words of memory that may outlive this process.

Knows addresses; knows no ring, and not whose memory it is.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from xenbus.drivers.net.netif import BROADCAST
from xenbus.drivers.net.xnb_pages import Buffer

# Groups that a guest may ask for (netback's XEN_NETBK_MCAST_MAX).
GROUPS_MAX: Final = 64
# A group's word: its address, and a bit, so that it is not 0 whatever the address.
_THERE: Final = 1 << 48


class MulticastFilter:
    """Of one guest, for all its queues. on: whether it applies"""

    __slots__ = ("_where", "_words", "on")

    def __init__(self) -> None:
        self._where: dict[bytes, int] = {}  # which word a group is in
        self.forget()

    @property
    def groups(self) -> Set[bytes]:
        return self._where.keys()

    def keep(self, words: memoryview) -> None:
        """From now on in these GROUPS_MAX words of 8 bytes; groups that are there apply."""
        self._words = words
        self._where = {(word & ~_THERE).to_bytes(6): n for n, word in enumerate(words) if word & _THERE}

    def forget(self) -> None:
        """The connection is over."""
        self.on = False
        self.keep(memoryview(bytearray(8 * GROUPS_MAX)).cast("Q"))

    def change(self, add: bool, address: bytes) -> bool:
        """False: there are as many as may be. To do the same once more changes nothing."""
        if not add:
            n = self._where.pop(address, None)
            if n is not None:
                self._words[n] = 0
        elif address not in self._where:
            if len(self._where) == GROUPS_MAX:
                return False
            n = self._where[address] = self._words.tolist().index(0)
            self._words[n] = _THERE | int.from_bytes(address)
        return True

    def wants(self, frame: Buffer) -> bool:
        if not self.on or not frame[0] & 1:
            return True
        address = bytes(frame[:6])
        return address == BROADCAST or address in self._where
