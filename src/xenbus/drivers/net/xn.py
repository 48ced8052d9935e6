"""xn, the front half of a `vif`: the handshake of netif.h, and the cable to its port that comes of it.

Knows its device, its peer's keys and the queues that it connects; rings are xn_tx's and xn_rx's, pages
xn_pool's, packets the port's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from typing import ClassVar

from xenbus.bus import Feature, Merge, Negotiated, XenbusDevice, XenbusState, front_driver
from xenbus.bus.operations import Operation, OperatorCall
from xenbus.drivers.halves import QuietFrontEnd
from xenbus.drivers.net import netif, offers
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.capture import CapturedPort
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.packet import ETH_DATA_LEN, MAX_MTU, MIN_MTU, Packet
from xenbus.drivers.net.ports import open_port
from xenbus.drivers.net.ports.mac import mac_text, parse_mac
from xenbus.drivers.net.ports.schemes.packet import PATIENCE, PacketPort
from xenbus.drivers.net.xn_pool import Pool
from xenbus.drivers.net.xn_queue import TRANSPORT_KEY, FrontLink
from xenbus.drivers.nodes import number32
from xenbus.errors import DeadlineError, LinkDown, PeerError, StoreError, UsageError, XenbusError
from xenbus.xenstore.client import Watch

# Ours, in our own node: how many queues to ask for, if there are as many.
OWN_QUEUES_KEY = "xn-max-queues"
# Frames that one `receive` of an operator gives, at most.
OPERATION_FRAMES = 64

QUEUES = Feature("queues", Merge.LEAST, default=1, peer_key=netif.MAX_QUEUES_KEY, least=1)
SPLIT = Feature("split-event-channels", Merge.BOTH, peer_key="feature-split-event-channels")
MULTICAST = Feature("multicast-control", Merge.BOTH, peer_key="feature-multicast-control")
DYNAMIC = Feature("dynamic-multicast-control", Merge.BOTH, peer_key="feature-dynamic-multicast-control")
_OWN = (QUEUES, SPLIT, MULTICAST, DYNAMIC)


@front_driver("vif")
class Xn(QuietFrontEnd):
    """Its `port` is there from the start; packets cross once both halves are Connected.

    The class attributes are what this front makes use of and offers; sg to gso_tcpv6 as in offers.Offer.
    num_queues:        one suffices: all queues are served by one loop. `xn-max-queues` of its node goes first
    rx_notify:         kick the back end when there are new pages for it to fill
    multicast_control: ask the back end for no groups but those that were joined
    default_port:      the far side where the node does not name one
    """

    name = "xn"
    description = "Virtual Network Interface"
    deadline = 60.0

    num_queues: ClassVar[int] = 1
    split_event_channels: ClassVar[bool] = True
    rx_notify: ClassVar[bool] = True
    multicast_control: ClassVar[bool] = False
    sg: ClassVar[bool] = True
    csum: ClassVar[bool] = True
    ipv6_csum: ClassVar[bool] = True
    gso_tcpv4: ClassVar[bool] = True
    gso_tcpv6: ClassVar[bool] = True
    default_port: ClassVar[str] = "packet:"

    @classmethod
    def unit(cls, dev: XenbusDevice) -> int | None:
        """As FreeBSD: the device's number (its handle) if it is free."""
        return int(dev.id) if dev.id.isdigit() else None

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.counters = Counters()
        self.cable = Cable(
            self.counters, self._resume_rings, lambda up: None, lambda text: dev.log.warning("%s", text)
        )
        self.mac = b""
        self.mtu = ETH_DATA_LEN
        self.groups: set[bytes] = set()
        self._wanted_queues = self.num_queues
        self._links: list[FrontLink] = []
        self._served = False
        self._carrier: Watch | None = None
        self._states = {
            XenbusState.INITIALISING: self._back_restarted,
            XenbusState.INIT_WAIT: self._initialise,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._close,
            XenbusState.CLOSED: self._closed,
        }

    @property
    def _granted(self) -> bool:
        return bool(self._links)

    # -- the packet interface

    @property
    def port(self) -> PacketPort:
        """Where programs put and get packets. UsageError if the far side is another one."""
        port = self.cable.port
        if isinstance(port, CapturedPort):
            port = port.inner
        if not isinstance(port, PacketPort):
            name = port.name if port is not None else "gone"
            raise UsageError(f"{self.dev.nameunit}: its far side is {name}, not the packet interface")
        return port

    async def send(self, frame: Packet | bytes, seconds: float = PATIENCE) -> None:
        """One Ethernet frame, once there is a back end with room for it. See PacketPort.put."""
        await self.port.put(frame, seconds)

    async def recv(self, seconds: float = PATIENCE) -> bytes:
        """The next frame. See PacketPort.get."""
        return bytes((await self.port.get(seconds)).data)

    async def join(self, address: bytes, seconds: float = PATIENCE) -> None:
        """Packets for this multicast group, too, from now on, where the back end filters them. UsageError. A
        back end that has no room for another group says so later: `tx_errors`."""
        if len(address) != 6 or not address[0] & 1:
            raise UsageError(f"{address.hex(':')} is no multicast group: six bytes, the first one odd")
        self.groups.add(address)
        await self._tell_group(address, True, seconds)

    async def leave(self, address: bytes, seconds: float = PATIENCE) -> None:
        self.groups.discard(address)
        await self._tell_group(address, False, seconds)

    async def filter_multicast(self, on: bool) -> None:
        """Ask for the filter, or for all groups again. UsageError if the back end cannot change that now."""
        agreed = self.dev.features
        if agreed is None or not agreed["dynamic-multicast-control"]:
            raise UsageError(f"{self.dev.otherend}: it does not change its multicast filter while connected")
        await self.dev.write(netif.MULTICAST_KEY, int(on))

    async def _tell_group(self, address: bytes, add: bool, seconds: float) -> None:
        extra = netif.multicast_extra(address, add=add)
        agreed = self.dev.features
        if not self.cable.connected or agreed is None or not agreed["multicast-control"]:
            return  # told when there is a connection, or never
        end = asyncio.get_running_loop().time() + seconds
        while self._links and self._links[0].tx is not None and not self._links[0].tx.send_extra(extra):
            if asyncio.get_running_loop().time() > end:
                raise DeadlineError("room for a multicast request", self.dev.otherend, seconds)
            await asyncio.sleep(0.01)  # the ring is full of packets

    # -- callbacks of the bus

    async def attach(self) -> None:
        said = await self.dev.gather(
            {
                "mac": bytes.decode,
                "mtu": number32,
                OWN_QUEUES_KEY: number32,
                netif.PORT_KEY: bytes.decode,
            },
            {
                "mtu": ETH_DATA_LEN,
                OWN_QUEUES_KEY: self.num_queues,
                netif.PORT_KEY: self.default_port,
            },
        )
        try:
            self.mac = parse_mac(said["mac"])
        except UsageError as error:
            raise UsageError(f"{self.dev.node}/mac: {error}") from None
        if not MIN_MTU <= said["mtu"] <= MAX_MTU:
            raise UsageError(f"{self.dev.node}/mtu: {said['mtu']}, {MIN_MTU} to {MAX_MTU} it can be")
        self.mtu = said["mtu"]
        self._wanted_queues = said[OWN_QUEUES_KEY]
        if not 1 <= self._wanted_queues <= netif.MAX_QUEUES:
            raise UsageError(
                f"{self.dev.node}/{OWN_QUEUES_KEY}: {self._wanted_queues}, 1 to {netif.MAX_QUEUES} it can be"
            )
        self.cable.plug(await open_port(said[netif.PORT_KEY]))

    async def suspend(self) -> None:
        """Nothing more goes out or comes in. What is on the rings may be lost with them, as on any wire."""
        self.cable.hold()
        for link in self._links:
            if link.rx is not None:
                link.rx.hold()

    async def resume(self, cancelled: bool) -> None:
        if cancelled:
            for link in self._links:
                if link.rx is not None:
                    link.rx.release()
            self.cable.release()
            return
        links, self._links = self._links, []
        self._carrier = None
        self._served = self._refuses = False
        for link in links:
            link.abandon()
        self.cable.down()

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                await self._close()
                await self._unmapped()
        finally:
            # Also when the deadline of a detach ended it.
            await self._tear_down()
            await self.cable.unplug()

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        cable = self.cable
        return {
            "mac": lambda: mac_text(self.mac),
            "mtu": lambda: self.mtu,
            "carrier": lambda: int(cable.connected),
            "queues": lambda: len(self._links),
            "data_pages": lambda: sum(link.data_pages for link in self._links),
            **cable.leaves(),
        }

    def operations(self) -> Mapping[str, Operation]:
        """See xenbus.bus.operations: the packet interface, for whoever has no program in the guest."""
        return {"send": self._op_send, "receive": self._op_receive}

    async def _op_send(self, call: OperatorCall) -> object:
        try:
            frame = base64.b64decode(call.text("data"), validate=True)
        except binascii.Error as error:
            raise UsageError(f"data is no base64: {error}") from None
        await self.send(frame, call.number("seconds", 10))
        return len(frame)

    async def _op_receive(self, call: OperatorCall) -> object:
        """One frame at least, and more that are there already."""
        most = call.number("limit", OPERATION_FRAMES)
        frames = [await self.recv(call.number("seconds", 10))]
        while self.port.waiting and len(frames) < min(most, OPERATION_FRAMES):
            frames.append(await self.recv(0))
        return [base64.b64encode(frame).decode() for frame in frames]

    # -- the handshake

    async def _initialise(self) -> None:
        """The back end's offer is known: make the rings, with pages to receive into, and publish them."""
        dev = self.dev
        if dev.state is XenbusState.CONNECTED and self._served:
            await self._back_restarted()
        elif dev.state is XenbusState.CLOSED and not self._refuses:
            # It was away (or we closed with it), and waits for us again.
            await self._begin_anew()
        if dev.state is not XenbusState.INITIALISING or self._links:
            return
        agreed = await self._agree()
        count, split = agreed.number(QUEUES.name), bool(agreed[SPLIT.name])
        self._links = [FrontLink(dev, self._grow) for _ in range(count)]
        for link in self._links:
            await link.build(split=split)
        values: dict[str, object] = {
            netif.RX_COPY_KEY: 1,
            "feature-rx-notify": int(self.rx_notify),
            **offers.nodes(self),
            netif.MULTICAST_KEY: int(self.multicast_control and bool(agreed[MULTICAST.name])),
        }
        if count > 1:
            values[netif.NUM_QUEUES_KEY] = count
        for n, link in enumerate(self._links):
            values |= link.nodes(f"queue-{n}/" if count > 1 else "")
        await self._clear(values, TRANSPORT_KEY)
        sends = offers.link_of(agreed, self.mtu, self.mac)
        for link in self._links:
            await link.connect(self.cable, sends, notifies=self.rx_notify, on_broken=self._broken)
        # As all netfronts do, past Initialised: Linux's netback connects when it sees this.
        await dev.set_state(XenbusState.CONNECTED, values)

    async def _agree(self) -> Negotiated:
        """PeerError for a back end that wants to flip pages."""
        dev = self.dev
        said = await self._said((*offers.KEYS, *(feature.peer_key for feature in _OWN), "feature-rx-copy"))
        if said["feature-rx-copy"] != "1":
            raise PeerError(f"{dev.otherend_path}/feature-rx-copy is not 1: it does not copy packets to us")
        dev.features = offers.agree(
            self,
            said,
            *_OWN,
            queues=self._wanted_queues,
            split_event_channels=int(self.split_event_channels),
            multicast_control=1,
            dynamic_multicast_control=1,
        )
        return dev.features

    async def _connect(self) -> None:
        """The back end serves our rings."""
        if self.dev.state is not XenbusState.CONNECTED or not self._links or self._served:
            return
        self._served, self._tries = True, 0
        # There or not, it may come: a watch of its own, which fires at once.
        path = f"{self.dev.otherend_path}/carrier"
        try:
            self._carrier = await self.dev.watch(path, lambda _: self._look_at_carrier())
        except StoreError as error:  # a guest has a quota of watches, and can do without this one
            self.dev.log.warning("its link is taken as it is now: %s", error)
        await self._carrier_changed()

    def _look_at_carrier(self) -> None:
        if self._served:
            self.dev.spawn(self._carrier_changed(), name=f"{self.dev.nameunit} looks at its carrier")

    async def _carrier_changed(self) -> None:
        """netif.h, "Link state": no node is as good as 1."""
        try:
            on = (await self.dev.otherend_read_opt("carrier") or "1") != "0"
        except (StoreError, LinkDown):
            return  # the watch fired because its whole node went, and nobody may look where it was
        agreed = self.dev.features
        lanes = [link.tx for link in self._links if link.tx is not None]
        if not self._served or agreed is None or not lanes:
            return
        if not on:
            self.cable.down()
        elif not self.cable.connected:
            self.cable.up(lanes, offers.link_of(agreed, self.mtu, self.mac))
            for group in self.groups if agreed[MULTICAST.name] else ():
                lanes[0].send_extra(netif.multicast_extra(group, add=True))
            self._resume_rings()

    async def _back_restarted(self) -> None:
        """It begins anew without having closed: the rings are nobody's."""
        if self._served:
            await self._tear_down()
            await self.dev.set_state(XenbusState.INITIALISING)

    # -- the end

    async def _stop(self) -> None:
        """Nothing more goes out or comes in. The pages stay granted. Idempotent."""
        self._served = False
        self.cable.down()
        for link in self._links:
            link.stop()
        watch, self._carrier = self._carrier, None
        if watch is not None:
            try:
                await self.dev.unwatch(watch)
            except XenbusError as error:
                self.dev.log.warning("%s", error)

    async def _tear_down(self) -> None:
        """The same, and every page is given back. Idempotent."""
        await self._stop()
        links, self._links = self._links, []
        for link in links:
            await link.give_back()

    # -- what the queues ask for

    def _resume_rings(self) -> None:
        for link in self._links:
            if link.rx is not None:
                link.rx.kick()

    def _broken(self, error: PeerError) -> None:
        """The back end put nonsense on a ring: nothing it says there is believed any more."""
        if not self._refuses:
            self._refuses = True
            self.cable.down()
            for link in self._links:
                link.stop()
            self.dev.spawn(self.dev.fatal(error), name=f"{self.dev.nameunit} gives up")

    def _grow(self, pool: Pool, then: Callable[[], None]) -> None:
        if not pool.growing:
            pool.growing = True
            self.dev.spawn(self._grow_pool(pool, then), name=f"{self.dev.nameunit} grows a pool")

    @staticmethod
    async def _grow_pool(pool: Pool, then: Callable[[], None]) -> None:
        try:
            await pool.grow()
        finally:
            pool.growing = False
        then()
