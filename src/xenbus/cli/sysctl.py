"""`xenbus sysctl`: read-only variables of a host's domains, in FreeBSD's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli.completing import domains
from xenbus.cli.context import dir_option, emit, json_option

if TYPE_CHECKING:
    from xenbus.toolstack.xenhost import AnyHost


@click.command("sysctl", short_help="Read variables of the device trees.")
@dir_option
@json_option
@click.option("-a", "all_", is_flag=True, help="Everything.")
@click.option("--domain", metavar="NAME", shell_complete=domains, help="Of this domain only.")
@click.argument("name", required=False)
def command(directory: Path | None, as_json: bool, all_: bool, domain: str | None, name: str | None) -> None:
    """Read NAME and what is below it (`NAME/...` picks a domain), or everything with -a.

    Where several domains have the same variable, each line begins with the domain's name.

    \b
    Example:
      xenbus sysctl dev.xbd.0.xenbus_connection_state --dir /tmp/host
      xenbus sysctl -a --domain guest --dir /tmp/host
    """
    from xenbus.cli.hosts import ask_all, with_toolstack
    from xenbus.domain.rpc import is_missing
    from xenbus.errors import NotFound, XenbusError

    if not all_ and not name:
        raise click.UsageError("which variable? Give a NAME, or -a")
    if name and "/" in name:
        domain, _, name = name.partition("/")

    async def action(toolstack: AnyHost) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        wanted = [await toolstack.find(domain)] if domain else await toolstack.domains()
        for info, answer in (await ask_all(toolstack, wanted, "sysctl", name=name or "")).items():
            if not isinstance(answer, XenbusError):
                found[info.name] = dict(answer)
            elif domain and not is_missing(answer):
                raise answer
            elif not is_missing(answer):
                click.echo(f"xenbus: {info.name} does not answer: {answer}", err=True)
        if name and not any(found.values()):
            raise NotFound(f"unknown oid {name!r}")
        return found

    found = with_toolstack(directory, action)
    several = len([values for values in found.values() if values]) > 1

    def text() -> str:
        return "\n".join(
            (f"{owner}/" if several else "") + f"{key}: {value}"
            for owner, values in found.items()
            for key, value in values.items()
        )

    emit(found, as_json, text)
