"""Network devices, as a toolstack describes them: the nodes of both halves of a `vif`, as libxl writes them.

Knows targets of far sides as texts; opens none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from xenbus.drivers.net.packet import ETH_DATA_LEN, MAX_MTU, MIN_MTU
from xenbus.drivers.net.ports.mac import mac_text, parse_mac, random_mac
from xenbus.drivers.net.ports.registry import parse_target
from xenbus.drivers.net.ports.tun import check_ifname
from xenbus.errors import UsageError
from xenbus.toolstack.devices import DeviceSpec, list_devices
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

KIND = "vif"
QUEUES_MAX = 16
DEVICES_MAX = 256  # of one domain
DEFAULT_SWITCH = "lan"
PORT_KEY = "xenbus-port"  # ours: either half's far side, a target of `open_port`
MAX_QUEUES_KEYS = ("xn-max-queues", "xnb-max-queues")


@dataclass(slots=True, frozen=True)
class NicSpec:
    """One network device for one guest.

    devid:     its number there, the `handle`
    mac:       the guest's address; None: one of Xen's, by chance
    bridge:    a Linux bridge that gets a TAP device for it
    tap:       a TAP device by name, with options as `tap:` takes them (`vif1?netns=lab`)
    switch:    a switch of the back end's process, by name. One of the three at most; none is DEFAULT_SWITCH
    front:     the guest's own far side, a target; "" leaves it to its driver: the packet interface
    capture:   a file in which the back end writes what passes, as pcapng; "" for none
    mtu:       bytes behind the Ethernet header
    queues:    at most; 0 leaves it to the drivers
    back_kind: the type under which the back end finds it
    """

    front_domid: int
    devid: int = 0
    mac: str | None = None
    bridge: str = ""
    tap: str = ""
    switch: str = ""
    front: str = ""
    capture: str = ""
    mtu: int = ETH_DATA_LEN
    queues: int = 0
    back_domid: int = 0
    back_kind: str = KIND

    def device(self) -> DeviceSpec:
        """UsageError for what no device can have."""
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise UsageError(f"MTU {self.mtu}: {MIN_MTU} to {MAX_MTU} it can be")
        if not 0 <= self.queues <= QUEUES_MAX:
            raise UsageError(f"{self.queues} queues: 1 to {QUEUES_MAX} there can be")
        mac = mac_text(parse_mac(self.mac) if self.mac is not None else random_mac())
        both = {"handle": str(self.devid), "mac": mac}
        mtu = {"mtu": str(self.mtu)} if self.mtu != ETH_DATA_LEN else {}
        front = {**both, "trusted": "1"}
        # No `script`, and no `hotplug-status` that a back end would wait for: ours opens its port itself.
        back = {**both, **mtu, "type": KIND, PORT_KEY: self._target()}
        if self.bridge:
            back["bridge"] = self.bridge
        if self.front:
            parse_target(self.front)
            front[PORT_KEY] = self.front
        if self.queues:
            front[MAX_QUEUES_KEYS[0]] = back[MAX_QUEUES_KEYS[1]] = str(self.queues)
        own = "" if self.back_kind == KIND else self.back_kind
        return DeviceSpec(
            DevicePaths(KIND, self.devid, self.front_domid, self.back_domid, own), front, back, mtu
        )

    def _target(self) -> str:
        """Of the back end's far side."""
        if sum(map(bool, (self.bridge, self.tap, self.switch))) > 1:
            raise UsageError("a bridge, a TAP device or a switch: a device has one far side")
        if self.bridge:
            target = f"tap:vif{self.front_domid}.{self.devid}?bridge={check_ifname(self.bridge)}"
        else:
            target = f"tap:{self.tap}" if self.tap else f"switch:{self.switch or DEFAULT_SWITCH}"
        if self.capture:
            # The back end runs in another process with another working directory.
            path = quote(str(Path(self.capture).absolute()))
            target += f"{'&' if '?' in target else '?'}capture={path}"
        parse_target(target)
        return target


def switch_of(spec: DeviceSpec) -> str:
    """The name of the switch that a device is a port of; "" for any other device."""
    target = spec.back.get(PORT_KEY, "")
    return target.removeprefix("switch:").partition("?")[0] if target.startswith("switch:") else ""


async def free_devid(store: Client, domid: int) -> int:
    """The lowest number that no network device of the domain has. UsageError if it has DEVICES_MAX."""
    used = {spec.paths.devid for spec in await list_devices(store, domid) if spec.paths.kind == KIND}
    for number in range(DEVICES_MAX):
        if number not in used:
            return number
    raise UsageError(f"domain {domid} has {DEVICES_MAX} network devices, the most")
