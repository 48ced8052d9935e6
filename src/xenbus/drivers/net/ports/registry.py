"""From the text of a target to an open Port; what every port takes, whatever its scheme: a capture.

Knows no scheme by name: see targets.py.
"""

from __future__ import annotations

import errno

from xenbus.drivers.net.capture import captured
from xenbus.drivers.net.packet import Port
from xenbus.drivers.targets import SchemeRegistry, Target, split_target
from xenbus.errors import UsageError, XenbusError

__all__ = ["PortError", "Target", "open_port", "parse_target", "port_scheme", "scheme_names"]


class PortError(XenbusError):
    """A far side could not be opened: `name` is the errno's name (EPERM, EBUSY, ENODEV, ...)."""

    def __init__(self, name: str, target: str, detail: str) -> None:
        self.name = name
        self.target = target
        super().__init__(f"{target}: {name}: {detail}")


_schemes: SchemeRegistry[Target, Port] = SchemeRegistry("port", "xenbus.drivers.net.ports.schemes")
port_scheme = _schemes.register
scheme_names = _schemes.names


def parse_target(text: str) -> Target:
    """Take a target apart. UsageError."""
    parts = split_target(text)
    if parts is None or "\0" in text:
        raise UsageError(f"{text!r} is no far side of a net device (tap:NAME, switch:NAME, packet:)")
    return Target(text, *parts)


async def open_port(target: str) -> Port:
    """Open a target: `tap:vif1.0?bridge=br0`, `switch:lan`, `packet:`.

    What every one of them takes: `capture=FILE` (pcapng) and `capture-max=SIZE`.

    UsageError for a text that makes no sense, PortError for what cannot be opened.
    """
    parsed = parse_target(target)
    capture, limit = parsed.options.pop("capture", ""), parsed.options.pop("capture-max", "")
    if limit and not capture:
        raise UsageError(f"{target}: capture-max goes with capture=FILE")
    port = await _schemes.open(parsed)
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
