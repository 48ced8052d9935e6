"""xc and xcb together: bytes both ways, who is slow, who goes and comes back."""

import asyncio
import os
import random
import stat
from contextlib import suppress

import pytest
from tests.support.consoles import Rig, log_of, run
from tests.support.full_disk import files_of_at_most
from tests.support.until import until

from xenbus.bus import Settings, Side
from xenbus.bus import XenbusState as S
from xenbus.cli.attachment import open_terminal
from xenbus.drivers.console import Xc, Xcb, terminal
from xenbus.drivers.console.consif import LIMIT
from xenbus.drivers.console.stream import BUFFER
from xenbus.drivers.console.terminal import TYPED_MAX
from xenbus.errors import DeadlineError, LinkDown
from xenbus.toolstack.devices import DeviceFailed, detach_device, wait_connected, write_device


def test_bytes_cross_both_ways_and_all_is_given_back():
    async def test(made: Rig):
        await made.connected()
        with made.operator() as operator:
            await made.stream.write(b"login: ")
            assert await operator.see(b"login: ") == b"login: "
            # Raw: neither echoed nor made into lines, control characters as they are.
            typed = bytes(range(256))
            assert operator.type(typed) == 256
            assert await made.stream.read() == typed
            assert operator.look() == b""
            await made.stream.write(typed)
            assert await operator.see(typed[-4:]) == typed
        values = made.front.sysctl(), made.back.sysctl()
        assert [(v["rx_bytes"](), v["tx_bytes"]()) for v in values] == [(256, 263), (263, 256)]
        await made.gone()

    run(test)


@pytest.mark.parametrize("seed", [1, 2])
def test_much_more_than_the_ring_holds(seed):
    """100 000 bytes each way at once, in pieces of any size, arrive in order."""
    dice = random.Random(seed)
    there, back = dice.randbytes(100_000), dice.randbytes(100_000)

    async def test(made: Rig):
        await made.connected()
        with made.operator() as operator:

            async def guest_writes():
                at = 0
                while at < len(there):
                    size = dice.choice((1, 7, 500, 2048, 5000))
                    await made.stream.write(there[at : at + size])
                    at += size

            async def guest_reads():
                read = b""
                while len(read) < len(back):
                    read += await made.stream.read(dice.choice((1, 100, 5000)))
                return read

            async def types():
                at = 0
                while at < len(back):
                    at += operator.type(back[at : at + 700])
                    await asyncio.sleep(0)

            reading = asyncio.create_task(guest_reads())
            typing, writing = asyncio.create_task(types()), asyncio.create_task(guest_writes())
            seen = await operator.see(there[-20:], 20)
            assert seen == there and await reading == back
            await typing
            await writing

    run(test)


