"""From the text of a target to an open Storage; what every storage takes, whatever its scheme: sectors' size.

Knows no scheme by name (see targets.py), but that a bare path is a `file`.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbus.drivers import targets
from xenbus.drivers.block.storage.interface import Storage, check_sector_size
from xenbus.errors import UsageError


@dataclass(slots=True)
class Target(targets.Target):
    """readonly: nobody will write; sector_size: in bytes, None where it was not said"""

    readonly: bool = False
    sector_size: int | None = None


_schemes: targets.SchemeRegistry[Target, Storage] = targets.SchemeRegistry(
    "storage", "xenbus.drivers.block.storage.schemes"
)
storage_scheme = _schemes.register
scheme_names = _schemes.names


def parse_target(text: str, *, readonly: bool = False, sector_size: int | None = None) -> Target:
    """Take a target apart. A path (no scheme, or it starts with `/` or `.`) is taken as it stands.

    `?sector-size=N` is understood for every scheme. Raises UsageError.
    """
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not a storage target")
    target = Target(text, *(targets.split_target(text) or ("file", text)))
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
    return await _schemes.open(parse_target(target, readonly=readonly, sector_size=sector_size))
