"""The drivers of `vif`: importing this package registers both halves."""

from xenbus.drivers.net.packet import Gso, Packet
from xenbus.drivers.net.xn import Xn
from xenbus.drivers.net.xnb import Xnb

__all__ = ["Gso", "Packet", "Xn", "Xnb"]
