"""The demo's step with the seed's own picture: the guest holds both buses, as a driver domain does. It has a
network device and two disks of its own, and serves two more guests, which talk to each other through it.
"""

from __future__ import annotations

import asyncio
import base64
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xenbus.cli.attachment import open_terminal
from xenbus.cli.demo.kernels import KernelStack
from xenbus.cli.demo.packets import PacketStack
from xenbus.cli.demo.stage import GUEST, Stage, check, digest, give, give_disk
from xenbus.domain.layout import CONTROL_DOMAIN
from xenbus.toolstack.console import ConsoleSpec
from xenbus.toolstack.devices import detach_device
from xenbus.toolstack.domains import DomainInfo
from xenbus.toolstack.net import NicSpec
from xenbus.toolstack.paths import DevicePaths

LEFT, RIGHT = "left", "right"
ADDRESSES = {LEFT: "10.0.0.1", RIGHT: "10.0.0.2", CONTROL_DOMAIN: "10.0.0.3"}
PINGS = 5
PIECE_OF_FILE = 256 << 10  # what goes over UDP, a datagram at a time
PATIENCE = 10.0
# FreeBSD's sys/xen/xenbus/xenbusb.c, the comment at its head.
PICTURE = {
    "xenstore0": 0,
    "xenbusb_front0": 1,
    "xn0": 2,
    "xbd0": 2,
    "xbd1": 2,
    "xenbusb_back0": 1,
    "xbbd0": 2,
    "xnb0": 2,
    "xnb1": 2,
}


async def picture(stage: Stage) -> None:
    """The seed's own picture: one domain holds both buses, and two guests talk through it"""
    before = await stage.ask(GUEST, "tree")
    async with AsyncExitStack() as exits:
        made = await furnish(stage, exits)
        await _check_picture(stage)
        await made.talk.talk()
        await _console(stage, made.left)
        for info in (made.left, made.right):
            await stage.toolstack.destroy(info.domid)
        await asyncio.gather(*(detach_device(stage.toolstack.store, paths) for paths in made.own))
        await made.talk.gone()
    for path in _disks(stage).values():
        path.unlink()

    async def as_before() -> bool:
        return bool((await stage.ask(GUEST, "tree"))["lines"] == before["lines"])

    await stage.until(as_before, "the guest's tree to be as it was")
    stage.show.fact("both guests and their devices are gone; the tree is as it was")


@dataclass(slots=True, frozen=True)
class Furnished:
    """own: the devices that the guest itself was given."""

    talk: _Packets | _Kernels
    left: DomainInfo
    right: DomainInfo
    own: list[DevicePaths]


async def furnish(stage: Stage, exits: AsyncExitStack) -> Furnished:
    """All that the picture has, around a guest with its disk. Stacks end with `exits`, devices do not."""
    talk = _Packets(stage, exits) if stage.no_kernels else await _Kernels.start(stage, exits)
    left, right = await stage.toolstack.create(LEFT), await stage.toolstack.create(RIGHT)
    guest = await stage.toolstack.find(GUEST)
    # A tree has its devices in the order in which they came: its first disk comes second here.
    await detach_device(stage.toolstack.store, DevicePaths("vbd", 51712, guest.domid, 0))
    disks = _disks(stage)
    for path in disks.values():
        path.write_bytes(os.urandom(1 << 20))
    # Its own network device is a port of the switch that it has for the others: the way out.
    own = [await give(stage, replace(talk.far_side(guest.domid), front="switch:lan").device())]
    await give_disk(stage, GUEST, stage.image, "xvda")
    own.append(await give_disk(stage, GUEST, disks[GUEST], "xvdb"))
    await give_disk(stage, LEFT, disks[LEFT], "xvda", back=guest.domid)
    for info in (left, right):
        nic = NicSpec(info.domid, switch="lan", front=talk.front(info.name), back_domid=guest.domid).device()
        await give(stage, nic)
        await talk.connected(info.name, nic.front["mac"])
    sum_ = (await stage.disk(LEFT, "xbd0", "digest"))["sha256"]
    check(sum_ == digest(disks[LEFT]), "the disk that the guest serves reads other bytes")
    return Furnished(talk, left, right, own)


def _disks(stage: Stage) -> dict[str, Path]:
    """The guest's second one, and the one that it serves."""
    return {name: stage.root / f"{name}.img" for name in (GUEST, LEFT)}


