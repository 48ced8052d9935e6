"""A real Xen host, or a guest of one, as the store shows it: what commands use of it, as of an embedded host.

Knows the store and the control sockets of our own daemons, if there are any; creates and ends no domain.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from xenbus.bus.state import Side
from xenbus.domain.host import DomainState
from xenbus.domain.layout import CONTROL_DOMAIN, check_name
from xenbus.domain.rpc import RpcClient
from xenbus.errors import Denied, LinkDown, NoEntry, NotFound, UsageError, XenbusError
from xenbus.newbus.sysctl import at_or_below
from xenbus.toolstack.domains import DomainInfo
from xenbus.toolstack.paths import domain_path
from xenbus.toolstack.storetree import domain_tree, shown, sysctl, with_live
from xenbus.xenstore.client import Client

STORE_VARIABLE = "XENBUS_STORE"  # an address as `Client.connect` takes it
RUN_VARIABLE = "XENBUS_RUN"
RUN_DIRECTORY = "/run/xenbus"
# What says which store: ours, then libxenstore's own (transport.default_address).
_STORE_VARIABLES = (STORE_VARIABLE, "XENSTORED_PATH", "XENSTORED_RUNDIR")
# Where Linux's own driver has a kind of device, ours serves it under another type on the back bus.
# (Not by import: `xenbus tree` has no use for drivers.)
OWN_TYPES = {"vbd": ("xbbd",), "vif": ("xnb",), "console": ("xcb",)}
_SIGNS = ("/dev/xen/xenbus", "/proc/xen/capabilities")


def on_xen() -> bool:
    """Whether this machine is a Xen domain, or the environment names a store."""
    return any(os.environ.get(name) for name in _STORE_VARIABLES) or any(
        Path(sign).exists() for sign in _SIGNS
    )


def run_directory() -> Path:
    """Where our daemons on a real Xen keep their control sockets, one a domain, by its name."""
    return Path(os.environ.get(RUN_VARIABLE) or RUN_DIRECTORY)


class AnyHost(Protocol):
    """What `Toolstack` and `XenHost` have in common."""

    @property
    def store(self) -> Client:
        """Domain 0's connection, or a guest's own."""
        ...

    async def domains(self) -> list[DomainInfo]: ...
    async def find(self, name: str) -> DomainInfo: ...
    async def back_type(self, domain: DomainInfo, kind: str) -> str:
        """Under which type that domain's back bus serves devices of this kind."""
        ...

    def control_socket(self, domain: str) -> Path: ...
    async def ask(self, domain: str, method: str, /, *, timeout: float = 30.0, **params: Any) -> Any: ...


class XenHost:
    """`async with await XenHost.open() as host: await host.domains()`."""

    def __init__(self, store: Client, run: Path) -> None:
        self._store = store
        self.run = run
        self._domids: dict[str, int] = {}  # by name, as they were listed last

    @classmethod
    async def open(cls, store: str | None = None, run: Path | None = None) -> XenHost:
        """The store at an address; XENBUS_STORE, else where libxenstore looks. LinkDown if nobody answers."""
        address = store or os.environ.get(STORE_VARIABLE) or None
        return cls(await Client.connect(address), run or run_directory())

    @property
    def store(self) -> Client:
        return self._store

    async def close(self) -> None:
        await self._store.close()

    async def __aenter__(self) -> XenHost:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def domains(self) -> list[DomainInfo]:
        """By domid; a guest, which may list nobody, finds itself alone."""
        try:
            found = await self._store.directory("/local/domain")
            domids = sorted(int(name) for name in found if name.isdecimal())
        except Denied:
            domids = [await self._own_domid()]
        except NoEntry:
            domids = []
        infos = await asyncio.gather(*map(self._info, domids))
        self._domids = {info.name: info.domid for info in infos}
        return list(infos)

    async def _own_domid(self) -> int:
        """From our own directory, which relative paths start from."""
        text = await self._store.read_str("domid")
        if not text.isdecimal():
            raise UsageError(f"domid: {text!r} is no number")
        return int(text)

    async def _info(self, domid: int) -> DomainInfo:
        try:
            name = shown(await self._store.read_str(f"{domain_path(domid)}/name"))
        except (NoEntry, Denied):
            name = CONTROL_DOMAIN if domid == 0 else ""
        # The store does not say whether it runs: who has nodes there is taken to.
        return DomainInfo(domid, name or str(domid), DomainState.RUNNING, "", None)

    async def find(self, name: str) -> DomainInfo:
        """By name or by number. NotFound if there is none."""
        for info in await self.domains():
            if name in (info.name, str(info.domid)):
                return info
        raise NotFound(f"no domain {name!r}")

    async def back_type(self, domain: DomainInfo, kind: str) -> str:
        """What its daemon says: the kind itself where it claims that, otherwise a type of ours.

        LinkDown if no daemon of ours serves that domain, UsageError if it has no driver for this kind.
        """
        try:
            info = await self.ask(domain.name, "info")
        except LinkDown as error:
            raise LinkDown(f"no back end of ours in {domain.name}: no `xenbus serve`? ({error})") from None
        served = [str(name) for name in info.get("serves", {}).get(Side.BACK.value, [])]
        for back_type in (kind, *OWN_TYPES.get(kind, ())):
            if back_type in served:
                return str(back_type)
        raise UsageError(f"`xenbus serve` in {domain.name} has no driver for {kind}; it serves {served}")

    async def ask(self, domain: str, method: str, /, *, timeout: float = 30.0, **params: Any) -> Any:
        """Call the control socket of our own daemon for a domain. LinkDown if there is none, but for `tree`
        and `sysctl`: what no daemon of ours drives the store tells."""
        if method == "tree":
            return await self._tree(domain, timeout)
        if method == "sysctl":
            return await self._sysctl(domain, params.get("name", ""), timeout)
        return await self._ask_daemon(domain, method, timeout, **params)

    async def _ask_daemon(self, domain: str, method: str, timeout: float, **params: Any) -> Any:
        async with await RpcClient.connect(self.control_socket(domain)) as connection:
            return await connection.call(method, timeout=timeout, **params)

    async def _tree(self, domain: str, timeout: float) -> dict[str, Any]:
        domid = self._domids.get(domain)
        if domid is None:
            domid = (await self.find(domain)).domid
        stored = await domain_tree(self._store, domid)
        try:
            live = await self._ask_daemon(domain, "tree", timeout)
        except LinkDown:
            return stored
        except XenbusError as error:
            words = f"the daemon at {self.control_socket(domain)} does not answer: {error}"
            return stored | {"lines": [words, *stored["lines"]], "error": words}
        return with_live(stored, live)

    async def _sysctl(self, domain: str, name: str, timeout: float) -> list[tuple[str, object]]:
        tree = await self._tree(domain, timeout)
        values = sysctl(tree)
        if "error" not in tree:  # it hangs: once is enough
            with suppress(LinkDown):
                values += [(key, value) for key, value in await self._ask_daemon(domain, "sysctl", timeout)]
        found = [(key, value) for key, value in values if at_or_below(key, name)]
        if name and not found:
            raise NotFound(f"unknown oid {name!r}")
        return found

    def control_socket(self, domain: str) -> Path:
        try:
            return self.run / check_name(domain)
        except UsageError:  # xl takes any name; we serve domains of ours alone
            raise LinkDown(f"no daemon of ours serves {domain!r}") from None
