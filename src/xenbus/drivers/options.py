"""What a toolstack may write of what a back end offers, device by device: a table of nodes, read and checked.

Knows nodes by name and numbers in ranges; each driver has its own table, and what it publishes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xenbus.drivers.nodes import number
from xenbus.errors import UsageError


@dataclass(slots=True, frozen=True)
class Option:
    """name: of the field of a driver's Options, and of the driver's class attribute that has the default
    key: of the node in the back end's directory; least, most: what it may be"""

    name: str
    key: str
    least: int = 0
    most: int = 1


def read_options(
    table: Iterable[Option], driver: type, node: str, said: Mapping[str, bytes | None]
) -> dict[str, int]:
    """The value of each option, by name.

    driver: has the defaults; said: the values of every key of the table, None where there is none.
    UsageError that names the node, and what it may be.
    """
    values: dict[str, int] = {}
    for option in table:
        raw = said[option.key]
        if raw is None:
            values[option.name] = int(getattr(driver, option.name))
            continue
        try:
            value = number(raw)
        except ValueError as error:
            raise UsageError(f"{node}/{option.key}: {error}") from None
        if not option.least <= value <= option.most:
            raise UsageError(f"{node}/{option.key}: {value}, {option.least} to {option.most} it can be")
        values[option.name] = value
    return values
