"""Linux's TAP devices and what is around them (linux/if_tun.h, linux/sockios.h): by ioctl alone, blocking.

Knows numbers of ioctls and how the kernel's refusals are said; knows no packets. Making a device, and all
that changes one, needs CAP_NET_ADMIN in its network namespace; entering a namespace, CAP_SYS_ADMIN. A device
that was made beforehand for our user (`ip tuntap add ... user`) is opened without either.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from xenbus.drivers.net.packet import Offloads
from xenbus.drivers.net.ports.registry import PortError
from xenbus.errors import UsageError

TUN_DEVICE: Final = "/dev/net/tun"
NETNS_DIRECTORY: Final = "/run/netns"  # where `ip netns add` puts names
IFNAMSIZ: Final = 16
_IFREQ_SIZE: Final = 40  # struct ifreq on 64-bit machines

TUNSETIFF: Final = 0x400454CA
TUNSETPERSIST: Final = 0x400454CB
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNGETIFF: Final = 0x800454D2
TUNSETCARRIER: Final = 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_CLONE_NEWNET = 0x40000000

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
SIOCSIFHWADDR, SIOCGIFINDEX, SIOCBRADDIF = 0x8924, 0x8933, 0x89A2
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
# What libxl's scripts give the host's end of a vif, so that no bridge takes its address for its own.
BRIDGED_MAC: Final = b"\xfe\xff\xff\xff\xff\xff"


def _name_in(ifreq: bytearray) -> str:
    return os.fsdecode(bytes(ifreq[:IFNAMSIZ]).partition(b"\0")[0])


class TunDevice:
    """An open TAP: `fds`, one a queue, non-blocking, each packet behind a virtio_net_hdr of `header` bytes.

    target: as the user wrote it, for messages
    """

    def __init__(self, target: str, wanted: str, queues: int = 1) -> None:
        """Opens or makes it, in the calling thread's network namespace. PortError."""
        self.target = target
        self.fds: list[int] = []
        self._kept = False
        # Stays in this namespace, whoever asks: what follows goes to the right device.
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._name = wanted
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
            for _ in range(queues):
                self._open_queue(flags)
        except BaseException:
            self.close()
            raise

    def _open_queue(self, flags: int) -> None:
        try:
            fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._refused(error, _OPENING) from None
        self.fds.append(fd)
        request = bytearray(
            struct.pack(f"{IFNAMSIZ}sH", os.fsencode(self.name), flags).ljust(_IFREQ_SIZE, b"\0")
        )
        try:
            fcntl.ioctl(fd, TUNSETIFF, request)
        except OSError as error:
            raise self._refused(error, _ATTACHING) from None
        self._name = _name_in(request)  # `%d` has become a number
        # The legacy header, which each kernel has from the start: ten bytes in our own order.
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 10))

    @property
    def name(self) -> str:
        """As the kernel has it now: hotplug scripts rename devices."""
        if self.fds:
            request = bytearray(_IFREQ_SIZE)
            with suppress(OSError):  # not attached yet, or somebody deleted it
                fcntl.ioctl(self.fds[0], TUNGETIFF, request)
                self._name = _name_in(request)
        return self._name

    def _refused(self, error: OSError, hints: dict[int, str]) -> PortError:
        number = error.errno or 0
        hint = hints.get(number, "")
        return PortError(
            errno.errorcode.get(number, str(number)),
            self.target,
            hint.format(name=self.name, user=os.getuid()) or f"TAP device {self.name!r}: {error.strerror}",
        )

    def keep(self) -> None:
        """It stays when it is closed with `leave`, or by the end of this process."""
        fcntl.ioctl(self.fds[0], TUNSETPERSIST, 1)
        self._kept = True

    def close(self, *, leave: bool = False) -> None:
        """A device that was not made beforehand goes with it, and one that was kept unless it is left.
        Idempotent."""
        fds, self.fds = self.fds, []
        if fds and self._kept and not leave:
            with suppress(OSError):  # somebody deleted it
                fcntl.ioctl(fds[0], TUNSETPERSIST, 0)
        for fd in fds:
            os.close(fd)
        self._control.close()

    # -- what anybody may who has it open

    def take(self, offloads: Offloads) -> None:
        """What the kernel may hand us: it makes plain packets of the others itself."""
        flags = 0
        if offloads.csum or offloads.csum6:
            flags |= _TUN_F_CSUM  # of both kinds
            flags |= _TUN_F_TSO4 if offloads.tso4 else 0
            flags |= _TUN_F_TSO6 if offloads.tso6 else 0
        for fd in self.fds:
            fcntl.ioctl(fd, TUNSETOFFLOAD, flags)

    def set_carrier(self, up: bool) -> None:
        """Whether the device has a link (`ip link` says LOWER_UP). Kernels before 4.20 can't tell."""
        try:
            fcntl.ioctl(self.fds[0], TUNSETCARRIER, struct.pack("i", up))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY, errno.EPERM):
                raise

    # -- what needs CAP_NET_ADMIN. PortError

    def _request(self, number: int, rest: bytes, doing: str, device: str = "") -> bytes:
        name = os.fsencode(device or self.name)
        request = struct.pack(f"{IFNAMSIZ}s", name) + rest
        try:
            return fcntl.ioctl(self._control, number, request.ljust(_IFREQ_SIZE, b"\0"))[IFNAMSIZ:]
        except OSError as error:
            code = error.errno or 0
            what = f"{doing}: {error.strerror}{_CHANGING.get(code, '')}"
            raise PortError(errno.errorcode.get(code, str(code)), self.target, what) from None

    def up(self) -> None:
        """As it is with `ip link set NAME up`; nothing if it is."""
        flags = struct.unpack_from(
            "H", self._request(SIOCGIFFLAGS, b"", f"reading the flags of {self.name}")
        )[0]
        if not flags & _IFF_UP:
            self._request(SIOCSIFFLAGS, struct.pack("H", flags | _IFF_UP), f"setting {self.name} up")

    def set_mtu(self, mtu: int) -> None:
        """Nothing if it has that one."""
        now = struct.unpack_from("i", self._request(SIOCGIFMTU, b"", f"reading the MTU of {self.name}"))[0]
        if now != mtu:
            self._request(SIOCSIFMTU, struct.pack("i", mtu), f"setting the MTU of {self.name} to {mtu}")

    def set_mac(self, mac: bytes) -> None:
        address = struct.pack("H6s", _ARPHRD_ETHER, mac)
        self._request(SIOCSIFHWADDR, address, f"setting the address of {self.name} to {mac.hex(':')}")

    def join(self, bridge: str) -> None:
        """Into a bridge, which is there (`ip link add NAME type bridge`)."""
        index = self._request(SIOCGIFINDEX, b"", f"reading the index of {self.name}")[:4]
        self._request(SIOCBRADDIF, index, f"putting {self.name} into bridge {bridge!r}", bridge)


