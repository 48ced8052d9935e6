"""What an exit code of `xenbus` means, and which exception ends in which. One table."""

from __future__ import annotations

from enum import IntEnum

from xenbus.errors import DeadlineError, Denied, LinkDown, NoEntry, NotFound, UsageError, XenbusError


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    TIMEOUT = 5
    NOT_RUNNING = 6


INTERRUPTED = 130  # as shells have it: 128 and the signal
BROKEN_PIPE = 141

HELP = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 not allowed, 5 a deadline passed, "
    "6 nobody is running there (host or store)."
)

_BY_TYPE: tuple[tuple[type[XenbusError], Exit], ...] = (
    (UsageError, Exit.USAGE),
    (NoEntry, Exit.NOT_FOUND),
    (NotFound, Exit.NOT_FOUND),
    (Denied, Exit.DENIED),
    (DeadlineError, Exit.TIMEOUT),
    (LinkDown, Exit.NOT_RUNNING),
)
# Errors of other kinds (StorageError, HypervisorError, StoreError) that carry an errno's name.
_BY_ERRNO = {
    "EINVAL": Exit.USAGE,
    "ENOENT": Exit.NOT_FOUND,
    "EACCES": Exit.DENIED,
    "EPERM": Exit.DENIED,
    "ETIMEDOUT": Exit.TIMEOUT,
}
_BY_KIND = {kind.__name__: code for kind, code in _BY_TYPE}


def code_of(error: BaseException) -> Exit | None:
    """None for what is no answer but a bug: it keeps its traceback.

    An error that came through a control socket says its kind there (`kind`).
    """
    if not isinstance(error, XenbusError):
        return Exit.FAILED if isinstance(error, OSError) else None
    for kind, code in _BY_TYPE:
        if isinstance(error, kind):
            return code
    by_kind = _BY_KIND.get(str(getattr(error, "kind", "")))
    return by_kind or _BY_ERRNO.get(str(getattr(error, "name", "")), Exit.FAILED)


def line_of(error: BaseException) -> str:
    """The error in one line that can be printed on any terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
