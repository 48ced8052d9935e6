"""`xenbus attach`: a device for a domain. One subcommand a kind of device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from xenbus.cli.completing import bridges, domains, switches, taps
from xenbus.cli.context import dir_option, emit, json_option

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xenbus.toolstack.devices import DeviceSpec
    from xenbus.toolstack.paths import DevicePaths
    from xenbus.toolstack.xenhost import AnyHost

TAKE_BACK = 3.0  # seconds that both ends of a device that did not connect have to close


@click.group("attach", short_help="Give a domain a device.")
def command() -> None:
    """Give a domain a device.

    \b
    Example:
      xenbus attach block --domain guest --image disk.img --dir /tmp/host
      xenbus attach net --domain guest --dir /tmp/host
    """


@command.command("block")
@dir_option
@json_option
@click.option("--domain", required=True, metavar="NAME", shell_complete=domains, help="Who gets it.")
@click.option(
    "--image",
    required=True,
    metavar="FILE",
    help="File, block device, memory:SIZE, nbd://...",
)
@click.option("--device", default="xvda", show_default=True, help="The guest's name for it.")
@click.option("--readonly", is_flag=True, help="The guest can't write it.")
@click.option("--sector-size", type=click.Choice(["512", "4096"]), help="Bytes (the storage's).")
@click.option("--backend", default="0", metavar="NAME", shell_complete=domains, help="Who serves it.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds.")
@click.option("--no-wait", is_flag=True, help="Write the nodes and go.")
def block(
    directory: Path | None,
    as_json: bool,
    domain: str,
    image: str,
    device: str,
    readonly: bool,
    sector_size: str | None,
    backend: str,
    timeout: float,
    no_wait: bool,
) -> None:
    """Attach a disk, and wait until both ends are Connected. What does not connect is taken away again.

    \b
    Example:
      xenbus attach block --domain guest --image disk.img --device xvdb --readonly --dir /tmp/host
      xenbus attach block --domain guest --image 'nbd+unix:///?socket=/tmp/s' --dir /tmp/host
    """
    from xenbus.cli.hosts import with_toolstack
    from xenbus.toolstack.block import DiskSpec

    async def action(toolstack: AnyHost) -> DeviceSpec:
        front, back = await toolstack.find(domain), await toolstack.find(backend)
        disk = DiskSpec(
            front.domid,
            image,
            device,
            readonly,
            back.domid,
            int(sector_size) if sector_size else None,
            back_kind=await toolstack.back_type(back, "vbd"),
        )

        async def make() -> DeviceSpec:
            return disk.device()

        return await _attach(toolstack, make, None if no_wait else timeout)

    paths = with_toolstack(directory, action).paths
    data = {"front": paths.front, "back": paths.back, "devid": paths.devid}
    emit(data, as_json, f"{device}: {paths.front}, served by {paths.back}")


@command.command("net")
@dir_option
@json_option
@click.option("--domain", required=True, metavar="NAME", shell_complete=domains, help="Who gets it.")
@click.option("--mac", metavar="MAC", help="The guest's address (one of Xen's, by chance).")
@click.option(
    "--bridge",
    metavar="NAME",
    shell_complete=bridges,
    help="A Linux bridge, which gets a TAP device for it.",
)
@click.option(
    "--tap", metavar="NAME", shell_complete=taps, help="A TAP device: made, or opened if it is there."
)
@click.option(
    "--switch", metavar="NAME", shell_complete=switches, help="A switch in the back end's process (lan)."
)
@click.option("--front", metavar="TARGET", default="", help="The guest's own side: packet:, tap:NAME...")
@click.option("--capture", metavar="FILE", default="", help="What passes, as pcapng, kept by the back end.")
@click.option("--mtu", type=int, default=1500, show_default=True, help="Bytes behind the header.")
@click.option("--queues", type=int, default=0, help="At most (the drivers' own).")
@click.option("--backend", default="0", metavar="NAME", shell_complete=domains, help="Who serves it.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds.")
@click.option("--no-wait", is_flag=True, help="Write the nodes and go.")
def net(
    directory: Path | None,
    as_json: bool,
    domain: str,
    mac: str | None,
    bridge: str | None,
    tap: str | None,
    switch: str | None,
    front: str,
    capture: str,
    mtu: int,
    queues: int,
    backend: str,
    timeout: float,
    no_wait: bool,
) -> None:
    """Attach a network device, and wait until both ends are Connected. What does not connect is taken away.

    Without --bridge, --tap and --switch: a port of the switch `lan`. A bridge, and a TAP device that is not
    there yet, need root where the back end runs (CAP_NET_ADMIN).

    \b
    Example:
      xenbus attach net --domain guest --dir /tmp/host
      xenbus attach net --domain guest --bridge xenbr0 --mac 00:16:3e:11:22:33 --dir /tmp/host
      xenbus attach net --domain guest --switch 'lan?source=own&uplink=tap:up0' --dir /tmp/host
    """
    from xenbus.cli.hosts import with_toolstack
    from xenbus.errors import UsageError
    from xenbus.toolstack.net import NicSpec, free_devid

    async def action(toolstack: AnyHost) -> DeviceSpec:
        guest, back = await toolstack.find(domain), await toolstack.find(backend)
        for option, text in (("--bridge", bridge), ("--tap", tap), ("--switch", switch)):
            if text == "":  # an empty variable of a script is not the default
                raise UsageError(f"{option}: no name")
        back_type = await toolstack.back_type(back, "vif")

        async def make() -> DeviceSpec:
            nic = NicSpec(
                guest.domid,
                await free_devid(toolstack.store, guest.domid),
                mac,
                bridge or "",
                tap or "",
                switch or "",
                front,
                capture,
                mtu,
                queues,
                back.domid,
                back_type,
            )
            return nic.device()

        return await _attach(toolstack, make, None if no_wait else timeout)

    spec = with_toolstack(directory, action)
    paths, address = spec.paths, spec.front["mac"]
    data = {"front": paths.front, "back": paths.back, "devid": paths.devid, "mac": address}
    emit(data, as_json, f"vif{paths.devid}: {address}, {paths.front}, served by {paths.back}")


@command.command("console")
@dir_option
@json_option
@click.option("--domain", required=True, metavar="NAME", shell_complete=domains, help="Who gets it.")
@click.option("-n", "--number", type=int, help="Its number there (the lowest free one from 1 on).")
@click.option("--log", metavar="FILE", help="What the guest says, kept by the back end.")
@click.option("--log-size", type=int, default=0, help="Bytes of it, and of what came before (1 MiB).")
@click.option("--no-pty", is_flag=True, help="A log alone: nobody attaches.")
@click.option("--backend", default="0", metavar="NAME", shell_complete=domains, help="Who serves it.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds.")
@click.option("--no-wait", is_flag=True, help="Write the nodes and go.")
def console(
    directory: Path | None,
    as_json: bool,
    domain: str,
    number: int | None,
    log: str | None,
    log_size: int,
    no_pty: bool,
    backend: str,
    timeout: float,
    no_wait: bool,
) -> None:
    """Attach a console, and wait until both ends are Connected. What does not connect is taken away again.

    `xenbus console NAME` is the way in.

    \b
    Example:
      xenbus attach console --domain guest --log guest.log --dir /tmp/host
    """
    from xenbus.cli.hosts import with_toolstack
    from xenbus.toolstack.console import ConsoleSpec, free_number

    async def action(toolstack: AnyHost) -> DeviceSpec:
        guest, back = await toolstack.find(domain), await toolstack.find(backend)
        back_type = await toolstack.back_type(back, "console")

        async def make() -> DeviceSpec:
            spec = ConsoleSpec(
                guest.domid,
                await free_number(toolstack.store, guest.domid) if number is None else number,
                "",
                not no_pty,
                log,
                log_size,
                back.domid,
                back_type,
            )
            return spec.device()

        return await _attach(toolstack, make, None if no_wait else timeout)

    paths = with_toolstack(directory, action).paths
    data = {"front": paths.front, "back": paths.back, "devid": paths.devid}
    emit(data, as_json, f"console{paths.devid}: {paths.front}, served by {paths.back}")


async def _attach(
    toolstack: AnyHost, make: Callable[[], Awaitable[DeviceSpec]], timeout: float | None
) -> DeviceSpec:
    """timeout: None does not wait for the drivers."""
    from xenbus.toolstack.devices import wait_connected, write_numbered

    spec = await write_numbered(toolstack.store, make)
    if timeout is not None:
        try:
            await wait_connected(toolstack.store, spec.paths, timeout)
        except BaseException:
            await _take_back(toolstack, spec.paths)
            raise
    return spec


async def _take_back(toolstack: AnyHost, paths: DevicePaths) -> None:
    from contextlib import suppress

    from xenbus.errors import XenbusError
    from xenbus.toolstack.devices import detach_device

    with suppress(XenbusError):  # the domain may have gone, and its devices with it
        await detach_device(toolstack.store, paths, timeout=TAKE_BACK, force=True)
