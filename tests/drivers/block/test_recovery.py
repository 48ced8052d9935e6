"""A back end that is killed, and another process that goes on: real processes over the broker, real rings.

The front is xbd in this process; it must see nothing but a pause.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from contextlib import asynccontextmanager

import pytest
from tests.support.back_process import STUCK
from tests.support.killed_back import KilledBack
from tests.support.until import until

from xenbus.bus import XenbusState
from xenbus.errors import LinkDown
from xenbus.hypervisor.interface import Held
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import detach_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
SIZE = 4 << 20
PAGE = 4096
SHARE = 20  # pages of one caller: more than a request has segments
S = XenbusState


class Rig(KilledBack):
    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path)
        self.image = tmp_path / "disk.img"
        self.image.write_bytes(random.Random(3).randbytes(SIZE))
        self.model = bytearray(self.image.read_bytes())
        self.done = 0
        self.working = False
        self.barriers = False  # behind one that hangs, others have not even begun

    async def plug(self, target: str | None = None) -> None:
        await self.add(DiskSpec(1, target or str(self.image)).device())
        self.disk = self.bus.devices["device/vbd/51712"].driver.disk
        await self.disk.connected(5)

    async def states(self) -> tuple[int, int]:
        paths = self.spec.paths
        return tuple([int(await self.tool.read(f"{node}/state")) for node in (paths.back, paths.front)])

    async def work(self, page: int, seed: int) -> None:
        """Pages of the disk are written and read, again and again, while `working`: requests of all kinds."""
        random_ = random.Random(seed)
        disk, at = self.disk, page * PAGE
        while self.working:
            length = random_.choice((1, 1, 3, SHARE)) * PAGE
            data = random_.randbytes(length)
            match random_.randrange(20):
                case 0 if self.barriers:
                    await disk.write_barrier(at, data)
                case 1:
                    await disk.discard(at, length)
                    data = bytes(length)
                case _:
                    await disk.write(at, data)
            self.model[at : at + length] = data
            if random_.random() < 0.1:
                await disk.flush()
            assert await disk.read(at, length) == data
            self.done += 1


@asynccontextmanager
async def load(r: Rig, workers: int = 24):
    """Callers that check what they read. They must not fail while the body runs."""
    r.working = True
    tasks = [asyncio.create_task(r.work(page * SHARE, page)) for page in range(workers)]
    try:
        yield
        r.working = False
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def progress(r: Rig, count: int = 50) -> None:
    """So many more verified rounds."""
    goal = r.done + count
    await until(lambda: r.done >= goal, 30)


def test_killed_under_load_again_and_again(tmp_path):
    async def test(r):
        await r.rise(stick=100)
        await r.plug()
        again, seen = [], []
        r.bus.observe(lambda dev, what: seen.append((what, dev.state, dev.otherend_state)))
        async with load(r):
            for number in range(5):
                await r.back.said("stuck")
                await r.back.kill()
                assert await r.states() == (S.CONNECTED, S.CONNECTED)
                await r.rise(stick=100 + number if number < 4 else None)
                again.append(r.back.again)
                await progress(r, 1)
            await progress(r)
        assert all(count >= STUCK for count in again), again
        assert seen == [], "the front saw more than a pause"
        assert await r.disk.read(0, SIZE) == r.model
        await r.disk.flush()
        await r.unplug()
        assert r.image.read_bytes() == r.model

    Rig.run(test, tmp_path)


def test_killed_at_any_moment(tmp_path):
    """No request waits on purpose: where the process is when it dies is left to chance."""

    async def test(r):
        await r.rise()
        await r.plug()
        chance = random.Random()
        r.barriers = True
        async with load(r):
            for _ in range(8):
                await progress(r, chance.randrange(60))
                await r.back.kill()
                await r.rise()
            await progress(r)
        assert await r.disk.read(0, SIZE) == r.model
        await r.unplug()

    Rig.run(test, tmp_path)


def test_handed_over_under_load(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        async with load(r):
            for _ in range(3):
                await progress(r)
                assert await r.back.hand_over() == "released"
                assert r.broker.held(0) == Held(0, 0, 0)
                assert len(list(r.journals.iterdir())) == 1
                assert await r.states() == (S.CONNECTED, S.CONNECTED)
                assert (await r.rise()).again == 0
            await progress(r)
        assert await r.disk.read(0, SIZE) == r.model
        await r.unplug()

    Rig.run(test, tmp_path)


def test_handed_over_behind_a_barrier(tmp_path):
    """What was taken and waits for a barrier has not begun: it is the next process's."""

    async def test(r):
        await r.rise()
        await r.plug()
        r.barriers = True
        async with load(r):
            for _ in range(3):
                await progress(r)
                assert await r.back.hand_over() == "released"
                await r.rise()
            await progress(r)
        assert await r.disk.read(0, SIZE) == r.model
        await r.unplug()

    Rig.run(test, tmp_path)


