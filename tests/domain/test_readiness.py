"""sd_notify's protocol, against a socket as systemd has one."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from xenbus.domain.readiness import Readiness


@pytest.fixture(params=["path", "abstract"])
def systemd(tmp_path, request):
    address = str(tmp_path / "notify") if request.param == "path" else f"@xenbus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(10)
        yield address, sock


def test_what_is_said(systemd):
    address, sock = systemd
    readiness = Readiness({"NOTIFY_SOCKET": address})
    readiness.ready("2 devices")
    readiness.status("1 device")
    readiness.stopping("closing")
    said = [sock.recv(1000) for _ in range(3)]
    assert said == [b"READY=1\nSTATUS=2 devices", b"STATUS=1 device", b"STOPPING=1\nSTATUS=closing"]


def test_a_watchdog_hears_from_us_until_the_end(systemd):
    address, sock = systemd

    async def main():
        variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
        async with Readiness(variables).watchdog():
            for _ in range(2):
                assert await asyncio.to_thread(sock.recv, 100) == b"WATCHDOG=1"
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "1000"}, {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "x"}],
)
def test_without_anybody_to_tell_nothing_happens(variables):
    async def main():
        readiness = Readiness(variables)
        readiness.ready("")
        async with readiness.watchdog():
            pass

    asyncio.run(main())


def test_another_process_s_watchdog_is_not_ours(systemd):
    address, sock = systemd
    sock.settimeout(0)

    async def main():
        variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        async with Readiness(variables).watchdog():
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            sock.recv(100)

    asyncio.run(main())
