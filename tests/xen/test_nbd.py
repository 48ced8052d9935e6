"""`xenbus nbd`: a front end's disk as an NBD export, in dom0 and in a guest, read and written through it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.dom0 import MIB, STORE, random_file, sha256
from tests.support.real_xen import dom0_ports
from tests.support.serving import environment, serving
from tests.support.xl_guest import python_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)
PYZ = Path(__file__).parents[2] / "xenbus.pyz"

# Reads all, writes a MiB of noise at 2 MiB, flushes: the sums of what it read, before and after.
COPY = """
import hashlib, os
from xenbus.drivers.block.nbd import NbdClient

async def copied(url, size):
    async with await NbdClient.connect(url) as client:
        before = hashlib.sha256(await client.read(0, size)).hexdigest()
        await client.write(2 << 20, os.urandom(1 << 20))
        await client.flush()
        return [before, hashlib.sha256(await client.read(0, size)).hexdigest()]
"""


def test_in_dom0(tmp_path):
    """A disk of dom0's own, from dom0: both halves in one `xenbus serve`."""

    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 4 * MIB)
        ports = dom0_ports()
        async with serving(tmp_path / "run", "--bus", "both", "--claim", "vbd") as daemon:
            await daemon.command("attach", "block", "--domain", "Domain-0", "--image", str(file))
            socket = tmp_path / "disk.sock"
            export = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "xenbus", "nbd", "xbd0", "--socket", str(socket),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                env=environment(tmp_path / "run"),
            )  # fmt: skip
            url = (await asyncio.wait_for(export.stdout.readline(), 60)).decode().strip()
            assert url == f"nbd+unix:///?socket={socket}"
            there: dict[str, object] = {}
            exec(COPY, there)
            before, after = await asyncio.wait_for(there["copied"](url, 4 * MIB), 60)
            assert (before, after) == (expected, sha256(file))
            assert before != after
            export.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(export.wait(), 60) == 0
            assert not socket.exists()
            await daemon.command("detach", "Domain-0/xvda")
        assert dom0_ports() == ports

    asyncio.run(main())


@pytest.mark.skipif(not PYZ.exists(), reason="`make pyz` builds it")
def test_in_a_guest(tmp_path):
    """With the one file: `serve --bus front` there has the disk that dom0's `serve` gives it."""

    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 4 * MIB)
        async with (
            await Client.connect(STORE) as store,
            serving(tmp_path / "run") as daemon,
            python_guest(store, "exporter") as guest,
        ):
            there = "python3 -I -S /xenbus/xenbus.pyz"
            await guest.run(f"{there} serve --bus front --claim vbd >/tmp/serve 2>&1 &")
            await daemon.command("attach", "block", "--domain", "exporter", "--image", str(file))
            await guest.run(f"{there} nbd xbd0 --socket /tmp/disk.sock >/tmp/nbd 2>&1 &")
            await guest.run("for i in $(seq 300); do grep nbd+unix /tmp/nbd && break; sleep 0.2; done", 90)
            url = (await guest.run("cat /tmp/nbd")).strip()
            assert url == "nbd+unix:///?socket=/tmp/disk.sock"
            before, after = await guest.call(COPY + "await copied(url, size)", 90, url=url, size=4 * MIB)
            assert (before, after) == (expected, sha256(file))
            assert before != after
            assert "dev.xbd.0.requests_write: " in await guest.run(f"{there} sysctl dev.xbd.0")
            assert "xbd0 at device/vbd/51712: Connected" in await guest.run(f"{there} tree")
            await daemon.command("detach", "exporter/xvda")  # it ends the export
            await guest.run("for i in $(seq 150); do [ -e /tmp/disk.sock ] || break; sleep 0.2; done")
            await guest.run("[ ! -e /tmp/disk.sock ]")

    asyncio.run(main())
