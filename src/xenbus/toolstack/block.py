"""Disks, as a toolstack describes them: the nodes of both halves of a `vbd`, as libxl writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xenbus.drivers.block.blkif import vdev_number
from xenbus.errors import UsageError
from xenbus.toolstack.devices import DeviceSpec
from xenbus.toolstack.paths import DevicePaths


@dataclass(slots=True, frozen=True)
class DiskSpec:
    """One disk for one guest.

    target:      what xbbd opens: a file, a block device, `memory:16M`, `nbd://...`, `nbd+unix://...`
    vdev:        the guest's name for it, `xvda`
    sector_size: bytes, 512 or 4096; None leaves it to the storage
    options:     more nodes for the back end's directory
    back_kind:   the type under which the back end finds it, `vbd` or xbbd's own, `xbbd`
    """

    front_domid: int
    target: str
    vdev: str = "xvda"
    readonly: bool = False
    back_domid: int = 0
    sector_size: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    back_kind: str = "vbd"

    def device(self) -> DeviceSpec:
        """UsageError if `vdev` is no disk's name."""
        number = vdev_number(self.vdev)
        target = self.target
        if "://" not in target and not target.startswith("memory:"):
            # The back end runs in another process with another working directory.
            target = str(Path(target).absolute())
        if "\0" in target:
            raise UsageError("a disk's target holds a NUL")
        front = {"virtual-device": str(number), "device-type": "disk"}
        back = {
            "params": target,
            "type": "xenbus",
            "dev": self.vdev,
            "virtual-device": str(number),
            "device-type": "disk",
            "mode": "r" if self.readonly else "w",
            "removable": "0",
            "bootable": "1",
            **({"sector-size-wanted": str(self.sector_size)} if self.sector_size else {}),
            **dict(self.options),
        }
        own = "" if self.back_kind == "vbd" else self.back_kind
        paths = DevicePaths("vbd", number, self.front_domid, self.back_domid, own)
        return DeviceSpec(paths, front, back)
