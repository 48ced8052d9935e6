"""`xenbus detach`: take a device away, in order, or by force after a deadline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli.completing import devices
from xenbus.cli.context import dir_option

if TYPE_CHECKING:
    from xenbus.toolstack.xenhost import AnyHost


@click.command("detach", short_help="Take a device away from a domain.")
@dir_option
@click.option("--force", is_flag=True, help="When the deadline passes, remove the device all the same.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Seconds.")
@click.argument("device", shell_complete=devices)
def command(directory: Path | None, force: bool, timeout: float, device: str) -> None:
    """Take DEVICE away: both ends close, then the nodes go. `xbd0`, or `NAME/xbd0` where several domains
    have one, or `NAME/xvda`, `NAME/vif0`, which do without the guest's answer.

    \b
    Example:
      xenbus detach guest/xbd1 --dir /tmp/host
    """
    from xenbus.cli.hosts import find_device, with_toolstack
    from xenbus.toolstack.devices import detach_device

    async def action(toolstack: AnyHost) -> bool:
        found = await find_device(toolstack, device)
        return await detach_device(toolstack.store, found.paths, timeout=timeout, force=force)

    if not with_toolstack(directory, action):
        click.echo(f"{device}: removed by force", err=True)
