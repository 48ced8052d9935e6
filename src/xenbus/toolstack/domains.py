"""Create, destroy, suspend, resume and restore domains: what libxl does with domctl and the store.

Runs in any process that may open domain 0's store socket and the host's socket: the command line, or
domain 0's own monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xenbus.domain.host import DomainState
from xenbus.domain.layout import HostLayout, check_name
from xenbus.domain.rpc import RpcClient, is_missing
from xenbus.errors import DeadlineError, LinkDown, NotFound, StoreError, UsageError, XenbusError
from xenbus.toolstack.atomic import atomically
from xenbus.toolstack.devices import (
    DeviceSpec,
    ask_to_close,
    list_devices,
    remove_device,
    wait_closed,
    write_device,
)
from xenbus.toolstack.paths import DevicePaths, domain_path, libxl_path
from xenbus.xenstore.client import Client, Transaction
from xenbus.xenstore.wire import Access, Perm

log = logging.getLogger(__name__)

SHUTDOWN_DEADLINE = 30.0  # seconds for a guest to obey control/shutdown
FEATURE_DEADLINE = 5.0  # seconds for a guest to say what it obeys
CLOSE_DEADLINE = 10.0  # seconds for back ends to let go of a dead guest's devices
FORGET_ROUNDS = 10
BURY_AGAIN = 5.0  # seconds until a burial that failed is tried again
# The ring page's frame number means nothing: the daemon maps grant 1 (docs/misc/xenstore.txt, INTRODUCE).
NO_GFN = 0


@dataclass(slots=True, frozen=True)
class DomainInfo:
    domid: int
    name: str
    state: str
    reason: str
    pid: int | None


class Toolstack:
    """A control domain's two connections, and what can be done with them.

    `async with await Toolstack.open(root) as toolstack: await toolstack.create("guest")`
    """

    def __init__(self, layout: HostLayout, host: RpcClient, store: Client) -> None:
        self.layout = layout
        self.host = host
        self.store = store

    @classmethod
    async def open(cls, root: Path) -> Toolstack:
        """LinkDown if no host runs there."""
        layout = HostLayout(root)
        try:
            host = await RpcClient.connect(layout.host_socket)
        except LinkDown as error:
            raise LinkDown(f"{error}; is `xenbus up` running?") from None
        try:
            store = await Client.connect(f"unix:{layout.store_socket}")
        except BaseException:
            await host.close()
            raise
        return cls(layout, host, store)

    async def close(self) -> None:
        await self.store.close()
        await self.host.close()

    async def __aenter__(self) -> Toolstack:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- finding -------------------------------------------------------------------------------------

    async def domains(self) -> list[DomainInfo]:
        return [DomainInfo(**entry) for entry in await self.host.call("list")]

    async def find(self, name: str) -> DomainInfo:
        """By name or by number. NotFound if there is none."""
        for info in await self.domains():
            if name in (info.name, str(info.domid)):
                return info
        raise NotFound(f"no domain {name!r}")

    # -- life ----------------------------------------------------------------------------------------

    async def create(self, name: str, devices: Sequence[DeviceSpec] = ()) -> DomainInfo:
        """A running guest, which finds `devices` (for whichever domid they were) at its boot.

        What was made is unmade if a step fails.
        """
        check_name(name)
        making = asyncio.ensure_future(self.host.call("create", name=name))
        try:
            made = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The host may have made it already: only its answer says which one there is to unmake.
            with contextlib.suppress(XenbusError):
                await self.destroy((await making)["domid"])
            raise
        domid = made["domid"]
        try:
            await self._introduce(domid, name, made["store_port"])
            for spec in devices:
                await write_device(self.store, spec.rehomed(front_domid=domid))
            return DomainInfo(**await self.host.call("unpause", domid=domid, timeout=60.0))
        except BaseException:
            await self.destroy(domid)
            raise

    async def _introduce(self, domid: int, name: str, store_port: int) -> None:
        """INTRODUCE, then the nodes: an owner has to be known to the daemon before it can own."""
        await self.store.introduce(domid, NO_GFN, store_port)
        root = domain_path(domid)
        private, shown = [Perm(Access.NONE, domid)], [Perm(Access.NONE, 0), Perm(Access.READ, domid)]
        directories = {
            "": shown,
            "control": shown,
            "device": shown,
            # Back ends of a driver domain, and what its drivers report, are its own (xenstore-paths).
            "backend": private,
            "error": private,
            "data": private,
        }
        writable = {
            "control/shutdown": "",
            "control/feature-suspend": "",
            "control/feature-poweroff": "",
            "control/feature-reboot": "",
        }

        async def write(tx: Transaction) -> None:
            for directory, perms in directories.items():
                path = f"{root}/{directory}".rstrip("/")
                await tx.mkdir(path)
                await tx.set_perms(path, perms)
            for leaf, value in {"name": name, "domid": str(domid)}.items():
                await tx.write(f"{root}/{leaf}", value)
            for leaf, value in writable.items():
                await tx.write(f"{root}/{leaf}", value)
                await tx.set_perms(f"{root}/{leaf}", private)
            await tx.mkdir(libxl_path(domid))
            await tx.write(f"{libxl_path(domid)}/name", name)

        await atomically(self.store, write)

    async def destroy(self, domid: int) -> None:
        """At once, whatever the guest thinks of it: process, devices, nodes. Idempotent."""
        if domid == 0:
            raise UsageError("domain 0 ends with its host")
        devices = await list_devices(self.store, domid)
        try:
            await self.host.call("destroy", domid=domid)
        except XenbusError as error:
            if not is_missing(error):
                raise
        await self._forget(domid, devices)

    async def _forget(self, domid: int, devices: list[DeviceSpec]) -> None:
        """The store's part of an end: front halves go, back ends close, then nothing is left."""
        await self._close_backends(devices)
        try:
            await self.store.release(domid)
        except StoreError as error:
            if error.name not in {"ENOENT", "EINVAL"}:  # not introduced (any more)
                raise
        for _ in range(FORGET_ROUNDS):
            if await atomically(self.store, lambda tx: _remove_domain(tx, domid)):
                return
            # Somebody attached a device meanwhile; once the name is gone nobody can.
            await self._close_backends(await list_devices(self.store, domid))
        raise XenbusError(f"domain {domid} is given devices faster than they can be taken away")

    async def _close_backends(self, devices: list[DeviceSpec]) -> None:
        """All together, within one deadline; then their nodes go, closed or not."""
        for spec in devices:
            await self._mark_offline(spec.paths)
        waits = (wait_closed(self.store, spec.paths, CLOSE_DEADLINE) for spec in devices)
        for spec, closed in zip(devices, await asyncio.gather(*waits), strict=True):
            if not closed:
                log.warning("%s: still not closed after %g s; removed", spec.paths.back, CLOSE_DEADLINE)
            await remove_device(self.store, spec.paths)

    async def _mark_offline(self, paths: DevicePaths) -> None:
        async def mark(tx: Transaction) -> None:
            await ask_to_close(tx, paths, dead=True)
            if await tx.exists(paths.front):
                await tx.rm(paths.front)

        await atomically(self.store, mark)

    # -- asking the guest ----------------------------------------------------------------------------

    async def shutdown(self, domid: int, reason: str, timeout: float = SHUTDOWN_DEADLINE) -> None:
        """Write control/shutdown and wait for the guest's acknowledgement (it empties the node).

        `reason`: poweroff, reboot, suspend. UsageError if the guest does not say that it can, or is no guest.
        """
        if domid == 0:
            raise UsageError("domain 0 ends with its host")
        info = await self.find(str(domid))
        if info.state != DomainState.RUNNING:
            raise UsageError(f"domain {domid} ({info.name}) is {info.state}: it can't obey {reason!r}")
        control = f"{domain_path(domid)}/control"
        feature = f"feature-{'poweroff' if reason == 'halt' else reason}"
        try:
            # A guest that has just come up says so in a moment.
            await self.store.wait_for(
                f"{control}/{feature}", lambda v: v == b"1", min(timeout, FEATURE_DEADLINE)
            )
        except DeadlineError:
            raise UsageError(f"domain {domid} does not say {feature}: it would not obey {reason!r}") from None
        await self.store.write(f"{control}/shutdown", reason)
        try:
            await self.store.wait_for(f"{control}/shutdown", lambda value: not value, timeout)
        except DeadlineError:
            # A request that nobody took must not be obeyed long after its sender gave up.
            if await self._withdraw(f"{control}/shutdown", reason):
                raise DeadlineError(
                    f"{reason!r} to be acknowledged", f"domain {domid} ({control}/shutdown)", timeout
                ) from None

    async def _withdraw(self, path: str, reason: str) -> bool:
        """False if the request was taken at the last moment."""

        async def withdraw(tx: Transaction) -> bool:
            waits = await tx.exists(path) and await tx.read(path) == reason.encode()
            if waits:
                await tx.write(path, "")
            return waits

        return await atomically(self.store, withdraw)

    async def poweroff(self, domid: int, timeout: float = SHUTDOWN_DEADLINE) -> None:
        """Orderly: the guest closes its devices and ends; then its traces go."""
        end = time.monotonic() + timeout
        await self.shutdown(domid, "poweroff", timeout)
        seconds = max(0.1, end - time.monotonic())
        try:
            await self.host.call("wait_ended", domid=domid, timeout=seconds + 5.0, seconds=seconds)
        except XenbusError as error:
            if not is_missing(error):  # domain 0's monitor was faster
                raise
        await self.destroy(domid)

    async def suspend(self, domid: int, timeout: float = SHUTDOWN_DEADLINE) -> DomainInfo:
        """Until the guest is parked in its suspend call."""
        end = time.monotonic() + timeout
        await self.shutdown(domid, "suspend", timeout)
        seconds = max(0.1, end - time.monotonic())
        return DomainInfo(
            **await self.host.call("wait_suspended", domid=domid, seconds=seconds, timeout=seconds + 5.0)
        )

    async def resume(self, domid: int) -> DomainInfo:
        """The suspend is cancelled: the guest goes on as if nothing had been."""
        return DomainInfo(**await self.host.call("resume", domid=domid))

    async def restore(self, domid: int, *, back_domid: int | None = None) -> DomainInfo:
        """As after `xl restore`: another domid, new nodes, and back ends anew, in `back_domid` if given."""
        info = await self.find(str(domid))
        if info.state != DomainState.SUSPENDED:
            raise UsageError(f"domain {domid} is {info.state}, not suspended")
        devices = await list_devices(self.store, domid)
        homes = {spec.paths.back_domid if back_domid is None else back_domid for spec in devices}
        for home in homes if back_domid is None else homes | {back_domid}:
            await self.find(str(home))
        # From here on the guest is ours: of two restores, or a restore and a resume, one gets this far.
        made = await self.host.call("rebirth", domid=domid)
        new = made["domid"]
        try:
            # One disk has one writer: the old back ends let go before the new ones open.
            await self._forget(domid, devices)
            await self._introduce(new, info.name, made["store_port"])
            for spec in devices:
                await write_device(self.store, spec.rehomed(front_domid=new, back_domid=back_domid))
            return DomainInfo(**await self.host.call("resume", domid=new))
        except BaseException:
            log.error("domain %d (%s) could not be restored and is destroyed", new, info.name)
            await self.destroy(new)
            raise

    async def reboot(self, dead: int, name: str) -> DomainInfo:
        """What follows a guest's own reboot: it is made again, under another domid, with its devices."""
        devices = await list_devices(self.store, dead)
        await self.destroy(dead)
        return await self.create(name, devices)

    # -- one domain's own socket ---------------------------------------------------------------------

    async def back_type(self, domain: DomainInfo, kind: str) -> str:
        """On an embedded host nobody else has drivers."""
        return kind

    def control_socket(self, domain: str) -> Path:
        return self.layout.control_socket(domain)

    async def ask(self, domain: str, method: str, /, *, timeout: float = 30.0, **params: Any) -> Any:
        """Call a domain's control socket once: tree, sysctl, counters, device operations."""
        async with await RpcClient.connect(self.control_socket(domain)) as connection:
            return await connection.call(method, timeout=timeout, **params)

    async def bury_the_dead(self) -> list[DomainInfo]:
        """Domains that ended by themselves: rebooted ones are made again, the others forgotten.

        Together, so that none waits for another's back ends. Raises what failed first, after all were tried.
        """
        dead = [info for info in await self.domains() if info.domid and info.state == DomainState.SHUTDOWN]
        results = await asyncio.gather(*(self._bury(info) for info in dead), return_exceptions=True)
        for info, result in zip(dead, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("burying domain %d (%s): %s", info.domid, info.name, result)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return dead

    async def _bury(self, info: DomainInfo) -> None:
        try:
            # Its end is seen before its exit code, which tells a reboot from a crash.
            info = DomainInfo(**await self.host.call("wait_ended", domid=info.domid))
        except XenbusError as error:
            if not is_missing(error):  # somebody else was faster
                raise
            return
        log.info("domain %d (%s) ended (%s)", info.domid, info.name, info.reason or "killed")
        if info.reason == "reboot":
            await self.reboot(info.domid, info.name)
        else:
            await self.destroy(info.domid)


async def _remove_domain(tx: Transaction, domid: int) -> bool:
    """Every node of the domain, unless it has devices: they are closed first."""
    record = f"{libxl_path(domid)}/device"
    if await tx.exists(record) and await tx.directory(record):
        return False
    for path in (domain_path(domid), libxl_path(domid)):
        if await tx.exists(path):
            await tx.rm(path)
    return True


async def monitor(toolstack: Toolstack) -> None:
    """Until cancelled: whenever the store says that a domain went, clear up after it (xl's own daemon)."""
    wake = asyncio.Event()
    watch = await toolstack.store.watch("@releaseDomain", lambda _path: wake.set())
    loop = asyncio.get_running_loop()
    try:
        while True:
            await wake.wait()
            wake.clear()
            try:
                await toolstack.bury_the_dead()
            except (XenbusError, OSError):
                if toolstack.store.closed:
                    raise
                loop.call_later(BURY_AGAIN, wake.set)
    finally:
        if not toolstack.store.closed:
            await watch.close()