def test_nobody_attached_loses_the_oldest_and_the_guest_never_waits():
    async def test(made: Rig):
        await made.connected()
        line = b"%07d\n"
        for number in range(0, 250_000, 1000):
            await made.stream.write(b"".join(line % n for n in range(number, number + 1000)), 5)
        await made.stream.drain()
        await until(lambda: made.back.rx_bytes == 2_000_000)
        values = made.back.sysctl()
        assert values["waiting"]() == LIMIT
        discarded = values["discarded"]()
        assert 2_000_000 - LIMIT - 200_000 < discarded < 2_000_000 - LIMIT
        with made.operator() as operator:
            seen = await operator.see(line % 249_999)
        # What the PTY itself held, then the newest, without a gap.
        assert len(seen) == 2_000_000 - discarded and seen[-LIMIT:].splitlines()[1:] == [
            b"%07d" % n for n in range(250_000 - LIMIT // 8 + 1, 250_000)
        ]

    run(test)


def test_a_guest_that_does_not_read_holds_the_one_who_types():
    async def test(made: Rig):
        await made.connected()
        with made.operator() as operator:
            typed = 0
            data = bytes(range(256)) * 4
            quiet = 0
            while quiet < 200:  # turns of the loop in which the PTY took nothing
                count = operator.type(data[typed % 256 :])
                typed += count
                quiet = 0 if count else quiet + 1
                await asyncio.sleep(0.001 if not count else 0)
            # Stream, ring, what the back end keeps, the PTY: nothing else holds any.
            assert typed < BUFFER + 1024 + 4096 + 64 * 1024
            assert made.stream.room() == 0
            its = made.back._terminal
            assert len(its.keys) == TYPED_MAX and not its._reading  # the PTY is left alone
            read = b""
            while len(read) < typed:
                read += await made.stream.read()
            assert read == (data * (typed // 256 + 1))[:typed]

    run(test)


def test_words_and_lines_and_deadlines():
    async def test(made: Rig):
        with pytest.raises(AttributeError):
            made.nothing  # noqa: B018
        await made.plug()
        early = made.stream
        await early.write(b"before anybody was there\n")
        await made.both(S.CONNECTED)
        with made.operator() as operator:
            await operator.see(b"there\n")
            operator.type(b"one\ntwo\nthr")
            assert [await early.read_until(), await early.read_until()] == [b"one\n", b"two\n"]
            with pytest.raises(DeadlineError, match="whoever is behind"):
                await early.read_until(seconds=0.05)
            assert await early.read(2) == b"th" and await early.read() == b"r"
            with pytest.raises(DeadlineError):
                await early.read(seconds=0.05)
        reader = asyncio.create_task(early.read())
        await asyncio.sleep(0)
        await made.gone()
        with pytest.raises(LinkDown, match="is gone"):
            await reader
        with pytest.raises(LinkDown):
            await early.write(b"x")

    run(test)


def test_a_writer_without_a_reader_has_a_deadline():
    async def test(made: Rig):
        await write_device(made.world.tool, made.spec)
        await until(lambda: made.guest.front.devices and made.front_dev.device.attached)
        with pytest.raises(DeadlineError):
            await made.stream.write(bytes(BUFFER + 1), 0.05)
        assert made.stream.try_write(b"x") == 0

    run(test, Xc, None)


@pytest.mark.parametrize("handed_over", [False, True])
def test_last_words_are_heard_by_who_is_attached(handed_over, monkeypatch):
    """More than the PTY holds, read slowly, when the console goes or its process does."""
    monkeypatch.setattr(terminal, "LAST_WORDS", 20.0)
    said = random.Random(8).randbytes(100_000)

    async def test(made: Rig):
        await made.connected()
        fd = open_terminal(made.back.sysctl()["tty"](), ours=True)
        await made.stream.write(said)
        await made.stream.drain()
        ending = asyncio.create_task(made.dom0.back.release() if handed_over else made.gone())
        heard = b""
        while len(heard) < len(said):
            await asyncio.sleep(0.001)
            with suppress(BlockingIOError):
                heard += os.read(fd, 1000)
        assert heard == said
        await ending
        os.close(fd)
        if handed_over:
            await made.dom0.store.close()
            await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
            await made.dom0.back.attach()
            await made.gone()

    run(test)


def test_who_is_attached_and_reads_nothing_holds_no_detach_up(monkeypatch):
    monkeypatch.setattr(terminal, "LAST_WORDS", 0.05)

    async def test(made: Rig):
        await made.connected()
        fd = open_terminal(made.back.sysctl()["tty"](), ours=True)
        await made.stream.write(bytes(100_000))
        await made.stream.drain()
        await made.gone()
        assert not os.read(fd, 1)
        os.close(fd)

    run(test)


def test_the_log_has_everything_and_is_bounded(tmp_path):
    path = tmp_path / "guest.log"

    async def test(made: Rig):
        await made.connected(log=str(path), log_size=8192)
        said = b""
        for number in range(1500):
            line = b"line %05d\n" % number
            said += line
            await made.stream.write(line)
        await made.stream.drain()
        await until(lambda: made.back.rx_bytes == len(said))
        kept = log_of(path)
        assert said.endswith(kept) and 8192 < len(kept) <= 2 * 8192
        assert path.stat().st_size <= 8192 and stat.S_IMODE(path.stat().st_mode) == 0o600
        await made.gone()
        # The next one goes on in the same file.
        size = path.stat().st_size
        await made.connected(log=str(path), log_size=8192)
        await made.stream.write(b"again")
        await until(lambda: log_of(path).endswith(b"again"))
        assert path.stat().st_size in (size + 5, 5, size + 5 - 8192)

    run(test)


def test_a_log_alone(tmp_path):
    async def test(made: Rig):
        await made.connected(pty=False, log=str(tmp_path / "log"))
        assert not await made.world.tool.exists(f"{made.spec.paths.back}/tty")
        await made.stream.write(b"hello")
        await until(lambda: (tmp_path / "log").read_bytes() == b"hello")
        await made.gone()

    run(test)


def test_a_log_that_cannot_be_written_ends_and_the_console_does_not(tmp_path, caplog):
    async def test(made: Rig):
        await made.connected(log=str(tmp_path / "log"))
        with made.operator() as operator, files_of_at_most(8):
            for _ in range(3):
                await made.stream.write(b"words ")
            await operator.see(b"words words words")
        assert (tmp_path / "log").read_bytes() == b"words wo"
        assert caplog.text.count("the console's log ends") == 1

    run(test)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"xenbus-log": "/nowhere/log"}, "ENOENT"),
        ({"xenbus-log": "/tmp"}, "EISDIR"),
        ({"xenbus-log": "/dev/null"}, "no file"),
        ({"output": "printer"}, "neither pty nor null"),
        ({"xenbus-log-size": "1"}, "4096"),
        ({"xenbus-log-size": "x"}, "xenbus-log-size"),
    ],
)
def test_nodes_that_make_no_sense(keys, text):
    async def test(made: Rig):
        made.spec.back = {**made.spec.back, **keys}
        await write_device(made.world.tool, made.spec)
        with pytest.raises(DeviceFailed, match=text):
            await wait_connected(made.world.tool, made.spec.paths, 5)
        await made.gone(force=True)

    run(test)


