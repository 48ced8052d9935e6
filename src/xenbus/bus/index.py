"""Which devices stand at or below a path: an event costs what it concerns, not what the bus holds (B12).

Pure. Paths are the store's, relative to the domain: `<root>/<type>/<id>[/<id>]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xenbus.bus.device import XenbusDevice


class Index:
    """Devices by node, and by each directory between the root and their node."""

    __slots__ = ("_above", "_depth", "devices", "root")

    def __init__(self, root: str, id_components: int) -> None:
        self.root = root
        self.devices: dict[str, XenbusDevice] = {}
        self._depth = 2 + id_components
        self._above: dict[str, dict[str, XenbusDevice]] = {}

    def split(self, path: str) -> tuple[str, str]:
        """(path down to the device's node at most, what follows below it): cut before the slash (B1)."""
        parts = path.split("/", self._depth)
        return ("/".join(parts[:-1]), parts[-1]) if len(parts) > self._depth else (path, "")

    def is_node(self, path: str) -> bool:
        """Deep enough to be a device."""
        return path.count("/") == self._depth - 1

    def at_or_above(self, node: str) -> Iterator[str]:
        """The node itself, then each directory above it, the root last."""
        while node:
            yield node
            node = node.rpartition("/")[0]

    def _between(self, node: str) -> list[str]:
        return list(self.at_or_above(node))[1:-1]

    def add(self, dev: XenbusDevice) -> None:
        self.devices[dev.node] = dev
        for path in self._between(dev.node):
            self._above.setdefault(path, {})[dev.node] = dev

    def remove(self, dev: XenbusDevice) -> None:
        del self.devices[dev.node]
        for path in self._between(dev.node):
            devices = self._above[path]
            del devices[dev.node]
            if not devices:
                del self._above[path]

    def under(self, path: str) -> list[XenbusDevice]:
        """At or below."""
        if path in self.devices:
            return [self.devices[path]]
        found = self.devices if path == self.root else self._above.get(path, {})
        return list(found.values())
