"""`xenbus up`: a host that stays, in the foreground, until it is interrupted."""

from __future__ import annotations

from pathlib import Path

import click

from xenbus.cli.context import dir_option, need_dir


@click.command("up", short_help="Start a host: supervisor, store, domain 0.")
@dir_option
@click.option("--quota", "quotas", metavar="NAME=VALUE", multiple=True, help="Of the store; repeatable.")
@click.option("--until-eof", is_flag=True, help="End when standard input does, too.")
@click.option("--verbose", is_flag=True, help="Domains log every step, in DIR/log.")
def command(directory: Path | None, quotas: tuple[str, ...], until_eof: bool, verbose: bool) -> None:
    """Start a host and stay until interrupted: the supervisor, the store daemon and domain 0.

    Prints "ready" when it is. DIR/xenstored/socket is the store, DIR/log holds what the processes say.

    \b
    Example:
      xenbus up --dir /tmp/host &
      XENSTORED_RUNDIR=/tmp/host/xenstored xenstore-ls -f
    """
    import asyncio

    from xenbus.xenstore.engine import Quotas

    root = need_dir(directory)
    Quotas.parse(list(quotas))  # a wrong one is told before anything runs
    given = {name: int(value) for name, _, value in (each.partition("=") for each in quotas)}
    asyncio.run(_up(root, given, until_eof, verbose))


async def _up(root: Path, quotas: dict[str, int], until_eof: bool, verbose: bool) -> None:
    import asyncio
    import os
    import resource
    import signal

    from xenbus.domain.host import Host
    from xenbus.errors import XenbusError

    # Every pair of domains has doorbells, every arena a descriptor: take what the system allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    host = Host(root, quotas=quotas, verbose=verbose)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def readable() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    if until_eof:  # whoever started us holds the other end: we do not outlive it, however it dies
        loop.add_reader(0, readable)
    start = asyncio.create_task(host.start())
    waits = {asyncio.create_task(stop.wait()), asyncio.create_task(host.failed.wait())}
    try:
        await asyncio.wait({start, *waits}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            click.echo("ready")
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (start, *waits):
            task.cancel()
        await asyncio.gather(start, *waits, return_exceptions=True)
        await host.stop()
    if host.failure and not stop.is_set():
        raise XenbusError(host.failure)
