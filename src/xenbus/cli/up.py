"""`xenbus up`: a host that stays, in the foreground, until it is interrupted."""

from __future__ import annotations

from pathlib import Path

import click

from xenbus.cli.context import dir_option, need_dir
from xenbus.errors import UsageError


@click.command("up", short_help="Start a host: supervisor, store, domain 0.")
@dir_option
@click.option("--quota", "quotas", metavar="NAME=VALUE", multiple=True, help="Of the store; repeatable.")
@click.option("--verbose", is_flag=True, help="Domains log every step, in DIR/log.")
def command(directory: Path | None, quotas: tuple[str, ...], verbose: bool) -> None:
    """Start a host and stay until interrupted: the supervisor, the store daemon and domain 0.

    Prints "ready" when it is. DIR/xenstored/socket is the store, DIR/log holds what the processes say.

    \b
    Example:
      xenbus up --dir /tmp/host &
      XENSTORED_RUNDIR=/tmp/host/xenstored xenstore-ls -f
    """
    import asyncio

    asyncio.run(_up(need_dir(directory), dict(_quota(each) for each in quotas), verbose))


def _quota(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.isdigit():
        raise UsageError(f"--quota {text!r}: NAME=VALUE wanted, such as nodes=100000")
    return name, int(value)


async def _up(root: Path, quotas: dict[str, int], verbose: bool) -> None:
    import asyncio
    import signal

    from xenbus.domain.host import Host
    from xenbus.errors import XenbusError

    host = Host(root, quotas=quotas, verbose=verbose)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await host.start()
    try:
        click.echo("ready")
        waits = {asyncio.create_task(stop.wait()), asyncio.create_task(host.failed.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
    finally:
        await host.stop()
    if host.failure:
        raise XenbusError(host.failure)
