"""How a target is written, `scheme:rest?options`, and what opens one: schemes register themselves.

Knows texts and a folder of modules; knows no scheme by name, and not what is opened.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import parse_qsl

from xenbus.errors import UsageError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")


@dataclass(slots=True)
class Target:
    """A target taken apart. `rest` is not unquoted: each scheme knows its own way."""

    text: str
    scheme: str
    rest: str
    options: dict[str, str] = field(default_factory=dict)

    def finish_options(self) -> None:
        """Refuse options that no one took: a misspelt one must not be silently ignored."""
        if self.options:
            raise UsageError(f"{self.text}: unknown option {', '.join(sorted(self.options))}")


def split_target(text: str) -> tuple[str, str, dict[str, str]] | None:
    """(scheme, rest, options), or None for a text that begins with no `scheme:`. UsageError."""
    match = _SCHEME.match(text)
    if match is None:
        return None
    rest, _, query = text[match.end() :].partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise UsageError(f"{text}: options are written ?name=value&name=value") from None
    return match.group(1), rest, options


G = TypeVar("G", bound=Target)
T = TypeVar("T")


class SchemeRegistry(Generic[G, T]):
    """Openers by scheme.

    kind:   of what, for messages: "storage", "port"
    folder: the package whose modules register themselves when they are imported, which is when one is sought
    """

    def __init__(self, kind: str, folder: str) -> None:
        self._kind = kind
        self._folder = folder
        self._openers: dict[str, Callable[[G], Awaitable[T]]] = {}

    def register(self, *names: str) -> Callable[[Callable[[G], Awaitable[T]]], Callable[[G], Awaitable[T]]]:
        """Decorates an opener for targets that start with `NAME:`. UsageError for a name that is taken."""

        def register(opener: Callable[[G], Awaitable[T]]) -> Callable[[G], Awaitable[T]]:
            for name in names:
                if name in self._openers:
                    raise UsageError(f"{self._kind} scheme {name}: registered twice")
                self._openers[name] = opener
            return opener

        return register

    def names(self) -> list[str]:
        """The names that targets may start with."""
        package = importlib.import_module(self._folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        return sorted(self._openers)

    async def open(self, target: G) -> T:
        """UsageError for a scheme that nobody registered; whatever its opener raises."""
        if target.scheme not in self._openers:
            names = self.names()
            if target.scheme not in names:
                raise UsageError(
                    f"{target.text}: no {self._kind} scheme {target.scheme} (there are {', '.join(names)})"
                )
        return await self._openers[target.scheme](target)
