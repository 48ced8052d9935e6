"""The drivers of `console`: importing this package registers both halves."""

from xenbus.drivers.console.stream import ConsoleStream
from xenbus.drivers.console.xc import Xc
from xenbus.drivers.console.xcb import Xcb

__all__ = ["ConsoleStream", "Xc", "Xcb"]
