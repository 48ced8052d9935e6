"""A domain process's end of its event channels: links to other handles, and the channels on them.

May know memory and eventfd; knows nothing of the broker's protocol. notify and the wake-up are the hot
path: one system call and a byte each.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final

from xenbus.hypervisor.broker_wire import LINK_PORTS, Reserve, close_all
from xenbus.hypervisor.memory import Region, check_sealed

# Where stores become visible in program order, an uncontended lock is all the fence that is missing (a
# locked instruction). Elsewhere no pending byte is trusted and every channel of a link is looked at.
_TOTAL_STORE_ORDER: Final = platform.machine().lower() in {"x86_64", "amd64", "i686", "i386"}
_ANY: Final = b"\1"


class LinkEnd:
    """Our end of what the broker calls a link: a doorbell each way and the pending map.

    The sender stores its data, then 1 in the channel's byte, then writes the doorbell. We read the doorbell
    (which zeroes it), look for bytes that are set, clear them, fence, and only then run handlers. Why nothing
    is lost: a byte set after we looked is followed by a doorbell write, so we look again. A 1 stored over a 1
    and then overwritten by our 0 leaves no trace; but our 0 is then later than that sender's data, and the
    fence keeps our handler's loads behind our 0, so this very call sees that data.

    Skipping the doorbell because the byte is set already would be right only with a full fence between the
    sender's data and its look at the byte, which costs what it saves when the ring's event index has already
    suppressed most kicks: we always write it.
    """

    __slots__ = ("_bell", "_channels", "_fence", "_inbox", "_loop", "_region", "_seen", "doorbell", "outbox")

    def __init__(self, fds: tuple[int, ...], side: int) -> None:
        """Takes the three descriptors: the doorbell that wakes us, the other's, the pending map."""
        self._channels: list[BrokerChannel | None] = []
        self._loop = asyncio.get_running_loop()
        self._fence = threading.Lock()
        self._bell, self.doorbell, pending = fds
        try:
            check_sealed(pending, 2 * LINK_PORTS, writable=True)
            self._region = Region.of_fd(pending, 2 * LINK_PORTS, writable=True)
        except BaseException:
            close_all(fds)
            raise
        os.close(pending)
        view = self._region.view
        self._inbox = view[side * LINK_PORTS : (side + 1) * LINK_PORTS]
        self.outbox = view[(1 - side) * LINK_PORTS : (2 - side) * LINK_PORTS]
        self._seen = self._inbox[:0]
        self._loop.add_reader(self._bell, self._wake)

    @classmethod
    def kept(cls, fds: tuple[int, ...], side: int, reserve: Reserve) -> LinkEnd | None:
        """None if the doorbells would stay in the room that the next packet's descriptors need: without a
        link its channels are of no use, without the reserve nothing is."""
        link = cls(fds, side)
        if reserve.fill():
            return link
        link.close()
        return None

    def add(self, channel: BrokerChannel, index: int) -> None:
        """`channel` hears byte `index` from now on; what came before it was known here counts."""
        missing = index + 1 - len(self._channels)
        if missing > 0:
            self._channels.extend([None] * missing)
            self._seen = self._inbox[: index + 1]
        self._channels[index] = channel
        if self._inbox[index]:
            self._inbox[index] = 0
            self._loop.call_soon(channel.deliver)

    def remove(self, channel: BrokerChannel, index: int) -> None:
        if index < len(self._channels) and self._channels[index] is channel:
            self._channels[index] = None
            self._inbox[index] = 0

    def _wake(self) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return
        seen = self._seen.tobytes()
        index = seen.find(_ANY)
        if not _TOTAL_STORE_ORDER:
            self._look_at_all()
        elif index >= 0:
            self._run(seen, index)

    def _run(self, seen: bytes, index: int) -> None:
        inbox, channels = self._inbox, self._channels
        hit = []
        while index >= 0:
            channel = channels[index]
            # A byte nobody listens to yet stays set: add() looks at it.
            if channel is not None:
                inbox[index] = 0
                hit.append(channel)
            index = seen.find(_ANY, index + 1)
        self._fence.acquire()
        self._fence.release()
        for channel in hit:
            channel.deliver()

    def _look_at_all(self) -> None:
        for index, channel in enumerate(self._channels):
            if channel is not None:
                self._inbox[index] = 0
                channel.deliver()

    def close(self) -> None:
        """Every channel on it is unbound. Idempotent."""
        if self._bell < 0:
            return
        for channel in self._channels:
            if channel is not None:
                channel.unbind()
        self._channels = []
        self._loop.remove_reader(self._bell)
        close_all((self._bell, self.doorbell))
        self._bell = self.doorbell = -1
        for view in (self._seen, self._inbox, self.outbox):
            view.release()
        self._region.close()


