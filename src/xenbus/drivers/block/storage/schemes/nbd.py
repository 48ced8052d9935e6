"""`nbd://host:port/export` and `nbd+unix:///export?socket=/path`: a disk that an NBD server has.

So qcow2, Ceph, S3 and the like come in through qemu-nbd or nbdkit. Knows the client's connect.
"""

from __future__ import annotations

from xenbus.drivers.block.nbd.client import NbdClient
from xenbus.drivers.block.nbd.uri import parse_uri
from xenbus.drivers.block.storage.registry import Target, storage_scheme


@storage_scheme("nbd", "nbd+unix")
async def open_nbd(target: Target) -> NbdClient:
    """Raises UsageError, StorageError, NbdError, DeadlineError."""
    socket = target.options.pop("socket", None)
    target.finish_options()
    address = parse_uri(target.text)
    if socket is not None and address.path is not None:
        address.path = socket
    return await NbdClient.connect(address, readonly=target.readonly, sector_size=target.sector_size)
