"""xnb, the back half of a `vif`: opens the far side, walks the handshake, connects its queues to it.

Knows its device and the peer's keys; a queue's rings and ports are xnb_queue's, packets xnb_tx's and
xnb_rx's, where they go the port's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

from xenbus.bus import DeviceGone, XenbusDevice, XenbusDriver, XenbusState, back_driver
from xenbus.drivers.net import netif, offers
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.netif import MULTICAST_KEY
from xenbus.drivers.net.packet import ETH_DATA_LEN, MAX_MTU, MIN_MTU
from xenbus.drivers.net.ports import open_port
from xenbus.drivers.net.ports.mac import mac_text, parse_mac
from xenbus.drivers.net.xnb_front import HEAD, Parameters, Shape
from xenbus.drivers.net.xnb_options import OPTIONS, Options
from xenbus.drivers.net.xnb_queue import QueueLink
from xenbus.drivers.net.xnb_rx import MulticastFilter
from xenbus.errors import (
    DeadlineError,
    HypervisorError,
    LinkDown,
    PeerError,
    StoreError,
    UsageError,
    XenbusError,
)
from xenbus.xenstore.client import Watch

# Seconds for mappings under way to end when the front goes, and for the front to go when we are detached:
# together less than the bus gives a detach.
DRAIN_TIMEOUT = 3.0
DETACH_TIMEOUT = 6.0
# Where Linux's xen-netback is loaded every `backend/vif` is its own; xnb beside it serves `backend/xnb`.
OWN_TYPE = "xnb"
# Seconds for the ports of a process that we go on for to be unbound.
PORT_TIMEOUT = 2.0
HOTPLUG = "hotplug-status"


@back_driver("vif", OWN_TYPE)
class Xnb(XenbusDriver):
    """The class attributes from max_queues on are what a front may have where the device's nodes do not say
    otherwise: see Options."""

    name = "xnb"
    description = "Backend Virtual Network Interface"
    deadline = 60.0

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
        self._parameters: Parameters | None = None
        self._watch: Watch | None = None
        self._busy = asyncio.Lock()  # connecting and disconnecting: detach may run beside otherend_changed
        self._states: dict[XenbusState, Callable[[], Awaitable[None]]] = {
            XenbusState.INITIALISING: self._front_restarted,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._front_closing,
            XenbusState.CLOSED: self._front_closed,
        }

    # -- callbacks of the bus

    async def attach(self) -> None:
        await self._open()
        try:
            await self.dev.set_state(XenbusState.INIT_WAIT, self._options.nodes())
        except BaseException:
            await self.cable.unplug()  # a device that was not attached is not detached
            raise

    async def recover(self) -> None:
        """Goes on with the rings of a process that was killed: packets on their way may be lost or come
        twice, as on any wire, and the front sees a pause."""
        dev, peer = self.dev, self.dev.otherend_state
        if dev.state is XenbusState.CONNECTED and peer is XenbusState.INITIALISING:
            await self.attach()  # it began anew, and waits for us to do so
        elif dev.state is XenbusState.CONNECTED and peer is XenbusState.CONNECTED:
            try:
                await self._take_over()
            except BaseException:
                await self.cable.unplug()
                raise
        elif peer is XenbusState.UNKNOWN:
            raise PeerError(f"{dev.otherend}: its state cannot be read")

    async def release(self) -> None:
        """Another process goes on: what runs ends, and the front is told nothing."""
        await self._disconnect()
        await self.cable.unplug(leave=True)

    async def otherend_changed(self, state: XenbusState) -> None:
        act = self._states.get(state)
        if act is not None:
            await act()

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
            links, self._links, self._parameters, self._watch = self._links, [], None, None
            self.cable.down()
            for link in links:
                await link.abandon()
        await self.dev.set_state(XenbusState.INIT_WAIT, self._options.nodes())

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                try:
                    await dev.set_state(XenbusState.CLOSING)
                    await dev.wait_otherend(XenbusState.CLOSED, timeout=DETACH_TIMEOUT)
                except DeadlineError as error:
                    dev.log.warning("detached by force: %s", error)
        finally:
            # Also when the bus's deadline ended it: the interface must not stay.
            try:
                await self._disconnect()
            finally:
                await self.cable.unplug()
        if not dev.gone:
            await dev.set_state(XenbusState.CLOSED)

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        cable = self.cable
        return {
            "mac": lambda: mac_text(self.mac) if self.mac is not None else "",
            "mtu": lambda: self.mtu,
            "carrier": lambda: int(cable.connected and cable.carrier),
            "queues": lambda: len(self._links),
            "multicast_control": lambda: int(self.multicast.on),
            "multicast_groups": lambda: len(self.multicast.groups),
            **cable.leaves(),
        }

    # -- what the toolstack's nodes name

    async def _open(self) -> None:
        """The options, and the port, once. UsageError for what makes no sense, PortError."""
        dev = self.dev
        if self.cable.port is not None:
            return
        keys = [option.key for option in OPTIONS]
        said = await dev.gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys))
        self._options = Options.of(type(self), dev.node, said)
        texts = ("mac", "script", "vifname", "handle", netif.PORT_KEY)
        said = await dev.gather(
            {**dict.fromkeys(texts, bytes.decode), "mtu": netif.number},
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
        self._scripted = bool(said["script"])
        target = said[netif.PORT_KEY]
        if target is None:
            handle = said["handle"] or dev.id.partition("/")[2]
            name = said["vifname"] or f"vif{dev.otherend_id}.{handle}"
            # The script puts it where it belongs once, so it has to outlive a process that is killed.
            target = f"tap:{name}?keep=1" if self._scripted else "packet:"
        self.cable.plug(await open_port(target))

    # -- the handshake

    async def _connect(self) -> None:
        dev = self.dev
        async with self._busy:
            if dev.state in (XenbusState.CLOSING, XenbusState.CLOSED):
                return
            parameters = await self._front_parameters()
            if self._links:
                if parameters == self._parameters:
                    return
                await self._give_back()  # it began anew, so fast that its Initialising was never seen
            await self._open()
            try:
                await self._build(parameters)
            except BaseException:
                await self._give_back()
                raise
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

    async def _take_over(self) -> None:
        """The kernel may still be at the former process's end: its ports are bound until then."""
        now = asyncio.get_running_loop().time
        end = now() + PORT_TIMEOUT
        async with self._busy:
            await self._open()
            parameters = await self._front_parameters()
            while True:
                try:
                    await self._build(parameters)
                    break
                except HypervisorError:
                    await self._give_back()
                    if now() >= end:
                        raise
                    await asyncio.sleep(0.05)
                except BaseException:
                    await self._give_back()
                    raise
            await self._start()
            for link in self._links:
                link.kick_front()
            await self._tell_carrier()

    async def _front_parameters(self) -> Parameters:
        """What the front published, or PeerError that names what is wrong with it."""
        dev = self.dev
        said = await dev.otherend_gather(dict.fromkeys(HEAD, bytes), dict.fromkeys(HEAD))
        shape = Shape.of(dev.otherend_path, said, self._options.max_queues)
        self.multicast.on = bool(self._options.multicast_control) and said[MULTICAST_KEY] == b"1"
        keys = shape.keys()
        return shape.parameters(await dev.otherend_gather(dict.fromkeys(keys, bytes), dict.fromkeys(keys)))

    async def _build(self, front: Parameters) -> None:
        dev = self.dev
        self._parameters = front
        dev.features = offers.agree(self._options, dict(front.takes))
        takes = offers.link_of(dev.features, self.mtu, self.mac)
        self._links = [QueueLink(dev, keys) for keys in front.queues]
        for link in self._links:
            await link.build(
                self.cable,
                takes,
                self.multicast,
                rx_notify=front.rx_notify,
                on_groups=self._groups,
                on_error=lambda what: dev.log.warning("%s", what),
                on_fatal=self._broken,
            )

    async def _front_restarted(self) -> None:
        """It begins anew without having closed (a guest that was reset): the old rings are nobody's."""
        if self._links:
            await self._disconnect()
            if self.dev.state is XenbusState.CONNECTED:
                await self.dev.set_state(XenbusState.INIT_WAIT)

    async def _front_closing(self) -> None:
        if self.dev.state is not XenbusState.CLOSED:
            await self.dev.set_state(XenbusState.CLOSING)

    async def _front_closed(self) -> None:
        """Closed, or its node is gone. The port stays for a front that comes back."""
        await self._disconnect()
        await self.dev.set_state(XenbusState.CLOSED)

    # -- the end

    async def _disconnect(self) -> None:
        """Give back rings, ports and pages. Idempotent."""
        async with self._busy:
            await self._give_back()

    async def _give_back(self) -> None:
        self.cable.down()
        links, self._links, self._parameters = self._links, [], None
        watch, self._watch = self._watch, None
        if watch is not None:
            try:
                await self.dev.unwatch(watch)
            except XenbusError as error:
                self.dev.log.warning("%s", error)
        await asyncio.gather(*(link.give_back(DRAIN_TIMEOUT) for link in links))
        self.multicast.on = False
        self.multicast.groups.clear()

    def _broken(self, error: PeerError) -> None:
        """The front broke a ring: this device is over, the others go on."""
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: PeerError) -> None:
        await self.dev.fatal(error)
        await self._disconnect()

    # -- what the queues, the port and the front ask for

    def _resume_rings(self) -> None:
        for link in self._links:
            if link.tx is not None:
                link.tx.kick()

    def _groups(self, changes: Sequence[tuple[bool, bytes]]) -> None:
        if self._options.multicast_control:
            for add, address in changes:
                if not self.multicast.change(add, address):
                    self.dev.log.warning("no room for the multicast group %s", mac_text(address))

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
