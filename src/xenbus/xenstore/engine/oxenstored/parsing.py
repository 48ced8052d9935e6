"""Words and numbers of a request, as oxenstored takes them apart. Pure; knows nothing of the store.

Its numbers come from OCaml's int_of_string in some operations and from a digit search in others.
"""

from __future__ import annotations

import re

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail
from xenbus.xenstore.wire.paths import match_absolute

_valid_special = re.compile(rb"@[-_@0-9A-Za-z]*").fullmatch
_home = re.compile(rb"/local/domain/[-+]?[0-9][0-9_]*/").match
_number = re.compile(
    rb"([-+]?)(?:0[xX]([0-9a-fA-F][0-9a-fA-F_]*)|0[oO]([0-7][0-7_]*)|0[bB]([01][01_]*)|(?:0[uU])?([0-9][0-9_]*))"
).fullmatch
_BASES = (16, 8, 2, 10)
_digits = re.compile(rb"[0-9]+").search

# OCaml's integers have 63 bits.
_MODULUS = 1 << 63
_HIGHEST = (1 << 62) - 1

# There -1, which owns what is to go with the next domain that dies.
NOBODY = 0xFFFF


def words_of(payload: bytes) -> list[bytes]:
    """At most eight, the last with all that is left; b"" after the last NUL is one."""
    return payload.split(b"\0", 7)


def one_path(payload: bytes) -> bytes:
    """The only word, which a NUL ends; EINVAL otherwise."""
    word, found, rest = payload.partition(b"\0")
    if not found or rest:
        raise Fail("EINVAL")
    return word


def absolute(conn: Connection, raw: bytes) -> bytes:
    """As a watch names it: special paths as they are, whatever follows the @; no limit of length."""
    first = raw[:1]
    if first == b"@":
        return raw
    if first != b"/":
        if not raw:
            raise Fail("EINVAL")
        raw = conn.home + raw
    if not match_absolute(raw):
        raise Fail("EINVAL")
    return raw


def canonical(conn: Connection, raw: bytes) -> bytes:
    """The node that `raw` means. Special paths are nodes below the root: `@x` and `/@x` are one. A name after
    @ that no other node could have stands for a node that is never there: its key has a NUL."""
    path = raw if raw[:1] in (b"/", b"@") else conn.home + raw
    if not raw:
        raise Fail("EINVAL")
    home = _home(path)
    if len(path) - (home.end() if home else 0) > conn.domain.quotas.path_max > 0:
        raise Fail("EINVAL")
    if path[:1] == b"@":
        return b"/" + path if _valid_special(path) else b"/@\0"
    if not match_absolute(path):
        raise Fail("EINVAL")
    return path


def ocaml_number(word: bytes) -> int | None:
    """int_of_string: a sign, 0x, 0o, 0b or 0u, and _ between digits are fine. None where it fails."""
    found = _number(word)
    if found is None:
        return None
    for base, digits in zip(_BASES, found.groups()[1:], strict=True):
        if digits is not None:
            if len(digits) > 80:
                return None
            value = int(digits.replace(b"_", b""), base)
            break
    if base == 10:
        if value > _HIGHEST + (found[1] == b"-"):
            return None
    elif value >= _MODULUS:
        return None
    value = -value if found[1] == b"-" else value
    return (value + _MODULUS // 2) % _MODULUS - _MODULUS // 2


def number(word: bytes) -> int:
    """The same; EINVAL where it fails."""
    value = ocaml_number(word)
    if value is None:
        raise Fail("EINVAL")
    return value


def domid_of(word: bytes) -> int:
    """Of an entry: what fits into 16 bits, and -1. EINVAL for all else (there any number will do)."""
    value = number(word)
    if value == -1:
        return NOBODY
    if not 0 <= value < NOBODY:
        raise Fail("EINVAL")
    return value


def shown(domid: int) -> int:
    """As %u prints it."""
    return _MODULUS - 1 if domid == NOBODY else domid


def first_digits(word: bytes) -> int:
    """The first run of digits, 0 if there is none (c_int_of_string)."""
    found = _digits(word)
    value = 0
    for digit in found[0] if found else b"":
        value = (value * 10 + digit - 48) % _MODULUS
    return value
