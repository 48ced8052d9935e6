"""Tab completion of what only a running host knows: names of domains and devices. Never an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
PATIENCE = 2.0  # seconds that a person waits after a tab


def _ask(ctx: click.Context, action: Callable[[Any], Any]) -> Any:
    import asyncio
    import os

    from xenbus.cli.context import DIR_VARIABLE
    from xenbus.errors import XenbusError
    from xenbus.toolstack.domains import Toolstack
    from xenbus.toolstack.xenhost import XenHost, on_xen

    directory = ctx.params.get("directory") or os.environ.get(DIR_VARIABLE)
    if not directory and not on_xen():
        return []

    async def main() -> Any:
        async with asyncio.timeout(PATIENCE):
            opened = Toolstack.open(Path(directory)) if directory else XenHost.open()
            async with await opened as host:
                return await action(host)

    try:
        return asyncio.run(main())
    except (XenbusError, OSError):
        return []


def domains(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    async def names(toolstack: Any) -> list[str]:
        return [info.name for info in await toolstack.domains()]

    return [CompletionItem(name) for name in _ask(ctx, names) if name.startswith(incomplete)]


def devices(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    async def names(toolstack: Any) -> list[str]:
        from xenbus.cli.hosts import trees, walk

        return [
            f"{info.name}/{device['nameunit']}"
            for info, tree in (await trees(toolstack)).items()
            for device in walk(tree["devices"])
            if device.get("node")
        ]

    return [CompletionItem(name) for name in _ask(ctx, names) if name.startswith(incomplete)]


def bridges(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Linux's, of this machine: needs nobody's answer."""
    names = sorted(path.parent.name for path in Path("/sys/class/net").glob("*/bridge"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def taps(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """TAP devices of this machine, in our network namespace."""
    names = sorted(path.parent.name for path in Path("/sys/class/net").glob("*/tun_flags"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def switches(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Those that a domain has a port of."""

    async def names(toolstack: Any) -> list[str]:
        from xenbus.toolstack.devices import list_devices
        from xenbus.toolstack.net import switch_of

        found = {""}
        for info in await toolstack.domains():
            found |= {switch_of(spec) for spec in await list_devices(toolstack.store, info.domid)}
        return sorted(found - {""})

    return [CompletionItem(name) for name in _ask(ctx, names) if name.startswith(incomplete)]
