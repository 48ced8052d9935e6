"""What a path may look like, and where a relative one begins. No I/O.

Knows names only, not nodes. Source: docs/misc/xenstore.txt and xenstored's is_valid_nodename.
"""

from __future__ import annotations

import re

from xenbus.errors import UsageError

# xs_wire.h; counted without the NUL.
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048

_ABSOLUTE = re.compile(r"/|(?:/[-_@0-9A-Za-z]+)+")
_RELATIVE = re.compile(r"[-_0-9A-Za-z][-_@0-9A-Za-z]*(?:/[-_@0-9A-Za-z]+)*")
_SPECIAL = re.compile(r"@[-_@0-9A-Za-z]+(?:/[-_@0-9A-Za-z]+)*")

# The same of bytes, for a store.
match_absolute = re.compile(_ABSOLUTE.pattern.encode()).fullmatch
match_relative = re.compile(_RELATIVE.pattern.encode()).fullmatch
match_special = re.compile(_SPECIAL.pattern.encode()).fullmatch


def is_valid_absolute(path: str) -> bool:
    """`/`, or `/name/...` of allowed characters without `//` or a trailing `/`. Length is not looked at."""
    return _ABSOLUTE.fullmatch(path) is not None


def is_valid_relative(path: str) -> bool:
    return _RELATIVE.fullmatch(path) is not None


def is_valid_special(path: str) -> bool:
    """`@name`, or `@name/...`."""
    return _SPECIAL.fullmatch(path) is not None


def domain_path(domid: int) -> str:
    """The domain's home: where its relative paths begin (GET_DOMAIN_PATH)."""
    return f"/local/domain/{domid}"


def absolute(path: str, domid: int) -> str:
    """`path` as seen from `domid`'s home; absolute and special ones as they are."""
    return path if path[:1] in ("/", "@") else f"/local/domain/{domid}/{path}"


def parent(path: str) -> str:
    """The node above; `/` is its own parent."""
    return path[: path.rindex("/")] or "/"


def join(base: str, *names: str) -> str:
    """`base/name/...`, whatever slashes `base` ends in."""
    return "/".join([base.rstrip("/"), *names]) if names else base


def check_path(path: str) -> str:
    """`path`, or UsageError that says what is wrong with it. For clients: absolute, relative or special."""
    if not path:
        raise UsageError("empty path")
    if len(path) > ABS_PATH_MAX:
        raise UsageError(f"path of {len(path)} characters, the limit is {ABS_PATH_MAX}")
    if not (_ABSOLUTE.fullmatch(path) or _RELATIVE.fullmatch(path) or _SPECIAL.fullmatch(path)):
        raise UsageError(f"path {path!r}: only letters, digits and -/_@, no // and no / at the end")
    return path
