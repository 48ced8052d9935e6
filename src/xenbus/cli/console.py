"""`xenbus console`: a guest's console in this terminal, as `xl console` has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli import exits
from xenbus.cli.completing import domains
from xenbus.cli.context import dir_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from xenbus.cli.attachment import Attachment, Ending
    from xenbus.toolstack.console import Paths, TerminalNode
    from xenbus.toolstack.xenhost import AnyHost
    from xenbus.xenstore.client import Client

PATIENCE = 5.0  # seconds that a back end has to say where its terminal is
# Seconds that the next back end has, and of them those in which nothing is said about it.
AWAY, MOMENT = 60.0, 1.0


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
        found = await find_console(toolstack.store, info.domid, number)
        return await _attach(toolstack.store, found, name, key, escape, idle)

    ending = with_toolstack(directory, action)
    if ending is Ending.HUNG_UP:
        click.echo(f"{name}: the console has ended", err=True)
    return exits.INTERRUPTED if ending is Ending.INTERRUPTED else exits.Exit.OK


async def _attach(
    store: Client, found: TerminalNode, name: str, key: int, escape: str, idle: float | None
) -> Ending:
    import contextlib
    import os
    import sys

    from xenbus.cli.attachment import Attachment, raw, signals

    source, sink = 0, 1
    is_terminal = _is_terminal(source)
    sys.stdout.flush()

    def say(words: str) -> None:
        if is_terminal:
            click.echo(f"{name}: {words}\r", err=True)

    async with found.paths(store) as paths:
        path, pty = await _open(paths, found, PATIENCE)
        say(f"{path}; {escape} leaves")
        attachment = Attachment(source, sink, key if is_terminal else None, idle)
        with contextlib.ExitStack() as stack:
            stack.callback(attachment.close)
            again = stack.enter_context(raw(source)) if is_terminal else None
            stack.enter_context(signals(attachment, again))
            try:
                return await _until_left(attachment, pty, paths, found, say)
            finally:
                if is_terminal:
                    with contextlib.suppress(OSError):
                        os.write(2, b"\r\n")


async def _until_left(
    attachment: Attachment, pty: int, paths: Paths, found: TerminalNode, say: Callable[[str], None]
) -> Ending:
    """Goes on with the terminal that a back end which was started again has."""
    import os

    from xenbus.cli.attachment import Ending
    from xenbus.errors import DeadlineError, NoEntry

    async def another() -> int:
        try:
            return (await _open(paths, found, MOMENT))[1]
        except DeadlineError:
            say(f"its back end has gone: waiting {AWAY:.0f} s for the next one")
        return (await _open(paths, found, AWAY))[1]

    while True:
        try:
            ending = await attachment.run(pty)
        finally:
            os.close(pty)
        if ending is not Ending.HUNG_UP:
            return ending
        try:
            next_one = await attachment.search(another())
        except (DeadlineError, NoEntry):
            return ending
        if isinstance(next_one, Ending):
            return next_one
        pty = next_one


async def _open(paths: Paths, found: TerminalNode, seconds: float) -> tuple[str, int]:
    """Its path and a descriptor, once there is one. DeadlineError, NoEntry when the device is gone,
    UsageError if somebody else is attached."""
    import asyncio

    from xenbus.cli.attachment import open_terminal
    from xenbus.errors import DeadlineError, UsageError, XenbusError

    what = "the console's terminal"
    try:
        async with asyncio.timeout(seconds):
            while True:
                path = await paths()
                try:
                    return path, open_terminal(path, ours=found.ours)
                except UsageError:
                    raise
                except XenbusError as error:  # of a back end that has gone; the next one writes its own
                    what = f"the console's terminal ({error})"
    except TimeoutError:
        raise DeadlineError(what, f"its back end ({found.node})", seconds) from None


def _is_terminal(fd: int) -> bool:
    import os

    try:
        return os.isatty(fd)
    except OSError:
        return False