# By errno, what to do.
_OPENING: Final = {
    errno.ENOENT: f"{TUN_DEVICE} is not there: `modprobe tun`, or give the container that device",
    errno.ENODEV: f"{TUN_DEVICE} has no driver: `modprobe tun`",
    errno.EACCES: f"{TUN_DEVICE} is not ours to open: it is mode 0666 on most systems",
    errno.EPERM: f"{TUN_DEVICE}: the container's rules do not allow it",
}
_ATTACHING: Final = {
    errno.EPERM: "TAP device {name!r}: making one needs root (CAP_NET_ADMIN), opening one that was made for "
    "our user does not: `ip tuntap add dev {name} mode tap user {user}` (`multi_queue` with several queues)",
    errno.EBUSY: "TAP device {name!r} is open elsewhere, or all its queues are",
    errno.EINVAL: "{name!r} is there and no TAP device, or one without (or with) `multi_queue` where queues "
    "are (or are not) asked for: `ip -d link show {name}`",
}
_CHANGING: Final = {
    errno.EPERM: " (it needs root: CAP_NET_ADMIN)",
    errno.ENODEV: " (there is none of that name: `ip link show`)",
    errno.EOPNOTSUPP: " (that is no bridge)",
    errno.EBUSY: " (it is in one already: `ip link set NAME nomaster`, or don't ask for one)",
}


def check_ifname(name: str) -> str:
    """A name that a network device can have; UsageError. `%d` in it becomes the lowest free number."""
    raw = os.fsencode(name)
    if not 0 < len(raw) < IFNAMSIZ or name in (".", "..") or set(raw) & set(b"/:?&= \t\n\0"):
        raise UsageError(
            f"{name!r} is no name of a network device: 1 to {IFNAMSIZ - 1} bytes, no `/`, `:`, blank"
        )
    if name.replace("%d", "", 1).count("%"):
        raise UsageError(f"{name!r}: one `%d` at most, and no other `%`")
    return name


def inside(netns: str, target: str, action: Callable[[], TunDevice]) -> TunDevice:
    """`action` in a network namespace, a name of `ip netns` or a path (/proc/PID/ns/net); "" is our own.

    The calling thread stays there: it has to be one that ends. PortError.
    """
    if netns:
        path = Path(netns) if "/" in netns else Path(NETNS_DIRECTORY, netns)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # whatever it is: at once
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "EIO")
            raise PortError(code, target, f"network namespace {path}: {error.strerror}") from None
        try:
            _enter(fd, path, target)
        finally:
            os.close(fd)
    return action()


def _enter(fd: int, path: Path, target: str) -> None:
    """setns(2), which os has from Python 3.12 on."""
    if sys.version_info >= (3, 12):
        try:
            os.setns(fd, _CLONE_NEWNET)
            return
        except OSError as error:
            number = error.errno or 0
    else:
        if not ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
            return
        number = ctypes.get_errno()
    hint = " (it needs root: CAP_SYS_ADMIN)" if number == errno.EPERM else ""
    code = errno.errorcode.get(number, str(number))
    raise PortError(code, target, f"entering network namespace {path}: {os.strerror(number)}{hint}")
