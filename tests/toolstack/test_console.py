"""Consoles as the toolstack describes them, and where it looks for terminals: not where a guest says."""

import asyncio
from pathlib import Path

import pytest
from tests.support.embedded_store import embedded_store

from xenbus.errors import NoEntry, NotFound, UsageError
from xenbus.toolstack.console import ConsoleSpec, find_console, free_number
from xenbus.toolstack.devices import DeviceSpec, list_devices, remove_device, write_device
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

FRONT, BACK = "/local/domain/5/device/console/1", "/local/domain/0/backend/console/5/1"


def run(test):
    """`test(store, guest)`: domain 0's connection, and domain 5's own."""

    async def main():
        async with embedded_store(0, 5) as (store, daemon, _):
            for domid in (0, 5):
                await store.mkdir(f"/local/domain/{domid}/device")
            await store.set_perms("/local/domain/5/device", ["n5"])
            async with await Client.connect(daemon.connect_local(5)) as guest:
                await test(store, guest)

    asyncio.run(main())


def test_both_halves_are_as_libxl_writes_them():
    spec = ConsoleSpec(5, 1, name="org.example.agent").device()
    assert (spec.paths.front, spec.paths.back) == (FRONT, BACK)
    assert spec.front == {"protocol": "vt100"}
    assert spec.told == {
        "limit": "1048576",
        "type": "xenbus",
        "output": "pty",
        "tty": "",
        "name": "org.example.agent",
    }
    assert spec.back == {"protocol": "vt100", "output": "pty", "type": "xenbus", "name": "org.example.agent"}


def test_a_log():
    spec = ConsoleSpec(5, 2, pty=False, log="g.log", log_size=4096, back_kind="xcb", back_domid=3).device()
    assert spec.paths.back == "/local/domain/3/backend/xcb/5/2"
    assert spec.back["xenbus-log"] == str(Path("g.log").absolute()) and spec.back["xenbus-log-size"] == "4096"
    assert spec.back["output"] == spec.told["output"] == "null"
    assert "xenbus-log" not in spec.told and "xenbus-log" not in spec.front


@pytest.mark.parametrize(
    "given",
    [
        {"number": 0},
        {"number": 32},
        {"number": -1},
        {"pty": False},
        {"log_size": 4096},
        {"log": "x", "log_size": 4095},
        {"log": "x", "log_size": -1},
        {"log": "a\0b"},
        {"name": "a\0b"},
    ],
)
def test_what_makes_no_sense(given):
    with pytest.raises(UsageError):
        ConsoleSpec(5, **given).device()


def test_numbers_and_the_record():
    async def test(store, guest):
        spec = ConsoleSpec(5, 1, log="/tmp/log").device()
        await write_device(store, spec)
        assert await free_number(store, 5) == 2
        [found] = await list_devices(store, 5)
        assert (found.front, found.back, found.told) == (spec.front, spec.back, spec.told)
        moved = found.rehomed(front_domid=7)
        assert moved.told == spec.told and moved.paths.front_domid == 7
        await remove_device(store, spec.paths)
        assert await free_number(store, 5) == 1

    run(test)


async def where(store, number=None):
    return (await find_console(store, 5, number)).node


def test_which_terminal():
    async def test(store, guest):
        with pytest.raises(NotFound, match="no console 1"):
            await find_console(store, 5, None)
        with pytest.raises(NotFound, match="no console 0"):
            await find_console(store, 5, 0)
        await write_device(store, ConsoleSpec(5, 2).device())
        await write_device(store, ConsoleSpec(5, 4, pty=False, log="/tmp/l").device())
        second = "/local/domain/0/backend/console/5/2/tty"
        assert await where(store) == second == await where(store, 2)
        with pytest.raises(UsageError, match=r"a log alone: /tmp/l"):
            await find_console(store, 5, 4)
        # xenconsoled's, once it has a terminal.
        first = "/local/domain/5/console/tty"
        await store.write(first, "")
        assert await where(store) == second
        await store.write(first, "/dev/pts/9")
        assert await where(store) == first == await where(store, 0)

    run(test)


def test_another_toolstacks_console():
    """QEMU writes the path into the front's node alone."""

    async def test(store, guest):
        paths = DevicePaths("console", 1, 5, 0)
        told = {"type": "ioemu", "output": "pty", "tty": "/dev/pts/3"}
        await write_device(store, DeviceSpec(paths, {}, {"protocol": "vt100"}, told))
        assert await where(store, 1) == f"{FRONT}/tty"

    run(test)


def test_whose_terminal_and_that_it_is_another_one():
    """Written again is another terminal, with the same path or not; while there is none it waits."""

    async def test(store, guest):
        spec = ConsoleSpec(5, 1).device()
        await write_device(store, spec)
        found = await find_console(store, 5, 1)
        assert found.ours
        async with found.paths(store) as path:
            waiting = asyncio.create_task(path())
            await store.write(f"{BACK}/tty", "/dev/pts/3")
            assert await waiting == "/dev/pts/3"
            waiting = asyncio.create_task(path())
            await store.read(f"{BACK}/tty")
            assert not waiting.done()
            await store.write(f"{BACK}/tty", "/dev/pts/3")
            assert await waiting == "/dev/pts/3"
            # Whoever gives up in the middle of it leaves it to the next one.
            await store.write(f"{BACK}/tty", "/dev/pts/4")
            for _ in range(3):
                waiting = asyncio.create_task(path())
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
            assert await path() == "/dev/pts/4"
            await remove_device(store, spec.paths)
            with pytest.raises(NoEntry):
                await path()

    run(test)


def test_a_guest_names_no_terminal():
    async def test(store, guest):
        await write_device(store, ConsoleSpec(5, 1).device())
        with pytest.raises(Exception, match="EACCES"):
            await guest.write(f"{FRONT}/tty", "/etc/passwd")
        # The directory is its own: it can make all of it anew, and that changes nothing.
        await guest.rm(FRONT)
        await guest.write(f"{FRONT}/tty", "/etc/passwd")
        assert await where(store, 1) == f"{BACK}/tty"

    run(test)
