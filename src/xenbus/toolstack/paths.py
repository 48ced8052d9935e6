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

    kind:      the device's type on the front bus, `vbd`, `vif`, ...
    devid:     its number at the front end, e.g. 51712 for xvda
    back_kind: its type on the back bus where that is another one: Linux's own back end claims every `vbd`, so
               that xbbd beside it serves under a type of its own
    """

    kind: str
    devid: int
    front_domid: int
    back_domid: int
    back_kind: str = ""

    @classmethod
    def of_back(cls, kind: str, path: str) -> DevicePaths:
        """From `/local/domain/<back>/backend/<type>/<front>/<devid>`. ValueError if it is none."""
        match path.split("/"):
            case ["", "local", "domain", back, "backend", back_kind, front, devid]:
                own = "" if back_kind == kind else back_kind
                return cls(kind, int(devid), int(front), int(back), own)
        raise ValueError(f"{path!r} is no back end's directory")

    @property
    def _served_as(self) -> str:
        return f"backend/{self.back_kind or self.kind}/{self.front_domid}/{self.devid}"

    @property
    def front(self) -> str:
        return f"{domain_path(self.front_domid)}/device/{self.kind}/{self.devid}"

    @property
    def back(self) -> str:
        return f"{domain_path(self.back_domid)}/{self._served_as}"

    @property
    def record(self) -> str:
        return f"{libxl_path(self.front_domid)}/device/{self.kind}/{self.devid}"

    @property
    def back_error(self) -> str:
        """Where the back end's driver leaves its error text (xenbus_dev_error)."""
        return f"{domain_path(self.back_domid)}/error/{self._served_as}/error"

    @property
    def front_error(self) -> str:
        return f"{domain_path(self.front_domid)}/error/device/{self.kind}/{self.devid}/error"
