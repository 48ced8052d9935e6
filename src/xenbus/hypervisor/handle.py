"""What every implementation's handle of a domain has: one object is its own grants, gntdev and evtchn.

Knows no hypervisor; see `interface.Hypervisor` for what the rest is.
"""

from __future__ import annotations

from typing import Self


class Handle:
    """domid: -1 as long as the hypervisor has not said it"""

    def __init__(self, domid: int = -1) -> None:
        self._domid = domid

    @property
    def domid(self) -> int:
        return self._domid

    @property
    def grants(self) -> Self:
        return self

    @property
    def gntdev(self) -> Self:
        return self

    @property
    def evtchn(self) -> Self:
        return self