def test_the_terminals_path_is_where_both_look():
    async def test(made: Rig):
        await made.connected()
        path = made.back.sysctl()["tty"]()
        store, paths = made.world.tool, made.spec.paths
        assert await store.read_str(f"{paths.back}/tty") == path
        assert await store.read_str(f"{paths.front}/tty") == path
        assert [str(perm) for perm in await store.get_perms(f"{paths.front}/tty")] == ["n0", "r1"]

    run(test)


def test_the_first_console_is_nobodys_here():
    async def test(made: Rig):
        tool = made.world.tool
        await tool.write("/local/domain/1/console/state", "1")
        await made.world.plug("console", 0)
        await made.connected()
        assert (
            list(made.guest.front.devices) == ["device/console/1"]
            or not made.guest.front.devices["device/console/0"].device.attached
        )
        back = made.dom0.back.devices.get("backend/console/1/0")
        assert back is None or not back.device.attached

    run(test)


# -- suspend, resume, ends that go and come back


def test_a_suspend_that_is_cancelled_loses_nothing():
    async def test(made: Rig):
        await made.connected()
        with made.operator() as operator:
            for bus in made.guest.buses:
                await bus.suspend()
            await made.stream.write(b"while asleep")
            operator.type(b"typed")
            await asyncio.sleep(0.01)
            assert operator.look() == b""
            for bus in made.guest.buses:
                await bus.resume(cancelled=True)
            await operator.see(b"while asleep")
            assert await made.stream.read() == b"typed"

    run(test)


def test_after_a_restore_the_stream_goes_on():
    """Another back end device: what was written before is there, and what was typed."""

    async def test(made: Rig):
        await made.connected()
        stream = made.stream
        with made.operator() as operator:
            operator.type(b"typed before")
            await until(lambda: made.back.tx_bytes == 12)
            await stream.write(b"last words ")
            for bus in made.guest.buses:
                await bus.suspend()
            await operator.see(b"last words")
        await stream.write(b"first words")
        await detach_device(made.world.tool, made.spec.paths, timeout=0.05, force=True)
        await until(lambda: not made.dom0.back.devices)
        made.world.machine.domain(1)
        await write_device(made.world.tool, made.spec)
        for bus in made.guest.buses:
            await bus.resume(cancelled=False)
        await made.both(S.CONNECTED)
        assert made.stream is stream
        with made.operator() as operator:
            assert await operator.see(b"first words") == b"first words"
            operator.type(b", and after")
            assert (await stream.read(12), await stream.read()) == (b"typed before", b", and after")

    run(test)


