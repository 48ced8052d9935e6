"""What xbbd's queue handles: one read or write, what was wrong with a request, and the counts of a device.

Knows neither ring nor storage.
"""

from __future__ import annotations

from collections.abc import Sequence

from xenbus.drivers.block.blkif import Op
from xenbus.errors import PeerError


class BadRequest(PeerError):
    """The guest asked for something that cannot be. The request is answered with an error; others go on."""


class Transfer:
    """A read or write, its segments as words (of an indirect one: once `descriptors` are mapped).

    count:  segments; total: sectors; whole: one run of whole pages with consecutive grefs
    serial: of a write, by which a flush and a barrier know what came before them
    """

    __slots__ = ("count", "descriptors", "ident", "op", "sector", "serial", "total", "whole", "words")

    def __init__(self, op: int, ident: int, sector: int, words: Sequence[int]) -> None:
        self.op = op
        self.ident = ident
        self.sector = sector
        self.words = words
        self.count = len(words)
        self.descriptors: tuple[int, ...] = ()
        self.total = 0
        self.whole = False
        self.serial = 0


class Counters:
    """What a device did in its life, over all its connections."""

    __slots__ = ("errors", "last_error", "requests", "sectors")

    def __init__(self) -> None:
        self.requests: dict[int, int] = dict.fromkeys(map(int, Op), 0)
        self.sectors = {int(Op.READ): 0, int(Op.WRITE): 0}
        self.errors = 0
        self.last_error = ""
