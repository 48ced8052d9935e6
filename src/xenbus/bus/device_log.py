"""What the log says of one device: by its name, cut to a length and held to a rate.

Knows no device and no clock of its own. The peer may be the cause of any line: one that does wrong as fast as
it can is named at once, and then now and then, and does not fill the disk of the domain that serves it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

TEXT_MAX: Final = 400  # characters of a line's text
# Lines of one level that a device has at once, and seconds until it has one more.
BURST: Final = 20
EVERY: Final = 10.0
_LAST: Final = f" (the last of many: one in {EVERY:g} s from here on)"


class Allowance:
    """The lines that one device may still write, by level."""

    __slots__ = ("_levels",)

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def take(self, level: int, now: float) -> str | None:
        """None: this line is left out. Otherwise what to say after its text, of those that were."""
        found = self._levels.get(level)
        if found is None:
            found = self._levels[level] = _Level(now)
        return found.take(now)


class _Level:
    __slots__ = ("left_out", "since", "spent")

    def __init__(self, now: float) -> None:
        self.since = now  # `spent` is as it was then
        self.spent = 0
        self.left_out = 0

    def take(self, now: float) -> str | None:
        back = min(self.spent, int((now - self.since) / EVERY))
        self.spent -= back
        self.since = self.since + back * EVERY if self.spent else now
        if self.spent >= BURST:
            self.left_out += 1
            return None
        self.spent += 1
        left_out, self.left_out = self.left_out, 0
        if left_out:
            return f" ({left_out} more were left out)"
        return _LAST if self.spent == BURST else ""


class DeviceLog(logging.LoggerAdapter[logging.Logger]):
    """name: the device's; allowance: its own, kept by it; now: seconds of any steady clock"""

    def __init__(
        self, logger: logging.Logger, name: str, allowance: Allowance, now: Callable[[], float]
    ) -> None:
        super().__init__(logger, {})
        self._name = name
        self._allowance = allowance
        self._now = now

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if not self.isEnabledFor(level):
            return
        after = self._allowance.take(level, self._now())
        if after is None:
            return
        text = str(msg) % args if args else str(msg)
        if len(text) > TEXT_MAX:
            text = f"{text[:TEXT_MAX]}..."
        if not text.isprintable():  # a line is one line, and nothing to a terminal
            text = text.encode("unicode_escape").decode()
        self.logger.log(level, "%s: %s%s", self._name, text, after, **kwargs)
