"""From the text of a target to an open Port: schemes register themselves, one file each.

Knows how a target is written, as block's storage registry does; knows no scheme by name.
"""

from __future__ import annotations

import errno
import importlib
import pkgutil
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from xenbus.drivers.net.capture import captured
from xenbus.drivers.net.packet import Port
from xenbus.errors import UsageError, XenbusError


class PortError(XenbusError):
    """A far side could not be opened: `name` is the errno's name (EPERM, EBUSY, ENODEV, ...)."""

    def __init__(self, name: str, target: str, detail: str) -> None:
        self.name = name
        self.target = target
        super().__init__(f"{target}: {name}: {detail}")


@dataclass(slots=True)
class Target:
    """A target taken apart: `scheme:rest?options`."""

    text: str
    scheme: str
    rest: str
    options: dict[str, str] = field(default_factory=dict)

    def finish_options(self) -> None:
        """Refuse options that no one took: a misspelt one must not be silently ignored."""
        if self.options:
            raise UsageError(f"{self.text}: unknown option {', '.join(sorted(self.options))}")


Opener = Callable[[Target], Awaitable[Port]]
_openers: dict[str, Opener] = {}
_TARGET = re.compile(r"([a-z][a-z0-9-]*):([^?\0]*)(?:\?(.+))?")


def port_scheme(*names: str) -> Callable[[Opener], Opener]:
    """Register an opener for targets that start with `NAME:`."""

    def register(opener: Opener) -> Opener:
        for name in names:
            if name in _openers:
                raise UsageError(f"port scheme {name}: registered twice")
            _openers[name] = opener
        return opener

    return register


def _load_schemes() -> None:
    package = importlib.import_module("xenbus.drivers.net.ports.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def scheme_names() -> list[str]:
    """The names that targets may start with."""
    _load_schemes()
    return sorted(_openers)


def parse_target(text: str) -> Target:
    """Take a target apart. UsageError."""
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no far side of a net device (tap:NAME, switch:NAME, packet:)")
    scheme, rest, query = match.groups()
    try:
        options = dict(parse_qsl(query or "", keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise UsageError(f"{text}: options are written ?name=value&name=value") from None
    return Target(text, scheme, rest, options)


async def open_port(target: str) -> Port:
    """Open a target: `tap:vif1.0?bridge=br0`, `switch:lan`, `packet:`.

    What every one of them takes: `capture=FILE` (pcapng) and `capture-max=SIZE`.

    UsageError for a text that makes no sense, PortError for what cannot be opened.
    """
    parsed = parse_target(target)
    if parsed.scheme not in _openers:
        _load_schemes()
    opener = _openers.get(parsed.scheme)
    if opener is None:
        raise UsageError(f"{target}: no port scheme {parsed.scheme} (there are {', '.join(scheme_names())})")
    capture, limit = parsed.options.pop("capture", ""), parsed.options.pop("capture-max", "")
    port = await opener(parsed)
    if not capture:
        return port
    try:
        return captured(port, capture, limit)
    except OSError as error:
        await port.close()
        code = errno.errorcode.get(error.errno or 0, "EIO")
        raise PortError(code, target, f"capture to {capture}: {error.strerror}") from None
    except BaseException:
        await port.close()
        raise
