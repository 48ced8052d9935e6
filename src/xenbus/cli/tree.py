"""`xenbus tree`: the device trees of a host's domains, and why a device is not Connected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xenbus.cli.completing import domains
from xenbus.cli.context import dir_option, emit, emit_line, json_option

if TYPE_CHECKING:
    from xenbus.toolstack.xenhost import AnyHost

INTERVAL = 0.5  # seconds between two looks of --watch


@click.command("tree", short_help="Show the device trees of all domains.")
@dir_option
@json_option
@click.option("--watch", is_flag=True, help="Show it again whenever it changes, until interrupted.")
@click.argument("name", required=False, shell_complete=domains)
def command(directory: Path | None, as_json: bool, watch: bool, name: str | None) -> None:
    """Show the device trees of all domains, or of one: states, and who owes the next move.

    \b
    Example:
      xenbus tree --dir /tmp/host
      xenbus tree guest --json --dir /tmp/host
    """
    from xenbus.cli.hosts import trees, with_toolstack

    async def look(toolstack: AnyHost) -> list[dict[str, Any]]:
        wanted = await toolstack.find(name) if name else None
        return [
            {"name": info.name, **tree}
            for info, tree in (await trees(toolstack)).items()
            if wanted is None or info.domid == wanted.domid
        ]

    async def follow(toolstack: AnyHost) -> None:
        import asyncio

        last = ""
        while True:
            found = await look(toolstack)
            if (text := _text(found)) != last:
                last = text
                emit_line(_data(found), as_json, text + "\n")
            await asyncio.sleep(INTERVAL)

    if watch:
        with_toolstack(directory, follow)
    else:
        found = with_toolstack(directory, look)
        emit(_data(found), as_json, lambda: _text(found))


def _text(found: list[dict[str, Any]]) -> str:
    return "\n".join(
        "\n".join([f"{tree['name']} (domain {tree['domid']})", *(f"  {line}" for line in tree["lines"])])
        for tree in found
    )


def _data(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in tree.items() if key != "lines"} for tree in found]
