"""A domain's control socket: its tree, its sysctl, what it holds, and its devices' operations.

What `xenbus tree`, `sysctl` and `nbd` talk to. Reads the runtime; changes nothing in it but through a
driver's own operations.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xenbus.bus.operations import Operable
from xenbus.bus.tree import describe, lines
from xenbus.domain.rpc import CALL_TASK, CONNECTION_TASK, Call, RpcServer
from xenbus.domain.runtime import DomainRuntime
from xenbus.errors import NotFound
from xenbus.newbus import Device

SYSCTL_MAX = 100_000  # lines of one answer


class DomainService:
    """Serves one runtime on one path until `close()`."""

    def __init__(self, runtime: DomainRuntime, info: Mapping[str, object] | None = None) -> None:
        """info: what more a caller of `info` is told"""
        self.runtime = runtime
        self._more = dict(info or {})
        self._rpc = RpcServer(
            {
                "info": self._info,
                "tree": self._tree,
                "sysctl": self._sysctl,
                "counts": self._counts,
                "device": self._device,
            }
        )

    async def serve(self, path: Path) -> None:
        await self._rpc.serve(path)

    async def close(self) -> None:
        await self._rpc.close()

    async def _info(self, call: Call) -> object:
        runtime = self.runtime
        return {
            "name": runtime.name,
            "domid": runtime.hv.domid,
            "pid": os.getpid(),
            "started": runtime.started,
            **self._more,
        }

    async def _tree(self, call: Call) -> object:
        """The tree as data (`devices`) and as lines for a person."""
        roots = [describe(child) for child in self.runtime.tree.root.children]
        return {
            "domid": self.runtime.hv.domid,
            "devices": roots,
            "lines": [line for root in roots for line in lines(root)],
        }

    async def _sysctl(self, call: Call) -> object:
        """Names and values at or below `name`; all of them without one."""
        prefix = call.text("name", "")
        sysctl = self.runtime.tree.sysctl
        names = [name for _, name in zip(range(SYSCTL_MAX), sysctl.names(prefix), strict=False)]
        if prefix and not names:
            raise NotFound(f"unknown oid {prefix!r}")
        return [[name, sysctl.read(name)] for name in names]

    async def _counts(self, call: Call) -> object:
        """What this domain holds: of the hypervisor, of the store, and tasks of its own loop."""
        runtime = self.runtime
        held = runtime.hv.held()
        client = runtime.store.counts()
        return {
            "granted_pages": held.granted_pages,
            "mapped_pages": held.mapped_pages,
            "ports": held.ports,
            "watches": client["watches"],
            "transactions": client["transactions"],
            "devices": sum(1 for _ in runtime.tree.root.walk()) - 1,
            "tasks": sum(1 for task in asyncio.all_tasks() if task.get_name() not in _OF_A_CALL),
        }

    async def _device(self, call: Call) -> object:
        """One operation of one device's driver."""
        name, operation = call.text("device"), call.text("operation")
        device = self.runtime.tree.find(name)
        if device is None or not device.attached:
            raise NotFound(f"{self.runtime.name} has no device {name!r}")
        table = _operations(device)
        if operation not in table:
            offered = ", ".join(table) or "none"
            raise NotFound(f"{name} has no operation {operation!r}; it has: {offered}")
        return await table[operation](call)


_OF_A_CALL = frozenset({CONNECTION_TASK, CALL_TASK})


def _operations(device: Device) -> Any:
    return device.softc.operations() if isinstance(device.softc, Operable) else {}
