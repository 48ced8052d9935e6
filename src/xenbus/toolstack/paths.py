"""The store paths that a toolstack writes, as docs/misc/xenstore-paths.pandoc has them. Strings only."""

from __future__ import annotations

from dataclasses import dataclass


def domain_path(domid: int) -> str:
    """`/local/domain/<domid>`, the root that a domain's relative paths start from."""
    return f"/local/domain/{domid}"


def libxl_path(domid: int) -> str:
    """`/libxl/<domid>`: the toolstack's own record of a domain, which no guest can write."""
    return f"/libxl/{domid}"


@dataclass(slots=True, frozen=True)
class DevicePaths:
    """Where the two halves of one device and the toolstack's record of it are.

    kind:  the device's type on the bus, `vbd`, `vif`, ...
    devid: its number at the front end, e.g. 51712 for xvda
    """

    kind: str
    devid: int
    front_domid: int
    back_domid: int

    @property
    def front(self) -> str:
        return f"{domain_path(self.front_domid)}/device/{self.kind}/{self.devid}"

    @property
    def back(self) -> str:
        return f"{domain_path(self.back_domid)}/backend/{self.kind}/{self.front_domid}/{self.devid}"

    @property
    def record(self) -> str:
        return f"{libxl_path(self.front_domid)}/device/{self.kind}/{self.devid}"

    @property
    def back_error(self) -> str:
        """Where the back end's driver leaves its error text (xenbus_dev_error)."""
        return (
            f"{domain_path(self.back_domid)}/error/backend/{self.kind}/{self.front_domid}/{self.devid}/error"
        )

    @property
    def front_error(self) -> str:
        return f"{domain_path(self.front_domid)}/error/device/{self.kind}/{self.devid}/error"
