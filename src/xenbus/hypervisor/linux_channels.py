"""Event channels by /dev/xen/evtchn: one descriptor and one reader for all ports of a handle.

May know the ABI and the interface. The kernel disables a port when it tells of an event and enables it when
the port is written back (drivers/xen/evtchn.c): that is done after the handler has run, so that a storm of
events costs one wake-up a run of the handler, and nothing is lost, as a disabled port stays pending.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from xenbus.errors import HypervisorError
from xenbus.hypervisor import linux_abi as abi
from xenbus.hypervisor.interface import PAGE_SIZE, Channel

log = logging.getLogger(__name__)


class LinuxChannel:
    """Channel."""

    __slots__ = ("_closed", "_handler", "_masked", "_owner", "_pending", "port", "raw_port", "remote_domid")

    def __init__(self, owner: PortTable, port: int, remote_domid: int, handler: Callable[[], None]) -> None:
        self._owner = owner
        self._handler = handler
        self._masked = False
        self._pending = False
        self._closed = False
        self.port = port
        self.raw_port = abi.PORT.pack(port)
        self.remote_domid = remote_domid

    def notify(self) -> None:
        if not self._closed:
            abi.call(self._owner.fd, abi.IOCTL_EVTCHN_NOTIFY, self.raw_port, f"kicking port {self.port}")

    def mask(self) -> None:
        self._masked = True

    def unmask(self) -> None:
        self._masked = False
        if self._pending:
            self._owner.deliver_soon(self)

    def deliver(self) -> bool:
        """Runs the handler unless masked or closed; answers whether the port is to be enabled again.

        A masked port is: events that wait in Xen and one that waits here would be two calls on unmask.
        """
        if self._closed:
            return False
        if self._masked:
            self._pending = True
            return True
        self._pending = False
        try:
            self._handler()
        except Exception as error:  # noqa: BLE001 - the other ports of this turn are still to be served
            self._owner.failed(self, error)
        return not self._closed

    def deliver_pending(self) -> None:
        if self._pending:
            self.deliver()

    async def close(self) -> None:
        self.drop()

    def forget(self) -> None:
        """The port is nobody's any more."""
        self._closed = True

    def drop(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.unbind(self)


class PortTable:
    """EventChannels. The device is opened with the first port and closed by `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd: int | None = None
        self._channels: dict[int, LinuxChannel] = {}

    def __len__(self) -> int:
        return len(self._channels)

    @property
    def fd(self) -> int:
        if self._fd is None:
            self._fd = abi.open_device(abi.EVTCHN, nonblocking=True)
            self._loop.add_reader(self._fd, self._read)
        return self._fd

    def alloc_unbound(self, remote_domid: int, handler: Callable[[], None]) -> LinuxChannel:
        argument = bytearray(abi.PORT.pack(remote_domid))
        port = abi.call(
            self.fd, abi.IOCTL_EVTCHN_BIND_UNBOUND_PORT, argument, f"a port for domain {remote_domid}"
        )
        return self._add(port, remote_domid, handler)

    def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: Callable[[], None]
    ) -> LinuxChannel:
        """HypervisorError ENOENT: Xen says EINVAL alike of a port that is not there, not ours or bound."""
        what = f"port {remote_port} of domain {remote_domid}"
        if not 0 <= remote_port < 1 << 32:
            raise HypervisorError("ENOENT", what)
        argument = bytearray(abi.BIND_INTERDOMAIN.pack(remote_domid, remote_port))
        try:
            port = abi.call(self.fd, abi.IOCTL_EVTCHN_BIND_INTERDOMAIN, argument, what)
        except HypervisorError as error:
            raise HypervisorError(_BIND_ERRORS.get(error.name, error.name), what) from None
        return self._add(port, remote_domid, handler)

    def _add(self, port: int, remote_domid: int, handler: Callable[[], None]) -> LinuxChannel:
        channel = LinuxChannel(self, port, remote_domid, handler)
        self._channels[port] = channel
        return channel

    def unbind(self, channel: LinuxChannel) -> None:
        if self._channels.pop(channel.port, None) is not None:
            abi.call(self.fd, abi.IOCTL_EVTCHN_UNBIND, channel.raw_port, f"unbinding port {channel.port}")

    def _read(self) -> None:
        try:
            data = os.read(self.fd, PAGE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        channels = self._channels
        told = (channels.get(port) for (port,) in struct.iter_unpack("=I", data))
        self._enable([channel for channel in told if channel is not None and channel.deliver()])

    def deliver_soon(self, channel: LinuxChannel) -> None:
        self._loop.call_soon(channel.deliver_pending)

    def _enable(self, channels: Iterable[LinuxChannel]) -> None:
        """A port closed by a later handler of the same turn is no longer ours: the kernel skips it."""
        ports = b"".join(channel.raw_port for channel in channels)
        if ports and self._fd is not None:
            os.write(self._fd, ports)

    def failed(self, channel: LinuxChannel, error: Exception) -> None:
        message = f"the handler of port {channel.port} failed"
        self._loop.call_exception_handler({"message": message, "exception": error})

    def abandon(self) -> None:
        """After a restore: no port is unbound, their numbers are others' by now. Nor is the device closed."""
        for channel in self._channels.values():
            channel.forget()
        self._channels.clear()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            _keep_open(self._fd)
            os.close(self._fd)
            self._fd = None

    def close(self) -> None:
        for channel in list(self._channels.values()):
            channel.drop()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None


# Holds a descriptor, and does nothing else, until the system ends.
_KEEPER = """import signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while True:
    signal.pause()
"""
_keepers: list[subprocess.Popen[bytes]] = []


def _keep_open(fd: int) -> None:
    """Linux 6.1, drivers/xen/evtchn.c: a release after a restore unbinds ports by their old numbers. If such
    a number is nobody's by now that is a BUG, which leaves the process unkillable, otherwise the new owner's
    port is torn down. So the last close is put off for good, to a process that nobody misses."""
    command = [sys.executable, "-I", "-S", "-c", _KEEPER]
    null = subprocess.DEVNULL
    try:
        keeper = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, pass_fds=(fd,), cwd="/", start_new_session=True
        )
    except OSError as error:
        log.warning("nobody holds the old %s: this process must not end (%s)", abi.EVTCHN, error)
        os.dup(fd)  # never closed
    else:
        _keepers.append(keeper)


# xen/common/event_channel.c, evtchn_bind_interdomain: ESRCH for a domain that is not there.
_BIND_ERRORS = {"EINVAL": "ENOENT", "ESRCH": "ENOENT"}

if TYPE_CHECKING:
    _CHANNEL: type[Channel] = LinuxChannel
