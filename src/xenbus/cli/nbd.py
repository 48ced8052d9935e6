"""`xenbus nbd`: a guest's disk as an NBD export on a unix socket, until interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli.completing import devices
from xenbus.cli.context import dir_option, emit_line, json_option

if TYPE_CHECKING:
    import asyncio

    from xenbus.toolstack.xenhost import AnyHost

LOOK_EVERY = 0.5  # seconds


@click.command("nbd", short_help="Export a guest's disk over NBD.")
@dir_option
@json_option
@click.option("--socket", required=True, metavar="PATH", type=click.Path(path_type=Path), help="Mode 0600.")
@click.argument("device", shell_complete=devices)
def command(directory: Path | None, as_json: bool, socket: Path, device: str) -> None:
    """Export DEVICE, a guest's disk (`xbd0` or `NAME/xbd0`), on a unix socket until interrupted, or until the
    disk is detached.

    Prints a line when it is ready.

    \b
    Example:
      xenbus nbd guest/xbd0 --socket /tmp/disk.sock --dir /tmp/host &
      nbdcopy 'nbd+unix:///?socket=/tmp/disk.sock' copy.img
    """
    from xenbus.cli.hosts import with_toolstack

    with_toolstack(directory, lambda toolstack: _export(toolstack, device, socket.absolute(), as_json))


async def _export(toolstack: AnyHost, device: str, socket: Path, as_json: bool) -> None:
    import asyncio
    import signal

    from xenbus.cli.hosts import find_device
    from xenbus.domain.rpc import RpcClient
    from xenbus.errors import XenbusError

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    found = await find_device(toolstack, device)
    # The export lives as long as this connection: whatever becomes of us, the guest takes it away.
    async with await RpcClient.connect(toolstack.control_socket(found.domain.name)) as domain:
        unit = found.device["nameunit"]
        made = await domain.call("device", device=unit, operation="nbd_start", socket=str(socket))
        emit_line(made, as_json, f"nbd+unix:///?socket={socket}")
        watching = asyncio.create_task(_until_gone(socket, stop))
        try:
            await domain.lost_or(stop)
        finally:
            watching.cancel()
        if watching.done() and not watching.cancelled():
            raise XenbusError(f"{socket}: the export has ended: the disk was detached")


async def _until_gone(socket: Path, stop: asyncio.Event) -> None:
    """The guest takes the socket away with the disk; nothing else tells us."""
    import asyncio

    while socket.exists():  # noqa: ASYNC110 - no event comes from there
        await asyncio.sleep(LOOK_EVERY)
    stop.set()
