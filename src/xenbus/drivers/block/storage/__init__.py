"""What is behind a disk: raw files and block devices, memory, NBD. `open_storage` is the way in.

Knows nothing of rings, drivers or the store. To add a scheme: one file in `schemes/`, one decorator.
"""

from xenbus.drivers.block.storage.interface import Blocks, Buffers, Storage, StorageError
from xenbus.drivers.block.storage.registry import Target, open_storage, scheme_names, storage_scheme

__all__ = [
    "Blocks",
    "Buffers",
    "Storage",
    "StorageError",
    "Target",
    "open_storage",
    "scheme_names",
    "storage_scheme",
]
