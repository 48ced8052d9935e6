"""The console interface: the page of xen/include/public/io/console.h, and the keys of either half's node.

Knows a buffer, numbers and names; no store, no device. The first console of a PV guest
(`/local/domain/N/console`) is no device of any bus: its `ring-ref` is a frame's number, and the domain
builder made its port.
"""

from __future__ import annotations

from typing import Final

from xenbus.ring.bytering import XENCONS_IN, XENCONS_OUT, ByteRingEnd

KIND: Final = "console"
# What the front end publishes (drivers/tty/hvc/hvc_xen.c): a grant reference and a port.
RING_REF_KEY: Final = "ring-ref"
PORT_KEY: Final = "port"
# Where whoever attaches finds the back end's terminal: in the front's node, as `xl console` looks there, and
# in the back's, which no guest can write.
TTY_KEY: Final = "tty"
OUTPUT_KEY: Final = "output"  # "pty", or "null" for none
PROTOCOL: Final = "vt100"
# Ours, in the back end's node.
LOG_KEY: Final = "xenbus-log"
LOG_SIZE_KEY: Final = "xenbus-log-size"
LOG_SIZE: Final = 1 << 20
LOG_SIZE_MIN, LOG_SIZE_MAX = 4096, 1 << 40

# Bytes that a back end keeps for whoever attaches: libxl writes the same as `limit`.
LIMIT: Final = 1 << 20


class ConsoleRing:
    """Both directions of the page, from one end. `receive` is what we read, `transmit` what we write."""

    __slots__ = ("receive", "transmit")

    def __init__(self, page: memoryview, *, front: bool) -> None:
        into, out = ByteRingEnd(page, *XENCONS_IN), ByteRingEnd(page, *XENCONS_OUT)
        self.receive, self.transmit = (into, out) if front else (out, into)

    def release(self) -> None:
        """Let go of the page. Idempotent."""
        self.receive.release()
        self.transmit.release()
