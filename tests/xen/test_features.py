"""Each feature of a disk on and off, for each pairing of front and back end: agreed as it was set, by the
nodes of both ends and by what each says of itself; bytes compared both ways; discards, flushes and refusals
seen in dom0; unplugged in order. One guest a pairing, one disk after the other in it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.dom0 import HANDSHAKE, MIB, STORE, random_file, sha256
from tests.support.features import (
    SEGMENTS,
    SETUPS,
    Back,
    Blkfront,
    Facts,
    Front,
    Impossible,
    LinuxBlkback,
    OurXbbd,
    OurXbd,
    Setup,
    Target,
    nodes,
    published,
)
from tests.support.real_xen import dom0_ports
from tests.support.serving import serving
from tests.support.until import until
from tests.support.xl_guest import python_guest
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import DeviceSpec, detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client

pytestmark = [pytest.mark.features, pytest.mark.timeout(300)]
SIZE = 4 * MIB
WRITTEN = slice(MIB, 3 * MIB)
DROPPED = slice(3 * MIB, 4 * MIB)
PAIRINGS = {
    "blkfront-xbbd": (Blkfront, OurXbbd),
    "xbd-blkback": (OurXbd, LinuxBlkback),
    "xbd-xbbd": (OurXbd, OurXbbd),
}


@dataclass
class Rig:
    """A pairing that is up: the front in its guest, the back in dom0."""

    runner: asyncio.Runner
    store: Client
    front: Front
    back: Back

    @asynccontextmanager
    async def plugged(self, setup: Setup, target: Target) -> AsyncIterator[DeviceSpec]:
        spec = DiskSpec(
            self.front.guest.domid,
            str(target.path),
            readonly=setup.readonly,
            sector_size=setup.sector,
            options=tuple((await self.back.options(setup, target)).items()),
            back_kind=self.back.kind,
        ).device()
        await write_device(self.store, spec)
        try:
            await wait_connected(self.store, spec.paths, HANDSHAKE)
            await self.front.appear("xvda")
            yield spec
        finally:  # also after a failure: the next setup has the same guest
            assert await detach_device(self.store, spec.paths, timeout=HANDSHAKE)
        for node in (spec.paths.back, spec.paths.front, spec.paths.record):
            assert not await self.store.exists(node), node
        await self.front.vanish("xvda")


@asynccontextmanager
async def pairing(name: str, work: Path) -> AsyncIterator[tuple[Client, Front, Back]]:
    front_kind, back_kind = PAIRINGS[name]
    async with await Client.connect(STORE) as store, AsyncExitStack() as stack:
        if back_kind is OurXbbd:
            back: Back = OurXbbd(await stack.enter_async_context(serving(work / "run")))
        else:
            back = LinuxBlkback()
        front = front_kind(
            await stack.enter_async_context(python_guest(store, "features", vcpus=2, memory=384))
        )
        await front.start()
        yield store, front, back


@pytest.fixture(scope="module", params=PAIRINGS)
def rig(request, tmp_path_factory) -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        context = pairing(request.param, tmp_path_factory.mktemp("rig"))
        yield Rig(runner, *runner.run(context.__aenter__()))
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("setup", SETUPS, ids=[setup.name for setup in SETUPS])
def test_a_setup(rig, tmp_path, setup, record_property):
    record_property("pairing", f"{rig.front.name} on {rig.back.name}")
    for feature, setting in setup.shows:
        record_property("cell", f"{feature}: {setting}")
    try:
        rig.runner.run(shown(rig, tmp_path / "disk.img", setup))
    except Impossible as why:
        pytest.skip(str(why))


async def shown(rig: Rig, file: Path, setup: Setup) -> None:
    await rig.front.configure(setup)
    random_file(file, SIZE)
    ports, held = dom0_ports(), await call(rig, "held()")
    async with rig.back.target(file, setup) as target:
        async with rig.plugged(setup, target) as spec:
            flushed = target.flushes() if target.path != file else 0
            await used(rig, target, setup)
            await agreed(rig, spec, target, setup, flushed)
        await until(lambda: dom0_ports() == ports, 30)
    assert await call(rig, "held()") == held


async def call(rig: Rig, source: str, **args: object):
    return await rig.front.guest.call(source, 90.0, name="xvda", **args)


async def same(rig: Rig, target: Target) -> None:
    assert await call(rig, "await digest(name)") == await asyncio.to_thread(sha256, target.seen)


async def used(rig: Rig, target: Target, setup: Setup) -> None:
    """Reads, writes, discards, and what is to be refused is."""
    front, expected = rig.front, rig.back.expected(setup)
    await same(rig, target)
    before = await asyncio.to_thread(sha256, target.file)
    length = WRITTEN.stop - WRITTEN.start
    written, error = await call(rig, "await put(name, at, length)", at=WRITTEN.start, length=length)
    if setup.readonly:
        assert front.readonly_error in error
        assert await asyncio.to_thread(sha256, target.file) == before
        return
    assert error == ""
    there = (await asyncio.to_thread(target.seen.read_bytes))[WRITTEN]
    assert hashlib.sha256(there).hexdigest() == written
    error = await call(rig, "await short(name, at)", at=4096 + 512)
    assert front.sector_error in error if setup.sector > 512 else error == ""
    await same(rig, target)
    await discarded(rig, target, front, expected)
    await same(rig, target)


async def discarded(rig: Rig, target: Target, front: Front, expected: Facts) -> None:
    """A hole in dom0's file, zeros for both; or the error, and the bytes are as they were."""
    length = DROPPED.stop - DROPPED.start
    before = target.seen.read_bytes()[DROPPED]
    assert any(before)
    blocks = target.file.stat().st_blocks
    error = await call(rig, "await drop(name, at, length)", at=DROPPED.start, length=length)
    after = target.seen.read_bytes()[DROPPED]
    if expected.discard:
        assert error == ""
        assert not any(after)
        assert target.file.stat().st_blocks == blocks - length // 512
    else:
        assert front.discard_error in error
        assert after == before


async def agreed(rig: Rig, spec: DeviceSpec, target: Target, setup: Setup, flushed: int) -> None:
    """By the nodes of both ends, by the front's own word, by the back's; and the requests that were made."""
    expected = rig.back.expected(setup)
    front = await nodes(rig.store, spec.paths.front)
    back = await nodes(rig.store, spec.paths.back)
    facts, counters = await rig.back.facts(spec.paths, back)
    said = replace(facts, **dict(await call(rig, "facts(name)")))
    for found in (published(front, back), facts, said):
        assert found.otherwise(expected) == {}, (front, back)
    # What only one of them can know was said.
    for name in Facts.__dataclass_fields__:
        assert any(getattr(found, name) is not None for found in (published(front, back), facts, said)), name
    grew = (target.flushes() if target.path != target.file else 0) - flushed
    wrote = not setup.readonly
    assert (counters["indirect"] > 0) == (expected.segments > SEGMENTS)
    assert (counters["discards"] > 0) == expected.discard
    assert counters.get("errors", 0) == 0
    kinds: dict[str, Callable[[], bool]] = {
        "flush": lambda: counters["flushes"] > 0 and not counters.get("barriers"),
        "barrier": lambda: counters["flushes" if "barriers" not in counters else "barriers"] > 0,
        "none": lambda: not counters["flushes"] and not counters.get("barriers"),
    }
    if wrote:
        assert kinds[expected.cache](), counters
        if target.path != target.file:
            assert (grew > 0) == (expected.cache != "none"), grew
