"""What passes a port, written down as pcapng (draft-ietf-opsawg-pcapng), for Wireshark and tcpdump.

Knows packets, a file and a clock. A capture never holds up traffic: what does not fit into its file is
counted, and one whose disk fails ends there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import Struct
from typing import Final

from xenbus.drivers.net.packet import MAX_FRAME, End, Link, Packet, Port
from xenbus.drivers.outfile import open_for_writing
from xenbus.errors import UsageError

log = logging.getLogger(__name__)

LIMIT: Final = 64 << 20  # bytes of a file, unless said otherwise
LIMIT_MAX: Final = 1 << 40
_FLUSH_EVERY: Final = 1.0  # seconds after which what was captured can be read

_SHB, _IDB, _EPB = 0x0A0D0D0A, 1, 6
_MAGIC: Final = 0x1A2B3C4D
_LINKTYPE_ETHERNET: Final = 1
_OPT_END, _SHB_USERAPPL, _IF_NAME, _IF_TSRESOL, _EPB_FLAGS = 0, 4, 2, 9, 2
_INBOUND, _OUTBOUND = 1, 2
_NANOSECONDS: Final = 9  # if_tsresol: 10 to the power of -9

_BLOCK: Final = Struct("<II")
_SECTION: Final = Struct("<IHHq")
_INTERFACE: Final = Struct("<HHI")
_PACKET: Final = Struct("<IIIIIII")  # with type and length before it
_OPTION: Final = Struct("<HH")
_WORD: Final = Struct("<I")
# epb_flags, opt_endofopt and the length once more
_TAIL: Final = Struct("<HHIHHI")
_OVERHEAD: Final = _PACKET.size + _TAIL.size


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + value + bytes(-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return _BLOCK.pack(kind, length) + body + _WORD.pack(length)


class PcapngWriter:
    """One section with one interface.

    limit: bytes after which nothing more is written
    """

    def __init__(
        self, path: Path, name: str, limit: int = LIMIT, now: Callable[[], int] = time.time_ns
    ) -> None:
        """Makes or empties the file, mode 0600: it holds what guests say. OSError."""
        self.path = path
        self.written = self.lost = self.packets = 0
        self._limit = limit
        self._now = now
        self._file = os.fdopen(open_for_writing(path, truncate=True), "wb", buffering=256 << 10)
        self._failed = False
        section = _SECTION.pack(_MAGIC, 1, 0, -1) + _option(_SHB_USERAPPL, b"xenbus") + _option(_OPT_END, b"")
        self._write(_block(_SHB, section))
        interface = (
            _INTERFACE.pack(_LINKTYPE_ETHERNET, 0, MAX_FRAME)
            + _option(_IF_NAME, name.encode("utf-8", "replace")[:255])
            + _option(_IF_TSRESOL, bytes([_NANOSECONDS]))
            + _option(_OPT_END, b"")
        )
        self._write(_block(_IDB, interface))
        self.flush()

    def record(self, packets: Sequence[Packet], *, outbound: bool) -> None:
        """outbound: from our driver to the port."""
        stamp = self._now()
        direction = _OUTBOUND if outbound else _INBOUND
        for packet in packets:
            data = packet.data
            size = len(data)
            padding = -size % 4
            length = _OVERHEAD + size + padding
            if self._failed or self.written + length > self._limit:
                self.lost += 1
                continue
            head = _PACKET.pack(_EPB, length, 0, stamp >> 32, stamp & 0xFFFFFFFF, size, size)
            tail = _TAIL.pack(_EPB_FLAGS, 4, direction, _OPT_END, 0, length)
            self._write(b"".join((head, data, bytes(padding), tail)))
            self.packets += 1

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self._fail(error)
        self.written += len(data)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            log.error("%s: the capture ends: %s", self.path, error.strerror)

    def close(self) -> None:
        """Nothing is written afterwards. Idempotent."""
        try:
            self._file.close()
        except OSError as error:
            self._fail(error)
        self._failed = True


class CapturedPort:
    """A port with a writer beside it: both are closed with it."""

    def __init__(self, port: Port, writer: PcapngWriter) -> None:
        self._port = port
        self._writer = writer
        self._flushing: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self._port.name

    @property
    def inner(self) -> Port:
        """The port that is captured."""
        return self._port

    def counters(self) -> dict[str, int]:
        writer = self._writer
        return {
            **self._port.counters(),
            "captured": writer.packets,
            "capture_lost": writer.lost,
            "capture_bytes": writer.written,
        }

    def start(self, driver: End) -> None:
        self._port.start(_Inbound(driver, self._record))

    def send(self, packets: Sequence[Packet]) -> int:
        taken = self._port.send(packets)
        self._record(packets[:taken], True)
        return taken

    def ready(self) -> None:
        self._port.ready()

    def link(self, link: Link | None) -> None:
        self._port.link(link)

    async def close(self, *, leave: bool = False) -> None:
        await self._port.close(leave=leave)
        if self._flushing is not None:
            self._flushing.cancel()
        self._writer.close()

    def _record(self, packets: Sequence[Packet], outbound: bool) -> None:
        self._writer.record(packets, outbound=outbound)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(_FLUSH_EVERY, self._flush)

    def _flush(self) -> None:
        self._flushing = None
        self._writer.flush()


class _Inbound:
    """The driver's end, seen from the port."""

    def __init__(self, driver: End, record: Callable[[Sequence[Packet], bool], None]) -> None:
        self._driver = driver
        self._record = record
        self.ready = driver.ready
        self.link = driver.link

    def send(self, packets: Sequence[Packet]) -> int:
        taken = self._driver.send(packets)
        self._record(packets[:taken], False)
        return taken


def captured(port: Port, path: str, limit: str = "") -> Port:
    """`port`, captured to a file. UsageError, OSError."""
    size = LIMIT
    if limit:
        size = _size(limit)
    return CapturedPort(port, PcapngWriter(Path(path), port.name, size))


def _size(text: str) -> int:
    digits, factor = (text[:-1], "KMGT".find(text[-1:].upper()) + 1) if text[-1:].isalpha() else (text, 0)
    if not digits.isdecimal() or (text[-1:].isalpha() and not factor):
        raise UsageError(f"{text!r} is no size of a capture: bytes, or 64K, 64M, 1G")
    size = int(digits) << 10 * factor
    if not 4096 <= size <= LIMIT_MAX:
        raise UsageError(f"a capture of {text} bytes: from 4096 to {LIMIT_MAX}")
    return size
