"""A domain's and a disk's nodes as libxl 4.17 writes them (tools/libs/light/libxl_device.c). No test here."""

from __future__ import annotations

FRONT = "/local/domain/5/device/vbd/51712"
BACK = "/local/domain/0/backend/vbd/5/51712"
FRONT_ERROR = "/local/domain/5/error/device/vbd/51712/error"
BACK_ERROR = "/local/domain/0/error/backend/vbd/5/51712/error"
CONSOLE = "/local/domain/5/console"
CONSOLE_BACK = "/local/domain/0/backend/console/5/0"


def host() -> dict[str, str]:
    """Domain 0 and the guest 5, with its console and the node that is no device."""
    return {
        "/local/domain/0/name": "Domain-0",
        "/local/domain/0/domid": "0",
        "/local/domain/5/name": "guest",
        "/local/domain/5/domid": "5",
        "/local/domain/5/device/suspend/event-channel": "",
        f"{CONSOLE}/backend": CONSOLE_BACK,
        f"{CONSOLE}/backend-id": "0",
        f"{CONSOLE}/type": "xenconsoled",
        f"{CONSOLE}/ring-ref": "917507",
        f"{CONSOLE}/port": "2",
        f"{CONSOLE}/tty": "/dev/pts/0",
        f"{CONSOLE_BACK}/frontend": CONSOLE,
        f"{CONSOLE_BACK}/frontend-id": "5",
        f"{CONSOLE_BACK}/online": "1",
        f"{CONSOLE_BACK}/state": "1",
        f"{CONSOLE_BACK}/protocol": "vt100",
    }


def disk(front: int, back: int) -> dict[str, str]:
    """A `phy` disk whose hotplug script has done its part, in these two states."""
    return {
        f"{FRONT}/backend": BACK,
        f"{FRONT}/backend-id": "0",
        f"{FRONT}/state": str(front),
        f"{FRONT}/virtual-device": "51712",
        f"{FRONT}/device-type": "disk",
        f"{FRONT}/event-channel": "8",
        f"{BACK}/frontend": FRONT,
        f"{BACK}/frontend-id": "5",
        f"{BACK}/params": "/dev/loop0",
        f"{BACK}/script": "/etc/xen/scripts/block",
        f"{BACK}/physical-device": "7:0",
        f"{BACK}/hotplug-status": "connected",
        f"{BACK}/online": "1",
        f"{BACK}/removable": "0",
        f"{BACK}/bootable": "1",
        f"{BACK}/state": str(back),
        f"{BACK}/dev": "xvda",
        f"{BACK}/type": "phy",
        f"{BACK}/mode": "w",
    }
