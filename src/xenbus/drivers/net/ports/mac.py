"""MAC addresses as text and bytes. Knows nothing of devices."""

from __future__ import annotations

import re
import secrets
from typing import Final

from xenbus.errors import UsageError

XEN_OUI: Final = b"\x00\x16\x3e"  # registered for Xen's guests
_MAC = re.compile(r"[0-9a-fA-F]{2}(?:([:-])[0-9a-fA-F]{2}(?:\1[0-9a-fA-F]{2}){4})")


def parse_mac(text: str) -> bytes:
    """Six bytes, of one host: no group's address, not all zeros. UsageError."""
    if not _MAC.fullmatch(text):
        raise UsageError(f"{text!r} is no MAC address: six bytes in hex, 00:16:3e:11:22:33")
    mac = bytes.fromhex(text.replace(text[2], ""))
    if mac[0] & 1:
        raise UsageError(f"{text} is a group's address, which no device can have as its own")
    if not any(mac):
        raise UsageError(f"{text} is nobody's address")
    return mac


def mac_text(mac: bytes) -> str:
    """As the store has it: 00:16:3e:11:22:33."""
    return mac.hex(":")


def random_mac() -> bytes:
    """One of Xen's, as libxl makes it: its OUI and 23 bits by chance, from the half that is for that."""
    return XEN_OUI + secrets.randbits(23).to_bytes(3, "big")
