"""What nodes of a driver's peer, or of its toolstack, may say: numbers, texts, and what a front published.

Pure: bytes by key in, values out, or what is wrong with them. Knows no store and no device.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenbus.errors import PeerError

Said = Mapping[str, bytes | None]  # None: not there


def number(raw: bytes, bits: int = 64) -> int:
    """A decimal number as it was written, of so many bits. ValueError."""
    if not raw.isdigit() or len(raw) > 20:
        raise ValueError(f"{raw[:32]!r} is not a number")
    value = int(raw)
    if value >> bits:
        raise ValueError(f"{value} is more than {bits} bits hold")
    return value


def number32(raw: bytes) -> int:
    """One of 32 bits. ValueError."""
    return number(raw, 32)


def text(raw: bytes) -> str:
    """Whatever it is, as text: bytes that are no UTF-8 come out as they went in."""
    return raw.decode("utf-8", "surrogateescape")


def queue_folder(queues: int, queue: int) -> str:
    """Before the keys of a queue: of several, each has a folder; one alone stands in the node itself."""
    return f"queue-{queue}/" if queues > 1 else ""


def number_of(path: str, key: str, said: Said, default: int) -> int:
    """default: where there is no such key. path: the front's node, for PeerError."""
    raw = said[key]
    return default if raw is None else _number(path, key, raw)


class Names:
    """Numbers that name something (a grant reference, a port), each of which a front may say but once.

    path: the front's node, for messages; what: they name
    """

    __slots__ = ("_path", "_seen", "_what")

    def __init__(self, path: str, what: str) -> None:
        self._path = path
        self._what = what
        self._seen: dict[int, str] = {}

    def take(self, said: Said, key: str) -> int:
        """PeerError that names the key: it is missing, no number of 32 bits, or another key's as well."""
        raw = said[key]
        if raw is None:
            raise PeerError(f"{self._path}/{key} is missing")
        value = _number(self._path, key, raw)
        if value >> 32:
            raise PeerError(f"{self._path}/{key}: {value} is no {self._what}")
        if value in self._seen:
            raise PeerError(
                f"{self._path}/{key}: {self._what} {value} is that of {self._seen[value]} already"
            )
        self._seen[value] = key
        return value


def _number(path: str, key: str, raw: bytes) -> int:
    try:
        return number(raw)
    except ValueError as error:
        raise PeerError(f"{path}/{key}: {error}") from None
