"""Speed on a real Xen: our xbbd beside Linux's xen-blkback and QEMU's disk back end, for the same guest.

Runs in the lab's dom0 (`make xen-bench`), as root.
"""
