"""`xenbus serve`: the back ends (or front ends) of this domain of a real Xen, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

SHOW = {"unit": "the systemd unit", "script": "the hotplug script for disks of an xl configuration"}


@click.command("serve", short_help="Serve a real Xen's guests: the back ends of this domain.")
@click.option("--bus", type=click.Choice(["back", "front", "both"]), default="back", show_default=True)
@click.option(
    "--claim", "claims", metavar="TYPE", multiple=True, help="Take a type that Linux has a driver for."
)
@click.option("--store", metavar="ADDRESS", envvar="XENBUS_STORE", help="Socket or device (as libxenstore).")
@click.option(
    "--run", metavar="DIR", envvar="XENBUS_RUN", type=click.Path(path_type=Path), help="(/run/xenbus)"
)
@click.option("--show", type=click.Choice(list(SHOW)), help="Print a file that goes with it, and end.")
@click.option("--verbose", is_flag=True, help="Log every step.")
def command(
    bus: str,
    claims: tuple[str, ...],
    store: str | None,
    run: Path | None,
    show: str | None,
    verbose: bool,
) -> None:
    """Serve this domain of a real Xen until interrupted: in dom0 or a driver domain its back ends, in a
    guest, with --bus front, its devices. Prints "ready" when every device that was there has been looked at.

    Types that Linux has drivers for (`vbd`, `vif`, ...) are left to those, unless --claim takes them; disks,
    network devices and consoles are served under types of ours beside them (`xbbd`, `xnb`, `xcb`). SIGTERM
    closes the devices in order; SIGUSR1 leaves them as they are, and the next `xenbus serve` goes on with
    them, as it does after a crash.

    \b
    Example:
      xenbus serve
      xenbus serve --claim vbd
      xenbus serve --show unit > /etc/systemd/system/xenbus.service
    """
    import sys

    if show:
        click.echo(_file(show, bus, claims), nl=False)
        return
    import asyncio

    from xenbus.bus.state import Side
    from xenbus.domain.native import Served
    from xenbus.domain.process import set_up_logging
    from xenbus.errors import XenbusError
    from xenbus.toolstack.serving import Serving, serve

    set_up_logging("DEBUG" if verbose else None)
    sides = frozenset(side for side in Side if bus in ("both", side.name.lower()))
    serving = Serving(Served(sides, frozenset(claims)), store, run)

    def ready(_: object) -> None:
        click.echo("ready")
        sys.stdout.flush()

    # Not the polling loop of an embedded host's domains: beside busy guests it was slower (docs/bench.md).
    reason = asyncio.run(serve(serving, ready))
    if reason == "lost":
        raise XenbusError("the store is lost: every device was given up")


def _file(show: str, bus: str, claims: tuple[str, ...]) -> str:
    from xenbus.toolstack.serving import script_text, unit_text

    if show == "script":
        return script_text()
    words = [*_own_command(), "serve", *(["--bus", bus] if bus != "back" else [])]
    return unit_text(" ".join([*words, *(f"--claim {claim}" for claim in claims)]))


def _own_command() -> list[str]:
    """This program, by its absolute path: an installed script, a .pyz, or a module."""
    import sys

    program = Path(sys.argv[0]).resolve()
    if program.name == "__main__.py":
        return [sys.executable, "-m", "xenbus"]
    return [str(program)] if program.suffix != ".pyz" else [sys.executable, str(program)]
