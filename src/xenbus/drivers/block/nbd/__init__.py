"""NBD: a client and a server of the network block device protocol, over anything that has blocks.

Knows the `Blocks` protocol of storage. Knows nothing of rings, drivers or the store.
"""
