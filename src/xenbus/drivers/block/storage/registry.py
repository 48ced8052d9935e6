"""From the text of a target to an open Storage: schemes register themselves, one file each.

Knows how a target is written. Knows no scheme by name, but that a bare path is a `file`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from xenbus.drivers.block.storage.interface import Storage, check_sector_size
from xenbus.errors import UsageError


@dataclass(slots=True)
class Target:
    """A target taken apart: `scheme:rest?options`. `rest` is not unquoted: each scheme knows its own way."""

    text: str
    scheme: str
    rest: str
    options: dict[str, str] = field(default_factory=dict)
    readonly: bool = False
    sector_size: int | None = None

    def finish_options(self) -> None:
        """Refuse options that no one took: a misspelt one must not be silently ignored."""
        if self.options:
            raise UsageError(f"{self.text}: unknown option {', '.join(sorted(self.options))}")


Opener = Callable[[Target], Awaitable[Storage]]
_openers: dict[str, Opener] = {}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")


def storage_scheme(*names: str) -> Callable[[Opener], Opener]:
    """Register an opener for targets that start with `NAME:`."""

    def register(opener: Opener) -> Opener:
        for name in names:
            if name in _openers:
                raise UsageError(f"storage scheme {name}: registered twice")
            _openers[name] = opener
        return opener

    return register


def _load_schemes() -> None:
    package = importlib.import_module("xenbus.drivers.block.storage.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def scheme_names() -> list[str]:
    """The names that targets may start with."""
    _load_schemes()
    return sorted(_openers)


def parse_target(text: str, *, readonly: bool = False, sector_size: int | None = None) -> Target:
    """Take a target apart. A path (no scheme, or it starts with `/` or `.`) is taken as it stands.

    `?sector-size=N` is understood for every scheme. Raises UsageError.
    """
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not a storage target")
    match = None if text[0] in "/." else _SCHEME.match(text)
    if match is None:
        target = Target(text, "file", text)
    else:
        rest, _, query = text[match.end() :].partition("?")
        try:
            options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        except ValueError:
            raise UsageError(f"{text}: options are written ?name=value&name=value") from None
        target = Target(text, match.group(1), rest, options)
    asked = target.options.pop("sector-size", None)
    if asked is not None and sector_size is None:
        if not asked.isascii() or not asked.isdigit():
            raise UsageError(f"{text}: sector-size={asked} is not a number")
        sector_size = int(asked)
    target.sector_size = None if sector_size is None else check_sector_size(sector_size)
    target.readonly = readonly
    return target


async def open_storage(target: str, *, readonly: bool = False, sector_size: int | None = None) -> Storage:
    """Open a target: `/path`, `file:/path`, `memory:16M`, `nbd://host:port/export`,
    `nbd+unix:///export?socket=/path`; what is not a path may carry `?sector-size=4096`.

    Raises UsageError for a text that makes no sense, StorageError for what cannot be opened.
    """
    parsed = parse_target(target, readonly=readonly, sector_size=sector_size)
    if parsed.scheme not in _openers:
        _load_schemes()
    opener = _openers.get(parsed.scheme)
    if opener is None:
        raise UsageError(
            f"{target}: no storage scheme {parsed.scheme} (there are {', '.join(scheme_names())})"
        )
    return await opener(parsed)
