"""The drivers of `vbd`: importing this package registers both halves."""

from xenbus.drivers.block.disk import Disk, DiskError, DiskFile
from xenbus.drivers.block.xbbd import Xbbd
from xenbus.drivers.block.xbd import Xbd

__all__ = ["Disk", "DiskError", "DiskFile", "Xbbd", "Xbd"]
