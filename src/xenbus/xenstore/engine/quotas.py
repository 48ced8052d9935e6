"""The limits of a guest, by name. Pure.

Knows numbers only; who is counted, and where each limit is looked at, is the engine's business.
Source: quota table of xenstored (tools/xenstored/domain.c), defaults as in Xen 4.17 and later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xenbus.errors import UsageError

# name -> (default, what it limits). 0 means: not checked (docs/misc/xenstore.txt, SET_QUOTA).
QUOTAS: dict[str, tuple[int, str]] = {
    "nodes": (1000, "Nodes per domain"),
    "watches": (128, "Watches per domain"),
    "outstanding": (20, "Outstanding requests per domain"),
    "memory": (2 * 1024 * 1024 + 512 * 1024, "Total Xenstore memory per domain"),
    "soft-memory": (2 * 1024 * 1024, "Memory per domain that is worth a word in the log"),
    "transactions": (10, "Active transactions per domain"),
    "transaction-nodes": (1024, "Max. number of accessed nodes per transaction"),
    "node-permissions": (5, "Max. number of permissions per node"),
    "path-max": (2048, "Max. length of a node path"),
    "node-size": (2048, "Max. size of a node"),
}
QUOTA_MAX = 0xFFFF_FFFE


class Quotas:
    """A value for every name in `QUOTAS`. Attributes are the names with `_`; 0 is "no limit".

    values: those that differ from the default, e.g. ``Quotas(nodes=100_000)``; names with `-` or `_`.
            UsageError for a name that is not there or a value out of range.
    """

    __slots__ = (
        "memory",
        "node_permissions",
        "node_size",
        "nodes",
        "outstanding",
        "path_max",
        "soft_memory",
        "transaction_nodes",
        "transactions",
        "watches",
    )
    memory: int
    node_permissions: int
    node_size: int
    nodes: int
    outstanding: int
    path_max: int
    soft_memory: int
    transaction_nodes: int
    transactions: int
    watches: int

    def __init__(self, values: Mapping[str, int] | None = None, /, **more: int) -> None:
        for name, (default, _) in QUOTAS.items():
            setattr(self, name.replace("-", "_"), default)
        for name, value in {**(values or {}), **more}.items():
            self.set(name.replace("_", "-"), value)

    def set(self, name: str, value: int) -> None:
        """UsageError for an unknown name, or a value outside 0..2**32-2."""
        if name not in QUOTAS:
            raise UsageError(f"no quota {name!r}; there are {', '.join(QUOTAS)}")
        if not 0 <= value <= QUOTA_MAX:
            raise UsageError(f"quota {name}: {value} is not between 0 and {QUOTA_MAX}")
        setattr(self, name.replace("-", "_"), value)

    def get(self, name: str) -> int:
        """UsageError for an unknown name."""
        if name not in QUOTAS:
            raise UsageError(f"no quota {name!r}; there are {', '.join(QUOTAS)}")
        value: int = getattr(self, name.replace("-", "_"))
        return value

    def as_dict(self) -> dict[str, int]:
        return {name: self.get(name) for name in QUOTAS}

    def copy(self) -> Quotas:
        return Quotas(self.as_dict())

    @staticmethod
    def parse_words(words: Iterable[str]) -> dict[str, int]:
        """From `name=value` words of a command line. UsageError names the word that is wrong."""
        values = {}
        for word in words:
            name, found, number = word.partition("=")
            if not found or not (number.isascii() and number.isdigit()):
                raise UsageError(f"quota {word!r}: expected name=number")
            values[name] = int(number)
        return values

    @classmethod
    def parse(cls, words: Iterable[str]) -> Quotas:
        """The same as quotas; the others have xenstored's defaults."""
        return cls(cls.parse_words(words))