def test_a_handover_with_a_request_that_does_not_end(tmp_path):
    """It says so; the next process does it again, once the first has gone."""

    async def test(r):
        await r.rise(stick=0)
        await r.plug()
        writing = asyncio.create_task(r.disk.write(0, b"x" * PAGE))
        await until(lambda: r.bus.devices["device/vbd/51712"].driver.queue.inflight)
        assert "requests in flight to end" in await r.back.hand_over()
        assert (await r.rise()).again == 1
        await writing
        assert await r.disk.read(0, PAGE) == b"x" * PAGE
        await r.unplug()

    Rig.run(test, tmp_path)


@pytest.mark.parametrize("why", ["no directory", "removed", "damaged", "another size", "memory"])
def test_what_cannot_go_on_closes_in_order(tmp_path, why):
    async def test(r):
        await r.rise()
        await r.plug("memory:1M" if why == "memory" else None)
        await r.disk.write(0, b"y" * PAGE)
        files = list(r.journals.iterdir())
        assert len(files) == (why != "memory")
        await r.back.kill()
        match why:
            case "removed":
                files[0].unlink()
            case "damaged":
                with files[0].open("r+b") as file:
                    file.seek(56)
                    file.write(b"\7")
            case "another size":
                r.image.write_bytes(bytes(SIZE // 2))
        await r.rise(journals=None if why == "no directory" else r.journals)
        paths = r.spec.paths
        await until(lambda: r.bus.devices["device/vbd/51712"].state is S.CLOSED)
        assert await r.tool.wait_for(f"{paths.back}/state", lambda raw: raw == b"6", 5) == b"6"
        text = await r.tool.read_str("/local/domain/0/error/backend/vbd/1/51712/error")
        assert "going on for a process that ended" in text, text
        with pytest.raises(LinkDown):
            await r.disk.read(0, PAGE)
        if why == "no directory":
            files[0].unlink()
        await r.unplug()

    Rig.run(test, tmp_path)


def test_a_process_that_is_not_quite_gone_is_waited_for(tmp_path):
    async def test(r):
        await r.rise(stick=0)
        await r.plug()
        writing = asyncio.create_task(r.disk.write(0, b"z" * PAGE))
        await until(lambda: r.bus.devices["device/vbd/51712"].driver.queue.inflight)
        await r.back.kill()
        fd = os.open(next(r.journals.iterdir()), os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        rising = asyncio.create_task(r.rise())
        await r.tool.wait_for("/local/domain/0/backend/vbd/1/51712/state", lambda raw: raw == b"4", 5)
        done, _ = await asyncio.wait([rising], timeout=1.5)
        assert not done and not writing.done()
        os.close(fd)
        assert (await rising).again == 1
        await writing
        await r.unplug()

    Rig.run(test, tmp_path)


def test_a_second_process_leaves_the_first_one_s_devices_alone(tmp_path):
    async def test(r):
        first = await r.rise()
        await r.plug()
        second = await r.rise(patience=0.2)
        async with load(r):
            await progress(r, 5)
            assert await r.states() == (S.CONNECTED, S.CONNECTED)
            await second.stop()
            await progress(r, 5)
            await first.kill()
            await r.rise()
            await progress(r, 5)
        await r.unplug()

    Rig.run(test, tmp_path)


def test_without_inherits_a_former_process_s_devices_are_left_alone(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        await r.back.kill()
        await r.rise(inherits=False)
        assert await r.states() == (S.CONNECTED, S.CONNECTED)
        assert r.broker.held(0) == Held(0, 0, 0)
        await r.back.kill()
        await r.rise()
        assert (await r.disk.read(0, PAGE)) == r.model[:PAGE]
        await r.unplug()

    Rig.run(test, tmp_path)


def test_killed_while_it_closes(tmp_path):
    """The front is told to close by its toolstack, and the back end dies before it has answered."""

    async def test(r):
        await r.rise()
        await r.plug()
        await r.back.kill()
        detaching = asyncio.create_task(detach_device(r.tool, r.spec.paths, timeout=20))
        front = f"{r.spec.paths.front}/state"
        await r.tool.wait_for(front, lambda raw: raw == b"6", 5)
        await r.rise()
        assert await detaching
        assert list(r.journals.iterdir()) == []

    Rig.run(test, tmp_path)
