"""How an NBD export is named: doc/uri.md of the nbd project. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from xenbus.drivers.block.nbd.protocol import DEFAULT_PORT
from xenbus.errors import UsageError


@dataclass(slots=True)
class Address:
    """A host and port, or the path of a unix socket; and the export's name there ("" is the default one)."""

    export: str = ""
    path: str | None = None
    host: str = ""
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        if self.path is not None:
            return f"nbd+unix:///{quote(self.export, safe='')}?socket={self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{quote(self.export, safe='')}"


def parse_uri(text: str) -> Address:
    """`nbd://host[:port][/export]` or `nbd+unix:///[export]?socket=PATH`. Raises UsageError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{text}: {error}") from None
    export = unquote(parts.path[1:]) if parts.path.startswith("/") else ""
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1 or parts.netloc:
            raise UsageError(f"{text}: written nbd+unix:///EXPORT?socket=PATH")
        return Address(export, path=sockets[0])
    if parts.scheme != "nbd" or not parts.hostname:
        raise UsageError(f"{text}: written nbd://HOST:PORT/EXPORT")
    return Address(export, host=parts.hostname, port=DEFAULT_PORT if port is None else port)
