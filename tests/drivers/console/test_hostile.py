"""xc and xcb before a peer that lies, floods or is stuck: closed and told, and nobody else is harmed."""

import asyncio
import random

import pytest
from tests.support.consoles import Operator, Rig, run
from tests.support.until import until

from xenbus.bus import XenbusDriver
from xenbus.bus import XenbusState as S
from xenbus.drivers.console import Xc, link
from xenbus.drivers.console.consif import ConsoleRing
from xenbus.drivers.console.stream import BUFFER
from xenbus.toolstack.console import ConsoleSpec
from xenbus.toolstack.devices import detach_device, wait_connected, write_device


class Liar(XenbusDriver):
    """A front end whose page and keys are whatever a test wants."""

    name = "liar"
    description = "Liar"
    keys = None

    async def otherend_changed(self, state):
        if state is S.INIT_WAIT and self.dev.state is S.INITIALISING:
            self.page = await self.dev.grant_ring(1)
            self.ring = ConsoleRing(self.page.view, front=True)
            self.channel = await self.dev.alloc_evtchn(lambda: None)
            values = {"ring-ref": self.page.refs[0], "port": self.channel.port}
            await self.dev.set_state(S.INITIALISED, {**values, **(self.keys or {})})
        elif state is S.CONNECTED:
            await self.dev.set_state(S.CONNECTED)
        elif state is S.CLOSING:
            await self.dev.set_state(S.CLOSED)

    async def detach(self):
        if hasattr(self, "ring"):
            self.ring.release()


