"""`xenbus domain`: create, destroy, suspend, resume, reboot, power off and list a host's domains."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xenbus.cli.completing import domains
from xenbus.cli.context import dir_option, emit, json_option

if TYPE_CHECKING:
    from xenbus.toolstack.domains import DomainInfo, Toolstack
    from xenbus.toolstack.xenhost import AnyHost

name_argument = click.argument("name", shell_complete=domains)
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds.",
)


@click.group("domain", short_help="Create, end, suspend and list domains.")
def command() -> None:
    """Create, end, suspend, resume and list the domains of a host.

    \b
    Example:
      xenbus domain create guest --dir /tmp/host
      xenbus domain suspend guest --dir /tmp/host && xenbus domain resume guest --dir /tmp/host
    """


def _run(directory: Path | None, action: Callable[[Toolstack], Coroutine[Any, Any, Any]]) -> Any:
    from xenbus.cli.hosts import with_embedded

    return with_embedded(directory, action)


def _show(info: DomainInfo, as_json: bool) -> None:
    from dataclasses import asdict

    emit(asdict(info), as_json, f"{info.name}: domain {info.domid}, {info.state}")


@command.command("create")
@dir_option
@json_option
@name_argument
def create(directory: Path | None, as_json: bool, name: str) -> None:
    """Start a guest, without devices.

    \b
    Example:
      xenbus domain create guest --dir /tmp/host
    """

    async def action(toolstack: Toolstack) -> DomainInfo:
        return await toolstack.create(name)

    _show(_run(directory, action), as_json)


@command.command("destroy")
@dir_option
@name_argument
def destroy(directory: Path | None, name: str) -> None:
    """End a domain at once, whatever it thinks of it, and remove what is left of it.

    \b
    Example:
      xenbus domain destroy guest --dir /tmp/host
    """

    async def action(toolstack: Toolstack) -> None:
        await toolstack.destroy((await toolstack.find(name)).domid)

    _run(directory, action)


@command.command("shutdown")
@dir_option
@click.option("--reboot", is_flag=True, help="The guest is to come back.")
@timeout_option
@name_argument
def shutdown(directory: Path | None, reboot: bool, timeout: float, name: str) -> None:
    """Ask a domain to power off (or reboot) by control/shutdown, and wait until it has.

    \b
    Example:
      xenbus domain shutdown guest --dir /tmp/host
    """

    async def action(toolstack: Toolstack) -> None:
        domid = (await toolstack.find(name)).domid
        if reboot:
            await toolstack.shutdown(domid, "reboot", timeout)
        else:
            await toolstack.poweroff(domid, timeout)

    _run(directory, action)


@command.command("suspend")
@dir_option
@json_option
@timeout_option
@name_argument
def suspend(directory: Path | None, as_json: bool, timeout: float, name: str) -> None:
    """Ask a domain to suspend, and wait until it has.

    \b
    Example:
      xenbus domain suspend guest --dir /tmp/host
    """

    async def action(toolstack: Toolstack) -> DomainInfo:
        return await toolstack.suspend((await toolstack.find(name)).domid, timeout)

    _show(_run(directory, action), as_json)


@command.command("resume")
@dir_option
@json_option
@click.option("--restore", is_flag=True, help="As after `xl restore`: another domid, grants and ports gone.")
@click.option("--backend", metavar="NAME", help="With --restore: who serves its devices then.")
@name_argument
def resume(directory: Path | None, as_json: bool, restore: bool, backend: str | None, name: str) -> None:
    """Let a suspended domain go on: as it was (the suspend is cancelled), or restored under another domid.

    \b
    Example:
      xenbus domain resume guest --restore --backend storage --dir /tmp/host
    """
    if backend and not restore:
        raise click.UsageError("--backend goes with --restore")

    async def action(toolstack: Toolstack) -> DomainInfo:
        domid = (await toolstack.find(name)).domid
        if not restore:
            return await toolstack.resume(domid)
        back = (await toolstack.find(backend)).domid if backend else None
        return await toolstack.restore(domid, back_domid=back)

    _show(_run(directory, action), as_json)


@command.command("list")
@dir_option
@json_option
@click.argument("name", required=False, shell_complete=domains)
def list_(directory: Path | None, as_json: bool, name: str | None) -> None:
    """List all domains, or one.

    \b
    Example:
      xenbus domain list --dir /tmp/host --json
    """
    from dataclasses import asdict

    from xenbus.cli.hosts import with_toolstack

    async def action(toolstack: AnyHost) -> list[DomainInfo]:
        return [await toolstack.find(name)] if name else await toolstack.domains()

    found = with_toolstack(directory, action)

    def table() -> str:
        rows = [("ID", "NAME", "STATE", "PID")]
        rows += [(str(d.domid), d.name, d.state, str(d.pid or "-")) for d in found]
        return "\n".join(f"{a:>5}  {b:<24}{c:<12}{d}".rstrip() for a, b, c, d in rows)

    emit([asdict(info) for info in found], as_json, table)