class BrokerChannel:
    """Channel. Unbound while it is on no link."""

    __slots__ = (
        "_close",
        "_closed",
        "_doorbell",
        "_handler",
        "_index",
        "_link",
        "_loop",
        "_masked",
        "_outbox",
        "_owed",
        "_pending",
        "port",
        "remote_domid",
    )

    def __init__(
        self,
        port: int,
        remote_domid: int,
        handler: Callable[[], None],
        close: Callable[[BrokerChannel], Coroutine[Any, Any, None]],
    ) -> None:
        self.port = port
        self.remote_domid = remote_domid
        self._handler = handler
        self._close = close
        self._loop = asyncio.get_running_loop()
        self._doorbell = -1
        self._outbox = memoryview(b"")
        self._index = 0
        self._link: LinkEnd | None = None
        self._masked = False
        self._pending = False
        self._closed = False
        self._owed = False

    def notify(self) -> None:
        if self._doorbell >= 0:
            self._outbox[self._index] = 1
            try:
                os.eventfd_write(self._doorbell, 1)
            except BlockingIOError:
                pass  # the counter is full: the other end is woken as it is
        else:
            # The other end may have bound, and told us so by another way (the store), before the broker's
            # word of it is read here. Xen would deliver this one; so does bind().
            self._owed = True

    def deliver(self) -> None:
        """The handler runs now, or at unmask. What it raises goes to the loop's exception handler."""
        if self._closed:
            return
        if self._masked:
            self._pending = True
            return
        self._pending = False
        try:
            self._handler()
        except Exception as error:  # noqa: BLE001 - one bad handler must not silence the link's others
            context = {"message": f"handler of port {self.port}", "exception": error}
            self._loop.call_exception_handler(context)

    def mask(self) -> None:
        self._masked = True

    def unmask(self) -> None:
        self._masked = False
        if self._pending:
            self._loop.call_soon(self._deliver_pending)

    def _deliver_pending(self) -> None:
        if self._pending:
            self.deliver()

    def kick_self(self) -> None:
        """As if the other end had notified; not before who awaits the binding has the channel in hand."""
        self._loop.call_soon(self._loop.call_soon, self.deliver)

    def take_over(self, handler: Callable[[], None]) -> None:
        self._handler = handler

    def bind(self, link: LinkEnd, index: int) -> None:
        if self._link is link and self._index == index:
            return
        self.unbind()
        self._link, self._index = link, index
        self._outbox, self._doorbell = link.outbox, link.doorbell
        link.add(self, index)
        if self._owed:
            self._owed = False
            self.notify()

    def unbind(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            self._doorbell = -1
            self._outbox = memoryview(b"")
            link.remove(self, self._index)

    def drop(self) -> None:
        """Closed on this side only: the broker knows already, or is gone."""
        self._closed = True
        self._handler = _nothing
        self.unbind()

    async def close(self) -> None:
        if not self._closed:
            self.drop()
            await self._close(self)


def _nothing() -> None:
    pass
