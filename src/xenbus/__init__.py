"""Xen's split-driver device bus in user space.

Nothing is imported here: each room is imported by the name of what is wanted from it.
"""

__version__ = "0.1.0"
