"""Speed on a real Xen: our back ends beside Linux's and QEMU's, for the same guest.

Runs in the lab's dom0 (`make xen-bench`), as root.
"""
