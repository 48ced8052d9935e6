"""Probe, attach, detach, suspend and resume of devices on plain buses.

Knows the tree and its drivers; no Xen, no loop (its functions are awaited in whatever loop there is).
"""

from __future__ import annotations

from collections.abc import Iterable

from xenbus.errors import UsageError
from xenbus.newbus.device import Device, DeviceState
from xenbus.newbus.driver import Driver, choose


async def probe_and_attach(device: Device, candidates: Iterable[type[Driver]]) -> Driver:
    """FreeBSD's device_probe_and_attach: the best bidder gets a unit and is attached.

    NoMatch if nobody bids. What attach raises is raised; the device has no driver and no unit then.
    """
    if device.state is not DeviceState.NOTPRESENT:
        raise UsageError(f"{device!r} has a driver")
    tree = device.tree
    cls = choose(candidates, device)
    tree.name(device, cls.name, cls.unit(device), cls.description)
    device.state = DeviceState.ATTACHING
    try:
        driver = cls(device)
        await driver.attach()
    except BaseException:
        tree.unname(device)
        raise
    device.softc = driver
    device.state = DeviceState.ATTACHED
    return driver


async def detach(device: Device) -> None:
    """Children first, the last one first; then the device. What a driver raises is raised, and that device
    and those above it stay attached. Idempotent."""
    for child in reversed(list(device.children)):
        await detach(child)
    if not isinstance(device.softc, Driver) or not device.attached:
        return
    device.state = DeviceState.DETACHING
    try:
        await device.softc.detach()
    except BaseException:
        device.state = DeviceState.ATTACHED
        raise
    device.tree.unname(device)


async def suspend(device: Device) -> None:
    """FreeBSD's bus_generic_suspend: children in order, then the device. One that refuses (raises) stops it,
    and those suspended before it are resumed as after a cancelled suspend."""
    done: list[Device] = []
    try:
        for child in device.children:
            await suspend(child)
            done.append(child)
        if isinstance(device.softc, Driver) and device.attached:
            await device.softc.suspend()
    except BaseException:
        for child in reversed(done):
            await resume(child, cancelled=True)
        raise


async def resume(device: Device, cancelled: bool) -> None:
    """The device, then its children."""
    if isinstance(device.softc, Driver) and device.attached:
        await device.softc.resume(cancelled)
    for child in device.children:
        await resume(child, cancelled)
