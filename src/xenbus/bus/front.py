"""The bus of front ends: `device/<type>/<id>`. What FreeBSD's xenbusb_front.c overrides.

Knows the shared bus alone.
"""

from __future__ import annotations

from xenbus.bus.state import Side
from xenbus.bus.xenbusb import XenBus


class FrontBus(XenBus):
    """Front ends hold boot until they are connected: the root disk may be one of them."""

    side = Side.FRONT
    root = "device"
    id_components = 1
    otherend_keys = ("backend-id", "backend")
    name = "xenbusb_front"
    description = "Xen Frontend Devices"
    holds_boot = True

    async def enumerate_type(self, device_type: str) -> list[str]:
        """seed: xenbusb_front_enumerate_type."""
        base = f"{self.root}/{device_type}"
        return [f"{base}/{devid}" for devid in await self.store.directory(base)]
