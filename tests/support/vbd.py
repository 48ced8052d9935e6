"""A disk in one process: domain 0 with xbbd, a guest with xbd, the real store and hypervisor between them."""

from __future__ import annotations

from typing import Any

from tests.support.pair import SETTINGS, Pair
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.block import Xbbd, Xbd

VDEV = 51712


class Rig(Pair):
    """`disk` is what the guest's programs see."""

    kind = "vbd"
    devid = VDEV

    @property
    def disk(self) -> Any:
        return self.front.disk

    async def plug(self, params: str, **keys: str) -> None:
        """Nodes as the toolstack writes them; `_` in a key stands for `-`."""
        front = {"virtual-device": str(self.devid), "device-type": "disk"}
        back = {"params": params, "mode": "w", "type": "xenbus"}
        back |= {key.replace("_", "-"): value for key, value in keys.items()}
        await self.write_halves(front, back)

    async def connected(self) -> Rig:
        await self.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
        await self.disk.connected(5)
        return self


def rig(front: Any = Xbd, back: Any = Xbbd, settings: Settings = SETTINGS, **given: Any) -> Any:
    """Both domains up, no disk yet. What else may be given: see Pair.rig."""
    return Rig.rig(front, back, settings, **given)
