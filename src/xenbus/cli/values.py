"""Values of the store as text: as Xen's own tools print them, and in JSON.

Knows bytes only.
"""

from __future__ import annotations

import base64
import os
import re

from xenbus.errors import UsageError


def escaped(value: bytes) -> str:
    """A value on one line of ASCII, escaped as Xen's own tools do (xenstore_client.c, sanitise_value)."""
    return "".join(_ESCAPES[byte] for byte in value)


def _escape(byte: int) -> str:
    named = {9: "\\t", 10: "\\n", 13: "\\r", 92: "\\\\"}
    if byte in named:
        return named[byte]
    if 32 <= byte <= 126:
        return chr(byte)
    return f"\\{byte:03o}" if byte < 8 else f"\\x{byte:02x}"


_ESCAPES = [_escape(byte) for byte in range(256)]


_ESCAPED = re.compile(rb"\\(?:([tnr\\])|x([0-9a-fA-F]{2})|([0-7]{1,3})|)", re.DOTALL)
_NAMED = {b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\"}


def unescaped(text: str) -> bytes:
    """The value that is shown like this. UsageError for a backslash that begins no escape."""

    def plain(found: re.Match[bytes]) -> bytes:
        named, hexadecimal, octal = found.groups()
        number = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else 256
        if named is None and number > 255:
            raise UsageError(f"{text[:60]!r}: a backslash begins \\t, \\n, \\r, \\\\, \\xHH or \\OOO")
        return _NAMED[named] if named else bytes([number])

    return _ESCAPED.sub(plain, os.fsencode(text))


def jsonable(value: bytes | None) -> object:
    """Text where it is UTF-8, otherwise `{"base64": ...}`; null for what may not be read."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
