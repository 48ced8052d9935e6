"""The life of one device, as its bus leads it: attach, events, detach, failure, suspend and resume.

Runs in the device's mailbox (events) or in a task of the bus (detach, resume); changes no tree: that is
posted to the bus. Every callback of a driver goes through `call`, which ends it when its time is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Hashable
from typing import Any

from xenbus.bus.device import DeviceGone, XenbusDevice
from xenbus.bus.driver import XenbusDriver
from xenbus.bus.peer import read_peer
from xenbus.bus.state import WAITS_FOR, XenbusState, owed_by
from xenbus.errors import DeadlineError, LinkDown, XenbusError
from xenbus.newbus import DeviceState, NoMatch
from xenbus.newbus.runtime import end_task, within

log = logging.getLogger("xenbus.bus")
_CLOSING = (XenbusState.CLOSING, XenbusState.CLOSED)
# What only a former process can have brought a device to that we attach.
_LEFT = (XenbusState.CONNECTED, *_CLOSING)
# A peer that stands here has no connection with us and owes no answer to our Closing.
_NOT_CONNECTED = (XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.CLOSED)


class Suspend:
    """The event that suspends a device. `done` holds what the driver raised, or None."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def dropped(self) -> None:
        """The mailbox was emptied before it came to this: the device goes, there is nothing to suspend."""
        self.end(None)

    def end(self, failure: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(failure)


async def call(dev: XenbusDevice, what: str, callback: Coroutine[Any, Any, None], seconds: float = 0) -> None:
    """One callback of the driver. DeadlineError if it takes longer than its deadline (or `seconds`)."""
    limit = seconds or (dev.driver.deadline if dev.driver is not None else None) or dev.bus.settings.callback
    before = dev.queueing()
    await within(
        limit,
        callback,
        f"{what} of {dev.nameunit or dev.node}",
        f"its driver's {what}()",
        lambda: dev.queueing() - before,
    )


async def attempt(action: Coroutine[Any, Any, None]) -> Exception | None:
    """What it raised, for a caller that goes on with the other devices."""
    try:
        await action
    except Exception as exc:
        log.debug("attempt", exc_info=True)
        return exc
    return None


async def handle(dev: XenbusDevice, event: Hashable) -> None:
    """One event of the device's mailbox."""
    match event:
        case "attach":
            await attach(dev)
        case "otherend":
            await otherend(dev)
        case ("local", str() as path):
            await _guarded(dev, "localend_changed", dev.bus.localend_changed(dev, path))
        case Suspend() as order:
            failure = await attempt(suspend(dev))
            dev.mailbox.pause()
            order.end(failure)


async def _guarded(dev: XenbusDevice, what: str, callback: Coroutine[Any, Any, None]) -> None:
    """What a callback raises is fatal to the device; one that does not end fails it for good."""
    try:
        await callback
    except DeviceGone as exc:
        dev.log.info("%s: %s", what, exc)
    except DeadlineError as exc:
        if exc.what.startswith(what):
            await fail(dev, exc)
        else:
            await dev.fatal(exc, doing=what)
    except Exception as exc:
        dev.log.debug("%s", what, exc_info=True)
        await dev.fatal(exc, doing=what)


# ---- attach ----


async def attach(dev: XenbusDevice) -> None:
    """device_attach and what xenbusb_probe_children does with its result; probe chose the driver."""
    device, cls = dev.device, dev.bus.chosen.pop(dev, None)
    if cls is None or dev.gone:
        return
    device.state = DeviceState.ATTACHING
    try:
        if isinstance(cls, Exception):
            raise cls
        dev.driver = cls(dev)
        if dev.state in _LEFT:
            await _recover(dev, dev.driver)
        else:
            await call(dev, "attach", dev.driver.attach())
        device.softc = dev.driver
        device.state = DeviceState.ATTACHED
        # The driver can take events from here on: the peer's first, then our own node's.
        dev.peer_watch = await dev.store.watch(f"{dev.otherend_path}/state", dev.peer_event)
        dev.local_watch = await dev.store.watch(dev.node, dev.local_event)
    except NoMatch:
        # An emulated twin may share the backend: the store stays as it is.
        await _let_go(dev)
        dev.bus.post_forget(dev)
    except Exception as exc:
        dev.log.debug("attach", exc_info=True)
        await _refuse(dev, exc)
    else:
        dev.bus.changed(dev, "attached")


async def _recover(dev: XenbusDevice, driver: XenbusDriver) -> None:
    """The driver goes on where a former process stopped; if it cannot, the device closes in order."""
    state = await read_peer(dev)
    if state is not None:
        dev.peer_moved(state)
    try:
        await call(dev, "recover", driver.recover())
    except (DeviceGone, NoMatch):
        raise
    except Exception as exc:
        dev.log.debug("recover", exc_info=True)
        dev.count("not_recovered")
        await dev.fatal(exc, doing="going on for a process that ended")


async def _refuse(dev: XenbusDevice, exc: Exception) -> None:
    """Attach failed: say why, close, forget. In state Closed the bus does not find it again."""
    dev.bus.refused(dev, exc)
    if not isinstance(exc, DeviceGone):
        await dev.error(exc)
    await _close_watches(dev)
    await _begin_detach(dev, dev.bus.settings.detach)
    await _let_go(dev)
    await _quiet_state(dev, XenbusState.CLOSED)
    dev.bus.post_forget(dev)


async def _let_go(dev: XenbusDevice) -> None:
    """What it holds of the world, the hold on boot included."""
    await dev.give_back()
    dev.release_hold()


# ---- events ----


async def otherend(dev: XenbusDevice) -> None:
    """seed: xenbusb_otherend_watch_cb: the state is read from the store, whatever the event said."""
    state = await read_peer(dev)
    if state is None or (state is XenbusState.CLOSED and await dev.bus.is_restored()):
        return
    dev.peer_moved(state)
    if dev.driver is not None:
        await _guarded(dev, "otherend_changed", dev.bus.otherend_changed(dev, state))


async def fail(dev: XenbusDevice, exc: DeadlineError) -> None:
    """A driver that does not end: error node, Closing, Closed; what it held is given back; it stays in the
    tree, marked, until its node goes or is armed again."""
    dev.failed = str(exc)
    await dev.fatal(exc)
    await _close_watches(dev)
    await _begin_detach(dev, min(dev.bus.settings.detach, dev.bus.settings.callback))
    await _let_go(dev)
    dev.device.softc = None
    dev.device.state = DeviceState.ALIVE
    await _quiet_state(dev, XenbusState.CLOSED)
    dev.bus.changed(dev, "failed")


async def _quiet_state(dev: XenbusDevice, state: XenbusState) -> None:
    try:
        await dev.set_state(state)
    except XenbusError as exc:
        dev.log.error("cannot go to %s: %s", state.name, exc)


# ---- detach ----


async def _close_watches(dev: XenbusDevice) -> None:
    """Peer, then local, as xenbusb_delete_child does; no event from the call on."""
    for name in ("peer_watch", "local_watch"):
        watch = getattr(dev, name)
        setattr(dev, name, None)
        if watch is not None:
            try:
                await watch.close()
            except XenbusError as exc:
                dev.log.warning("watch on %s: %s", watch.path, exc)


async def _driver_detach(dev: XenbusDevice, seconds: float) -> None:
    """The driver's detach, once; afterwards it hears nothing more. What it raises is recorded."""
    driver = dev.driver
    if driver is None:
        return
    try:
        await call(dev, "detach", driver.detach(), max(seconds, 0.001))
    except Exception as exc:
        dev.count("detach_failures")
        dev.log.error("detach: %s", exc)
        dev.log.debug("detach", exc_info=True)
    dev.driver = None


async def _begin_detach(dev: XenbusDevice, seconds: float) -> None:
    """The driver's detach, once, whoever comes here first. One that was never attached is not detached: its
    attach cleaned up when it was cancelled."""
    attached = dev.device.attached
    dev.device.state = DeviceState.DETACHING
    dev.bus.changed(dev, "detaching")
    if attached:
        await _driver_detach(dev, seconds)
    dev.driver = None


async def _stop_mailbox(dev: XenbusDevice) -> None:
    task = dev.mailbox.cancel()
    if task is not None:
        await end_task(task)


async def vanish(dev: XenbusDevice) -> None:
    """The node is gone, or another device's: watches off, then detach; the store is not touched."""
    dev.gone = True
    dev.wake()
    await _close_watches(dev)
    await _stop_mailbox(dev)
    if dev.detaching:
        return  # an orderly detach is under way: it sees `gone`, and ends
    dev.detaching = True
    await _begin_detach(dev, dev.bus.settings.detach)
    await _let_go(dev)
    dev.bus.post_forget(dev)


async def detach(dev: XenbusDevice) -> None:
    """An orderly detach: the peer's events go on until it is Closed or the deadline ends."""
    if dev.detaching or dev.gone:
        return
    dev.detaching = True
    end = dev.bus.now() + dev.bus.settings.detach
    if not dev.device.attached:
        await _stop_mailbox(dev)
    await _begin_detach(dev, end - dev.bus.now())
    if dev.state not in _CLOSING and not dev.gone:
        await _quiet_state(dev, XenbusState.CLOSING)
    await _await_peer(dev, end)
    await _close_watches(dev)
    await _stop_mailbox(dev)
    await _let_go(dev)
    if not dev.gone:
        await _quiet_state(dev, XenbusState.CLOSED)
        await dev.bus.closed(dev)
    dev.bus.post_forget(dev)


async def release(dev: XenbusDevice) -> None:
    """Lets go of a device for another process: what runs ends, the states stay. What the driver raises is
    raised, once everything was given back."""
    if dev.detaching or dev.gone:
        return
    dev.detaching = True
    try:
        async with asyncio.timeout(dev.bus.settings.callback):
            await dev.mailbox.stand_still()
    except TimeoutError:
        dev.log.warning("a callback of its driver had to be ended")
    await _stop_mailbox(dev)
    attached, driver = dev.device.attached, dev.driver
    dev.device.state = DeviceState.DETACHING
    await _close_watches(dev)
    try:
        if attached and driver is not None:
            await call(dev, "release", driver.release())
    finally:
        dev.driver = None
        await _let_go(dev)
        dev.bus.post_forget(dev)


async def _await_peer(dev: XenbusDevice, end: float) -> None:
    """Until the peer has answered our Closing, if it was ever there and is watched."""
    if dev.peer_watch is None or dev.otherend_state in _NOT_CONNECTED or dev.state is XenbusState.CLOSED:
        return
    try:
        states = WAITS_FOR[dev.side, XenbusState.CLOSING]
        await dev.wait_otherend(*states, timeout=max(end - dev.bus.now(), 0.0))
    except (DeadlineError, LinkDown) as exc:
        dev.count("forced_detaches")
        dev.log.warning("detached by force: %s", exc)


# ---- suspend and resume ----


async def suspend(dev: XenbusDevice) -> None:
    """In its mailbox, after what waits there; then the mailbox stands still until `resume`."""
    if dev.driver is not None and dev.device.attached:
        await call(dev, "suspend", dev.driver.suspend())


async def resume_cancelled(dev: XenbusDevice) -> None:
    """Nothing changed: the driver alone is told, the store is not touched."""
    driver = _resumable(dev)
    if driver is not None:
        await call(dev, "resume", driver.resume(True))


def _resumable(dev: XenbusDevice) -> XenbusDriver | None:
    return dev.driver if dev.device.attached and not dev.detaching else None


async def resume(dev: XenbusDevice) -> None:
    """seed: xenbusb_resume, for one device, on the bus's new store and hypervisor. DeviceGone if the restored
    domain has it no more; what the driver raises is raised."""
    dev.mailbox.clear()
    dev.peer_watch = dev.local_watch = None  # of the old link: dead with it
    await dev.drop_all()
    dev.renew()
    dev.otherend_state = XenbusState.UNKNOWN
    await dev.bus.adopt(dev)
    driver = _resumable(dev)
    if driver is None:
        raise DeviceGone(f"{dev.node} was not attached")
    dev.local_watch = await dev.store.watch(dev.node, dev.local_event)
    try:
        await call(dev, "resume", driver.resume(False))
    finally:
        # After a failure, too: the device then closes, for which it has to hear its peer.
        dev.peer_watch = await dev.store.watch(f"{dev.otherend_path}/state", dev.peer_event)


async def drop(dev: XenbusDevice) -> None:
    """A device that was not attached when its domain was suspended for real: nothing of it is left to
    call."""
    dev.peer_watch = dev.local_watch = None
    await dev.drop_all()
    await vanish(dev)


async def resume_failed(dev: XenbusDevice, exc: Exception) -> None:
    """The device that could not be resumed is closed; the others go on (B13)."""
    if isinstance(exc, DeviceGone):
        await vanish(dev)
    elif isinstance(exc, DeadlineError):
        await fail(dev, exc)
    else:
        await dev.fatal(exc, doing="resume")


def waits(dev: XenbusDevice) -> str:
    """Who owes the next move, for people: "" if nobody does."""
    if dev.failed:
        return f"failed: {dev.failed}"
    if dev.device.state is DeviceState.ATTACHING:
        return "waits for its driver's attach"
    return owed_by(dev.side, dev.state, dev.otherend_state, dev.otherend_path, dev.otherend_id)