@pytest.mark.parametrize(("at", "value"), [(3072, 5), (3076, 2000), (3080, 5), (3084, 1 << 31)])
def test_a_front_with_bad_indices_is_closed_and_told(at, value):
    async def test(made: Rig):
        await made.connected()
        liar = made.front
        words = liar.page.view.cast("I")
        words[at // 4] = value
        words.release()
        liar.channel.notify()
        await until(lambda: made.front_dev.state is S.CLOSED and made.back_dev.state is S.CLOSED)
        error = await made.world.tool.read_str("/local/domain/0/error/backend/console/1/1/error")
        assert "apart in a ring" in error
        assert made.dom0.hv.held() == made.before[0]
        await made.gone()

    run(test, Liar)


@pytest.mark.parametrize(
    "keys", [{"ring-ref": "x"}, {"ring-ref": 9999}, {"port": ""}, {"port": 9999}, {"port": 1 << 40}]
)
def test_a_front_with_bad_keys(keys):
    async def test(made: Rig):
        await made.plug()
        await until(lambda: made.back_dev.state in (S.CLOSING, S.CLOSED))
        assert await made.world.tool.exists("/local/domain/0/error/backend/console/1/1/error")
        assert made.dom0.hv.held().mapped_pages == 0
        await made.gone(force=True)

    run(test, type("Bad", (Liar,), {"keys": keys}))


async def flooded(made):
    """Until the back end does not listen any more; then something is said."""
    await made.connected()
    async with asyncio.timeout(10):
        while not made.back.sysctl()["throttled"]():
            made.front.channel.notify()
            await asyncio.sleep(0)
    assert made.front.ring.transmit.write(b"and then it spoke") == 17
    made.front.channel.notify()


def test_a_front_that_floods_is_not_listened_to(monkeypatch):
    monkeypatch.setattr(link, "PERIOD", 1000.0)

    async def test(made: Rig):
        await flooded(made)
        for _ in range(50):
            await asyncio.sleep(0)
        assert made.back.rx_bytes == 0
        await made.gone()

    run(test, Liar)


def test_a_front_that_flooded_is_listened_to_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(link, "PERIOD", 0.05)

    async def test(made: Rig):
        await flooded(made)
        await until(lambda: made.back.rx_bytes == 17)

    run(test, Liar)


def test_a_guest_that_ends_has_said_all_it_wrote():
    """Much more than the ring holds."""

    async def test(made: Rig):
        await made.connected()
        back = made.back
        await made.stream.write(bytes(30_000))
        assert back.rx_bytes < 30_000
        await made.guest.front.detach()
        assert back.rx_bytes == 30_000

    run(test)


def test_no_node_is_made_where_the_front_end_was():
    async def test(made: Rig):
        front = made.spec.paths.front
        await write_device(made.world.tool, made.spec)
        await made.world.tool.rm(front)
        await until(lambda: made.dom0.back.devices and made.back.sysctl()["tty"]())
        await until(lambda: made.back_dev.mailbox.idle)
        assert not await made.world.tool.exists(front)
        await made.gone(force=True)

    run(test)


def test_the_last_words_of_a_guest_are_read_though_nobody_kicked():
    """One that is killed, or crashes, comes to no event."""

    async def test(made: Rig):
        await made.connected()
        back = made.back
        made.front.ring.transmit.write(b"panic: no init found")
        assert not back.rx_bytes
        await made.gone(force=True)
        assert back.rx_bytes == 20

    run(test, Liar)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_front_writes_into_its_page(seed):
    """Bytes, indices and kicks by chance: it goes on, or the device is closed with an error node; no more."""
    dice = random.Random(seed)

    async def test(made: Rig):
        for _ in range(25):
            await made.connected()
            liar = made.front
            for _ in range(dice.randrange(1, 30)):
                at = dice.choice((3072, 3076, 3080, 3084, dice.randrange(0, 4092, 4)))
                value = dice.choice((dice.randrange(4096), dice.getrandbits(32), 0, 1 << 31))
                liar.page.view[at : at + 4] = value.to_bytes(4, "little")
                liar.channel.notify()
                await asyncio.sleep(0)
            await until(lambda: made.back_dev.mailbox.idle and made.back_dev.state in (S.CONNECTED, S.CLOSED))
            if made.back_dev.state is S.CLOSED:
                error = "/local/domain/0/error/backend/console/1/1/error"
                assert "apart in a ring" in await made.world.tool.read_str(error)
            await made.gone()

    run(test, Liar)


def test_a_console_that_is_stuck_is_no_other_devices_matter():
    """A guest that reads none of it, and an operator who reads none: a second console goes on."""

    async def test(made: Rig):
        await made.connected()
        other = ConsoleSpec(1, 2).device()
        await write_device(made.world.tool, other)
        await wait_connected(made.world.tool, other.paths, 5)
        with made.operator() as stuck:
            while stuck.type(bytes(1000)) or made.stream.room():  # noqa: ASYNC110
                await asyncio.sleep(0)
            await made.stream.write(bytes(2 * BUFFER))
            stream = made.guest.front.devices["device/console/2"].driver.stream
            path = await made.world.tool.read_str(f"{other.paths.back}/tty")
            with Operator(path) as operator:
                for _ in range(50):
                    await stream.write(b"question ")
                    await operator.see(b"question ")
                    operator.type(b"answer")
                    assert await stream.read() == b"answer"
        await detach_device(made.world.tool, other.paths)
        await made.gone()

    run(test)


class LyingBack(XenbusDriver):
    """A back end that maps the page and writes into it what it likes."""

    name = "lyingb"
    description = "Lying back end"

    async def attach(self):
        await self.dev.set_state(S.INIT_WAIT)

    async def otherend_changed(self, state):
        if state is S.INITIALISED:
            said = await self.dev.otherend_gather({"ring-ref": int, "port": int})
            self.page = await self.dev.map_ring([said["ring-ref"]])
            self.channel = await self.dev.bind_evtchn(said["port"], lambda: None)
            await self.dev.set_state(S.CONNECTED)
        elif state in (S.CLOSING, S.CLOSED) and self.dev.state is not S.CLOSED:
            await self.dev.set_state(S.CLOSED)


@pytest.mark.parametrize(("at", "value"), [(3076, 1025), (3072, 1), (3080, 2049)])
def test_a_back_with_bad_indices_ends_the_device_and_gets_no_other_page(at, value):
    async def test(made: Rig):
        await made.plug()
        await made.both(S.CONNECTED)
        await made.stream.write(b"x")
        words = made.back.page.view.cast("I")
        words[at // 4] = value
        words.release()
        made.back.channel.notify()
        await until(lambda: made.front_dev.state is S.CLOSED)
        await asyncio.sleep(0.02)
        assert made.front_dev.state is S.CLOSED and made.guest.hv.held() == made.before[1]
        assert made.front._link is None

    run(test, Xc, LyingBack)