def test_what_was_said_and_typed_on_a_page_that_is_dead_is_not_lost():
    """A Linux guest's processes are told of no suspend: they write on for a while after a restore."""

    async def test(made: Rig):
        await made.connected()
        stream, said = made.stream, random.Random(6).randbytes(5000)
        with made.operator() as operator:
            await operator.enter(bytes(BUFFER) + b"typed", 5)
            # More than the stream takes: the rest is on the page.
            await until(lambda: made.back.tx_bytes == BUFFER + 5 and not stream.room())
        await made.dom0.back.release()
        await made.dom0.store.close()
        await stream.write(said)
        assert stream.tx_bytes == 2048  # a ring full of it
        page = made.front._page
        for bus in made.guest.buses:
            await bus.resume(cancelled=False)
        assert stream.tx_bytes == 0
        await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
        await made.dom0.back.attach()
        await made.both(S.CONNECTED)
        assert made.front._page is not page
        with made.operator() as operator:
            assert await operator.take(len(said), 5) == said
        read = b""
        while len(read) < BUFFER + 5:
            read += await stream.read()
        assert read == bytes(BUFFER) + b"typed"
        assert stream.tx_bytes == len(said)

    run(test)


def test_what_was_typed_and_not_read_is_there_after_a_restore():
    """More than the stream holds: the rest was on the page that is lost."""

    async def test(made: Rig):
        await made.connected()
        stream, typed = made.stream, random.Random(5).randbytes(BUFFER + 700)
        with made.operator() as operator:
            at = 0
            while at < len(typed):
                at += operator.type(typed[at : at + 500])
                await asyncio.sleep(0)
            await until(lambda: made.back.tx_bytes == len(typed))
        for bus in made.guest.buses:
            await bus.suspend()
        await detach_device(made.world.tool, made.spec.paths, timeout=0.05, force=True)
        await until(lambda: not made.dom0.back.devices)
        await write_device(made.world.tool, made.spec)
        for bus in made.guest.buses:
            await bus.resume(cancelled=False)
        await made.both(S.CONNECTED)
        read = b""
        while len(read) < len(typed):
            read += await stream.read(seconds=5)
        assert read == typed

    run(test)


def test_a_back_end_that_goes_and_comes_back():
    """`xenbus serve` ended in order and started anew: the guest's stream goes on, on another page."""

    async def test(made: Rig):
        await made.connected()
        stream = made.stream
        await made.dom0.back.detach()
        await until(lambda: made.front_dev.state is S.INITIALISING)
        assert made.dom0.hv.held() == made.before[0]
        await stream.write(b"said to nobody")
        await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
        await made.dom0.back.attach()
        await made.both(S.CONNECTED)
        with made.operator() as operator:
            assert await operator.see(b"nobody") == b"said to nobody"
        await made.gone()

    run(test)


def test_a_back_end_that_was_killed_goes_on_with_the_same_page():
    async def test(made: Rig):
        await made.connected()
        page = made.front._page
        await made.dom0.back.release()
        await made.dom0.store.close()
        await made.stream.write(b"said meanwhile")
        await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
        await made.dom0.back.attach()
        await until(lambda: made.back is not None and made.back.rx_bytes)
        with made.operator() as operator:
            assert await operator.see(b"meanwhile") == b"said meanwhile"
            operator.type(b"ok")
            assert await made.stream.read() == b"ok"
        assert made.front._page is page and made.front_dev.counters.get("odd_moves", 0) == 0
        assert await made.world.tool.read_str(f"{made.spec.paths.front}/tty") == made.back.sysctl()["tty"]()
        await made.gone()

    run(test)


def test_a_back_end_device_that_is_replaced():
    async def test(made: Rig):
        for _ in range(3):
            await made.connected()
            await made.gone()

    run(test)


def test_registered_under_both_types():
    from xenbus.bus.driver import drivers

    drivers.load_entry_points()
    assert Xc in drivers.candidates(Side.FRONT, "console")
    assert all(Xcb in drivers.candidates(Side.BACK, kind) for kind in ("console", "xcb"))
