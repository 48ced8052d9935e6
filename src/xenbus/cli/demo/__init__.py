"""`xenbus demo`: the whole of it in half a minute, embedded: no hypervisor, no root, no network."""

from __future__ import annotations

from pathlib import Path

import click

from xenbus.cli.context import json_option


@click.command("demo", short_help="Show the whole of it: a host, guests, disks, a network, faults.")
@json_option
@click.option(
    "--image",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The guest's disk, copied first (a small ext4 image that comes with xenbus).",
)
@click.option("--hold", is_flag=True, help="Leave the host up afterwards, until interrupted.")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The host's directory (a temporary one).",
)
def command(as_json: bool, image: Path | None, hold: bool, directory: Path | None) -> int:
    """Start a host with a guest, give it a disk, move data through the ring, let two more guests talk through
    it, plug, suspend, kill: and check everything. The exit code is 0 only if all of it held.

    \b
    Example:
      xenbus demo
      xenbus demo --image disk.img --json
    """
    from xenbus.cli.demo.run import run

    return run(as_json=as_json, image=image, hold=hold, directory=directory)
