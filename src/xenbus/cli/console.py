"""`xenbus console`: a guest's console in this terminal, as `xl console` has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli import exits
from xenbus.cli.completing import domains
from xenbus.cli.context import dir_option

if TYPE_CHECKING:
    from xenbus.cli.attachment import Attachment, Ending
    from xenbus.toolstack.xenhost import AnyHost
    from xenbus.xenstore.client import Client

PATIENCE = 5.0  # seconds that a back end has to say where its terminal is, or where the new one is


@click.command("console", short_help="Attach to a guest's console.")
@dir_option
@click.option("-n", "--number", type=click.IntRange(0, 31), help="Which one (the lowest there is).")
@click.option("--escape", default="^]", show_default=True, metavar="KEY", help="What leaves it.")
@click.option(
    "--idle",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave when the input has ended and nothing came for so long.",
)
@click.argument("name", shell_complete=domains)
def command(directory: Path | None, number: int | None, escape: str, idle: float | None, name: str) -> int:
    """Attach to a console of domain NAME. Ctrl-] leaves it.

    Works in pipes, too: there no key has a meaning, and the end of the input does not end it.

    \b
    Example:
      xenbus console guest --dir /tmp/host
      echo date | xenbus console guest --idle 1 --dir /tmp/host
    """
    from xenbus.cli.attachment import Ending, parse_escape
    from xenbus.cli.hosts import with_toolstack
    from xenbus.toolstack.console import find_console

    key = parse_escape(escape)

    async def action(toolstack: AnyHost) -> Ending:
        info = await toolstack.find(name)
        node = await find_console(toolstack.store, info.domid, number)
        return await _attach(toolstack.store, node, name, key, escape, idle)

    ending = with_toolstack(directory, action)
    if ending is Ending.HUNG_UP:
        click.echo(f"{name}: the console has ended", err=True)
    return exits.INTERRUPTED if ending is Ending.INTERRUPTED else exits.Exit.OK


async def _attach(store: Client, node: str, name: str, key: int, escape: str, idle: float | None) -> Ending:
    import contextlib
    import os
    import sys

    from xenbus.cli.attachment import Attachment, open_terminal, raw, signals

    source, sink = 0, 1
    is_terminal = _is_terminal(source)
    sys.stdout.flush()
    path = await _path(store, node, "")
    pty = open_terminal(path)
    if is_terminal:
        click.echo(f"{name}: {path}; {escape} leaves\r", err=True)
    attachment = Attachment(source, sink, key if is_terminal else None, idle)
    with contextlib.ExitStack() as stack:
        stack.callback(attachment.close)
        again = stack.enter_context(raw(source)) if is_terminal else None
        stack.enter_context(signals(attachment, again))
        try:
            return await _until_left(store, node, attachment, path, pty)
        finally:
            if is_terminal:
                with contextlib.suppress(OSError):
                    os.write(2, b"\r\n")


async def _until_left(store: Client, node: str, attachment: Attachment, path: str, pty: int) -> Ending:
    """Goes on with the terminal that a back end which was started again has."""
    import os

    from xenbus.cli.attachment import Ending, open_terminal
    from xenbus.errors import DeadlineError, NoEntry

    while True:
        try:
            ending = await attachment.run(pty)
        finally:
            os.close(pty)
        if ending is not Ending.HUNG_UP:
            return ending
        try:
            path = await _path(store, node, path)
        except (DeadlineError, NoEntry):
            return ending
        pty = open_terminal(path)


async def _path(store: Client, node: str, old: str) -> str:
    """Of the terminal, once there is one, and another one than the `old` one. DeadlineError, NoEntry."""
    import asyncio

    from xenbus.errors import DeadlineError, NoEntry

    changed = asyncio.Event()
    watch = await store.watch(node, lambda _: changed.set())
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                changed.clear()
                try:
                    path = await store.read_str(node)
                except NoEntry:
                    # Gone with its device, or not written yet.
                    if not await store.exists(node.rpartition("/")[0]):
                        raise
                    path = ""
                if path and path != old:
                    return path
                await changed.wait()
    except TimeoutError:
        raise DeadlineError("the console's terminal", f"its back end ({node})", PATIENCE) from None
    finally:
        await watch.close()


def _is_terminal(fd: int) -> bool:
    import os

    try:
        return os.isatty(fd)
    except OSError:
        return False
