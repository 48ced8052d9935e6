"""xnb, the back half of a `vif`: opens the far side, walks the handshake, connects its queues to it.

Knows its device and the peer's keys; a queue's rings and ports are xnb_queue's, packets xnb_tx's and
xnb_rx's, where they go the port's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from xenbus.bus import DeviceGone, XenbusDevice, XenbusState, back_driver
from xenbus.bus.journals import JournalFile, identity
from xenbus.drivers.halves import PORT_TIMEOUT, BackEnd
from xenbus.drivers.journals import Journals
from xenbus.drivers.net import netif, offers
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.netif import MULTICAST_KEY
from xenbus.drivers.net.packet import ETH_DATA_LEN, MAX_MTU, MIN_MTU
from xenbus.drivers.net.ports import PortError, open_port
from xenbus.drivers.net.ports.mac import mac_text, parse_mac
from xenbus.drivers.net.xnb_front import HEAD, Parameters, Shape
from xenbus.drivers.net.xnb_journal import NetJournal
from xenbus.drivers.net.xnb_multicast import MulticastFilter
from xenbus.drivers.net.xnb_options import OPTIONS, Options
from xenbus.drivers.net.xnb_queue import QueueLink
from xenbus.drivers.nodes import number32
from xenbus.errors import LinkDown, StoreError, UsageError, XenbusError
from xenbus.xenstore.client import Watch

# Seconds for mappings under way to end when the front goes.
DRAIN_TIMEOUT = 3.0
# Where Linux's xen-netback is loaded every `backend/vif` is its own; xnb beside it serves `backend/xnb`.
OWN_TYPE = "xnb"
HOTPLUG = "hotplug-status"


@back_driver("vif", OWN_TYPE)
class Xnb(BackEnd[Parameters]):
    """The class attributes from max_queues on are what a front may have where the device's nodes do not say
    otherwise: see Options."""

    name = "xnb"
    description = "Backend Virtual Network Interface"
    deadline = 60.0
    connects_at = (XenbusState.CONNECTED,)  # as netback

    max_queues: ClassVar[int] = 4
    split_event_channels: ClassVar[bool] = True
    sg: ClassVar[bool] = True
    csum: ClassVar[bool] = True
    ipv6_csum: ClassVar[bool] = True
    gso_tcpv4: ClassVar[bool] = True
    gso_tcpv6: ClassVar[bool] = True
    multicast_control: ClassVar[bool] = True
    dynamic_multicast_control: ClassVar[bool] = True

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.counters = Counters()
        self.cable = Cable(
            self.counters, self._resume_rings, self._port_changed, lambda text: dev.log.warning("%s", text)
        )
        self.multicast = MulticastFilter()
        self.mac: bytes | None = None
        self.mtu = ETH_DATA_LEN
        self._scripted = False
        self._options = Options.of(type(self), dev.node, dict.fromkeys(o.key for o in OPTIONS))
        self._links: list[QueueLink] = []  # not empty: a front is connected, or about to be
        self._journals = Journals(dev)
        self._file: JournalFile[NetJournal] | None = None
        self._watch: Watch | None = None

    @property
    def _linked(self) -> bool:
        return bool(self._links)

    # -- callbacks of the bus

    @property
    def _left_linked(self) -> bool:
        return self.dev.state is self.dev.otherend_state is XenbusState.CONNECTED

    async def release(self) -> None:
        """Another process goes on: what runs ends, the front is told nothing, and the journal stays."""
        async with self._busy:
            await self._give_back(keep=True)
        await self.cable.unplug(leave=True)

    async def localend_changed(self, path: str) -> None:
        if path == f"/{HOTPLUG}":
            async with self._busy:
                await self._go_on()

    async def suspend(self) -> None:
        """A driver domain of its own is suspended."""
        self.cable.hold()
        for link in self._links:
            if link.tx is not None:
                link.tx.hold()

    async def resume(self, cancelled: bool) -> None:
        if cancelled:
            for link in self._links:
                if link.tx is not None:
                    link.tx.release()
            self.cable.release()
            return
        async with self._busy:
            links, self._links, self._watch = self._links, [], None
            self.cable.down()
            for link in links:
                await link.abandon()
            self._end_journal(keep=False)
        await self.dev.set_state(XenbusState.INIT_WAIT, self._offer())

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        cable = self.cable
        return {
            "mac": lambda: mac_text(self.mac) if self.mac is not None else "",
            "mtu": lambda: self.mtu,
            "carrier": lambda: int(cable.connected and cable.carrier),
            "queues": lambda: len(self._links),
            "journal": lambda: self._journals.state,
            "multicast_control": lambda: int(self.multicast.on),
            "multicast_groups": lambda: len(self.multicast.groups),
            **cable.leaves(),
        }

    # -- what the toolstack's nodes name

    async def _read_options(self) -> None:
        keys = [option.key for option in OPTIONS]
        said = await self.dev.gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys))
        self._options = Options.of(type(self), self.dev.node, said)

    async def _open(self) -> None:
        """The port, once. UsageError for what makes no sense, PortError."""
        dev = self.dev
        if self.cable.port is not None:
            return
        texts = ("mac", "script", HOTPLUG, "vifname", "handle", "rate", netif.PORT_KEY)
        said = await dev.gather(
            {**dict.fromkeys(texts, bytes.decode), "mtu": number32},
            {**dict.fromkeys(texts), "mtu": ETH_DATA_LEN},
        )
        if said["mac"] is not None:
            try:
                self.mac = parse_mac(said["mac"])
            except UsageError as error:
                raise UsageError(f"{dev.node}/mac: {error}") from None
        if not MIN_MTU <= said["mtu"] <= MAX_MTU:
            raise UsageError(f"{dev.node}/mtu: {said['mtu']}, {MIN_MTU} to {MAX_MTU} it can be")
        self.mtu = said["mtu"]
        if said["rate"]:
            dev.log.warning("rate %s is not kept to: it sends as fast as it can", said["rate"])
        self._scripted = bool(said["script"])
        target = said[netif.PORT_KEY]
        if target is None:
            handle = said["handle"] or dev.id.partition("/")[2]
            name = f"vif{dev.otherend_id}.{handle}"
            if said[HOTPLUG] == "connected":  # a former process's: the script has renamed it
                name = said["vifname"] or name
            # The script puts it where it belongs once, so it has to outlive a process that is killed. It is
            # left down, as netback's is: Linux 6.1 renames nothing that is up.
            target = f"tap:{name}?keep=1&up=0" if self._scripted else "packet:"
        self.cable.plug(await open_port(target))

    async def _close_far_side(self) -> None:
        await self.cable.unplug()

    def _offer(self) -> dict[str, object]:
        return self._options.nodes()

    # -- the handshake

    async def _built(self) -> None:
        await self._go_on()

    async def _go_on(self) -> None:
        """To Connected, once the hotplug script has put the interface where it belongs (as netback does)."""
        dev = self.dev
        if not self._links or dev.state is not XenbusState.INIT_WAIT:
            return
        if self._scripted:
            status = await dev.read_opt(HOTPLUG)
            if status == "error":
                why = await dev.read_opt("hotplug-error")
                await dev.error(f"the hotplug script failed: {why or 'it does not say why'}")
            if status != "connected":
                return
        if await dev.set_state(XenbusState.CONNECTED, {"carrier": int(self.cable.carrier)}):
            await self._start()

    async def _start(self) -> None:
        """The rings are served from here on."""
        dev, agreed = self.dev, self.dev.features
        assert agreed is not None
        for link in self._links:
            link.start()
        self.cable.up(
            [link.rx for link in self._links if link.rx is not None],
            offers.link_of(agreed, self.mtu, self.mac),
        )
        if self._options.dynamic and self._watch is None:
            path = f"{dev.otherend_path}/{MULTICAST_KEY}"
            try:
                self._watch = await dev.watch(path, lambda _: self._look_at_multicast())
            except StoreError as error:  # a driver domain has a quota of watches
                dev.log.warning("its multicast filter stays as it is now: %s", error)

    async def _resumed(self) -> None:
        """Packets on their way may be lost, as on any wire, and the front sees a pause."""
        await self._start()
        for link in self._links:
            link.kick_front()
        await self._tell_carrier()

    async def _front_parameters(self) -> Parameters:
        dev = self.dev
        said = await dev.otherend_gather(dict.fromkeys(HEAD, bytes), dict.fromkeys(HEAD))
        shape = Shape.of(dev.otherend_path, said, self._options.max_queues)
        keys = shape.keys()
        return shape.parameters(await dev.otherend_gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys)))

    async def _build(self, front: Parameters, *, resumes: bool = False) -> None:
        dev = self.dev
        dev.features = offers.agree(self._options, dict(front.takes))
        # Before the port: a process that lives has both.
        journal = self._open_journal(front, resumes=resumes)
        await self._open()
        self.multicast.keep(journal.groups)
        self.multicast.on = bool(self._options.multicast_control) and front.multicast
        takes = offers.link_of(dev.features, self.mtu, self.mac)
        self.cable.notified = front.rx_notify
        self._links = [QueueLink(dev, *each) for each in zip(front.queues, journal.logs, strict=True)]
        for link in self._links:
            await link.build(
                self.cable,
                takes,
                self.multicast,
                resumes=resumes,
                on_groups=self._groups,
                on_error=lambda what: dev.log.warning("%s", what),
                on_fatal=self._broken,
            )

    def _open_journal(self, front: Parameters, *, resumes: bool) -> NetJournal:
        """JournalError if a former process's is to be had and there is none that fits."""
        dev, queues = self.dev, len(front.queues)
        whose = identity(dev.node, dev.otherend_id, dev.otherend_path, *front.queues)
        self._file = self._journals.open(
            "rings", NetJournal.layout(queues), whose, lambda made: made.begin(whose), resumes=resumes
        )
        return self._file.journal if self._file is not None else NetJournal.private(queues)

    def _patience(self, error: XenbusError) -> float:
        if isinstance(error, PortError) and error.name == "EBUSY":
            return PORT_TIMEOUT
        return super()._patience(error)

    # -- the end

    async def _give_back(self, *, keep: bool = False) -> None:
        self.cable.down()
        links, self._links = self._links, []
        watch, self._watch = self._watch, None
        if watch is not None:
            try:
                await self.dev.unwatch(watch)
            except XenbusError as error:
                self.dev.log.warning("%s", error)
        try:
            await asyncio.gather(*(link.give_back(DRAIN_TIMEOUT) for link in links))
        finally:
            self._end_journal(keep=keep)

    def _end_journal(self, *, keep: bool) -> None:
        """keep: another process goes on with this connection"""
        self.multicast.forget()
        file, self._file = self._file, None
        if file is not None and keep:
            file.close()
        elif file is not None:
            file.remove()
        if not keep:
            self._journals.discard()

    # -- what the queues, the port and the front ask for

    def _resume_rings(self) -> None:
        for link in self._links:
            if link.tx is not None:
                link.tx.kick()

    def _groups(self, changes: Sequence[tuple[bool, bytes]]) -> bool:
        done = bool(self._options.multicast_control)
        for add, address in changes if done else ():
            if not self.multicast.change(add, address):
                self.dev.log.warning("no room for the multicast group %s", mac_text(address))
                done = False
        return done

    def _look_at_multicast(self) -> None:
        self.dev.spawn(self._read_multicast(), name=f"{self.dev.nameunit} looks at its filter")

    async def _read_multicast(self) -> None:
        try:
            said = await self.dev.otherend_read_opt(MULTICAST_KEY)
        except (StoreError, LinkDown):
            return  # the watch fired because its whole node went
        if self._links:
            self.multicast.on = said == "1"

    def _port_changed(self, up: bool) -> None:
        """netif.h, "Link state": a front may look at it."""
        dev = self.dev
        if self._links and dev.state is XenbusState.CONNECTED:
            dev.spawn(self._tell_carrier(), name=f"{dev.nameunit} tells its carrier")

    async def _tell_carrier(self) -> None:
        try:
            await self.dev.write("carrier", int(self.cable.carrier))
        except DeviceGone:
            pass
