"""Node permissions as they travel: `n0`, `r5`, ... NUL-terminated. No I/O.

Knows letters and domain ids; who may do what with them is the engine's business.
Source: docs/misc/xenstore.txt, SET_PERMS.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from xenbus.errors import UsageError

# xen/include/public/xen.h: no domain has this number or a higher one; those mean something special.
DOMID_FIRST_RESERVED = 0x7FF0
# An entry for "any domain" (XENSTORE_SERVER_FEATURE_DOMID_ANY).
DOMID_ANY = 0x7FF5
DOMID_MAX = 0xFFFF


class Access(IntEnum):
    """What an entry allows; the values are bits (READ | WRITE == BOTH)."""

    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = 3

    @property
    def letter(self) -> str:
        return "nrwb"[self]


_BY_LETTER = {"n": Access.NONE, "r": Access.READ, "w": Access.WRITE, "b": Access.BOTH}


class Perm(NamedTuple):
    """One entry. In a list the first names the owner, and what everybody else may do."""

    access: Access
    domid: int

    def __str__(self) -> str:
        return f"{self.access.letter}{self.domid}"

    @classmethod
    def parse(cls, text: str) -> Perm:
        """UsageError unless `[rwbn]<decimal domid>`."""
        access = _BY_LETTER.get(text[:1])
        digits = text[1:]
        # A length first: int() itself refuses thousands of digits, by another name.
        number = digits.isascii() and digits.isdigit() and len(digits) <= 20
        if access is None or not number or int(digits) > DOMID_MAX:
            raise UsageError(f"permission {text[:40]!r}: expected [rwbn]<domid>")
        return cls(access, int(digits))


def parse_perms(payload: bytes) -> list[Perm]:
    """Entries of a GET_PERMS reply, or of what follows the path in SET_PERMS; a missing last NUL is let
    through. UsageError for none at all, or a malformed one."""
    words = payload.decode("ascii", "replace").split("\0")
    if words[-1] == "":
        words.pop()
    if not words:
        raise UsageError("no permission given")
    return [Perm.parse(word) for word in words]


def format_perms(perms: Iterable[Perm | str]) -> bytes:
    """Entries with a NUL after each. A str entry is checked first."""
    entries = [perm if isinstance(perm, Perm) else Perm.parse(perm) for perm in perms]
    if not entries:
        raise UsageError("no permission given")
    return "".join(f"{entry}\0" for entry in entries).encode()
