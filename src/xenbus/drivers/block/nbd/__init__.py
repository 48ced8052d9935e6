"""NBD: a client and a server of the network block device protocol, over anything that has blocks.

Knows the `Blocks` protocol of storage. Knows nothing of rings, drivers or the store.
"""

from xenbus.drivers.block.nbd.client import NbdClient
from xenbus.drivers.block.nbd.protocol import Export, Flag, NbdError
from xenbus.drivers.block.nbd.server import NbdServer
from xenbus.drivers.block.nbd.uri import Address, parse_uri

__all__ = ["Address", "Export", "Flag", "NbdClient", "NbdError", "NbdServer", "parse_uri"]