async def _check_picture(stage: Stage) -> None:
    await stage.show_trees()
    lines = (await stage.ask(GUEST, "tree"))["lines"]
    found = {line.split()[0]: (len(line) - len(line.lstrip())) // 2 for line in lines}
    check(list(found.items()) == list(PICTURE.items()), f"the tree is not the seed's: {lines}")
    away = [line.strip() for line in lines if " at " in line and not line.endswith(": Connected")]
    check(not away, f"not Connected: {away}")
    stage.show.fact(f"{GUEST}'s tree is the one in FreeBSD's xenbusb.c, name by name, and all are Connected")
    stage.did("the seed's tree")


@dataclass(slots=True)
class _Kernels:
    """Each guest has a kernel's stack, with a TAP device in it that its xn drives; domain 0 has one, too."""

    stage: Stage
    stacks: dict[str, KernelStack]

    @classmethod
    async def start(cls, stage: Stage, exits: AsyncExitStack) -> _Kernels:
        found = [KernelStack(stage.host_pid) for _ in ADDRESSES]
        for each in found:
            await exits.enter_async_context(each)
        return cls(stage, dict(zip(ADDRESSES, found, strict=True)))

    def far_side(self, domid: int) -> NicSpec:
        return NicSpec(domid, tap=f"uplink0?netns={self.stacks[CONTROL_DOMAIN].netns}")

    def front(self, name: str) -> str:
        return f"tap:eth0?mac=guest&netns={self.stacks[name].netns}"

    async def connected(self, name: str, mac: str) -> None:
        await self.stacks[name].up("eth0", ADDRESSES[name])

    async def ready(self) -> None:
        await self.stacks[CONTROL_DOMAIN].up("uplink0", ADDRESSES[CONTROL_DOMAIN])

    async def talk(self) -> None:
        show = self.stage.show
        await self.ready()
        for here, there in ((LEFT, RIGHT), (RIGHT, LEFT), (LEFT, CONTROL_DOMAIN)):
            times = await self.stacks[here].ask("ping", host=ADDRESSES[there], count=PINGS)
            _pinged(self.stage, here, there, times)
        for here, there in ((LEFT, RIGHT), (RIGHT, LEFT)):
            file, copy = self.stage.image, self.stage.root / f"{there}.copy"
            port = await self.stacks[there].ask("listen", path=str(copy))
            seconds = await self.stacks[here].ask("push", host=ADDRESSES[there], port=port, path=str(file))
            heard = await self.stacks[there].ask("heard")
            check(heard["sha256"] == digest(file) == digest(copy), "TCP brought other bytes")
            copy.unlink()
            what = f"{heard['bytes']} bytes over TCP from {here} to {there}"
            show.fact(
                f"{what} at {heard['bytes'] / seconds / 1e6:.0f} MB/s, SHA-256 as the file's",
                seconds=seconds,
                **heard,
            )
        self.stage.did("ping and a file over TCP between two kernels' stacks")

    def hints(self) -> list[str]:
        enter = "nsenter --user --preserve-credentials --net --target"
        return [
            f"a shell beside {name}'s stack ({ADDRESSES[name]}): {enter} {each.pid}"
            for name, each in self.stacks.items()
        ]

    async def gone(self) -> None:
        for name, each in self.stacks.items():

            async def none(each: KernelStack = each) -> bool:
                return not await each.ask("devices")

            await self.stage.until(none, f"the TAP device of {name} to go")


class _Packets:
    """The demo speaks for both guests, through the packet interface of their xn."""

    def __init__(self, stage: Stage, exits: AsyncExitStack) -> None:
        self.stage, self._exits = stage, exits
        self.stacks: dict[str, PacketStack] = {}

    def far_side(self, domid: int) -> NicSpec:
        return NicSpec(domid, switch="lan")

    def front(self, name: str) -> str:
        return "packet:"

    async def connected(self, name: str, mac: str) -> None:
        stack = PacketStack(await self.stage.connect(name), "xn0", mac, ADDRESSES[name])
        self.stacks[name] = await self._exits.enter_async_context(stack)

    async def ready(self) -> None:
        """They answer from the start."""

    async def talk(self) -> None:
        show, why = self.stage.show, self.stage.no_kernels
        show.fact(f"no kernels' stacks here ({why}): ARP, ICMP and UDP are the demo's own", why=why)
        for here, there in ((LEFT, RIGHT), (RIGHT, LEFT)):
            _pinged(self.stage, here, there, await self.stacks[here].ping(ADDRESSES[there], PINGS))
        sent = await asyncio.to_thread(_piece, self.stage.image)
        await self.stacks[LEFT].push(ADDRESSES[RIGHT], sent)
        copy = self.stage.root / "udp.copy"
        copy.write_bytes(sent)
        heard = self.stacks[RIGHT].heard()
        check(heard["sha256"] == digest(copy), "UDP brought other bytes")
        copy.unlink()
        show.fact(f"{heard['bytes']} bytes over UDP from {LEFT} to {RIGHT}, SHA-256 as the file's", **heard)
        self.stage.did("ARP, ICMP and UDP between two guests through the packet interface")

    def hints(self) -> list[str]:
        return []

    async def gone(self) -> None:
        """Nothing outside the guests was made."""


def _piece(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(PIECE_OF_FILE)


def _pinged(stage: Stage, here: str, there: str, times: list[float]) -> None:
    check(len(times) == PINGS, f"{len(times)} of {PINGS} pings from {here} to {there} came back")
    least = min(times) * 1e3
    stage.show.fact(
        f"ping from {here} to {there}: {PINGS} of {PINGS} came back, the fastest in {least:.2f} ms",
        seconds=times,
    )


async def _console(stage: Stage, info: DomainInfo) -> None:
    """A line each way, as `xenbus console` has them."""
    paths = await give(stage, ConsoleSpec(info.domid).device())
    terminal = open_terminal(await stage.toolstack.store.read_str(f"{paths.back}/tty"))
    try:
        login = b"login: "
        await _at_console(stage, info.name, "write", data=base64.b64encode(login).decode())
        check(await _read(terminal, len(login)) == login, "the terminal shows something else")
        os.write(terminal, b"root\r")
        typed = base64.b64decode(await _at_console(stage, info.name, "read", seconds=10))
        check(typed == b"root\r", f"the guest reads {typed!r}")
    finally:
        os.close(terminal)
    stage.show.fact(f"console of {info.name}: a line to the terminal, and one typed there to the guest")
    stage.did("console")


async def _at_console(stage: Stage, name: str, operation: str, **params: Any) -> str:
    return str(await stage.ask(name, "device", device="xc1", operation=operation, **params))


async def _read(terminal: int, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    found = b""
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            readable = loop.create_future()
            loop.add_reader(terminal, readable.set_result, None)
            try:
                await readable
            finally:
                loop.remove_reader(terminal)
            found += os.read(terminal, count - len(found))
    return found
