"""What serves a guest's disk in the lab's dom0: xbbd behind `xenbus serve`, or Linux's own. No test here.

A disk is a line of an xl configuration either way, so that xl makes, saves and restores it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.serving import Daemon, serving
from tests.support.xl_guest import program
from xenbus.toolstack.serving import script_text

SCRIPTS = Path("/etc/xen/scripts")
# Linux's own back end waits for a block device's number, which udev-driven scripts would write.
PHYSICAL = """#!/bin/sh
if [ "$1" = add ]; then
  target=$(xenstore-read "$XENBUS_PATH/params")
  number=$(stat -L -c %t:%T "$target")
  xenstore-write "$XENBUS_PATH/physical-device" "$number" "$XENBUS_PATH/physical-device-path" "$target" \\
    "$XENBUS_PATH/hotplug-status" connected
fi
"""


def _install(name: str, text: str) -> None:
    SCRIPTS.mkdir(parents=True, exist_ok=True)
    path = SCRIPTS / name
    path.write_text(text)
    path.chmod(0o755)


def disk(script: str, vdev: str, target: str, *, readonly: bool = False) -> str:
    return f"script={script},vdev={vdev},access={'ro' if readonly else 'rw'},target={target}"


@asynccontextmanager
async def loop_device(file: Path) -> AsyncIterator[Path]:
    """A block device over the file."""
    device = (await program("losetup", "--find", "--show", str(file))).strip()
    try:
        yield Path(device)
    finally:
        await program("losetup", "--detach", device)


class Xbbd:
    """`xenbus serve --claim vbd`, which can be killed and started again under its guests."""

    script = "block-xenbus"

    def __init__(self, run: Path) -> None:
        self.run = run
        self.daemon: Daemon | None = None

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        _install(self.script, script_text())
        async with serving(self.run, "--claim", "vbd", "--verbose") as daemon:
            self.daemon = daemon
            yield

    async def kill_and_start(self) -> None:
        assert self.daemon is not None
        await self.daemon.kill()
        await self.daemon.start()


class Blkback:
    """Linux's own, which is unloaded afterwards: it would have every vbd."""

    script = "block-physical"

    def __init__(self, run: Path) -> None:
        self.run = run

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        _install(self.script, PHYSICAL)
        await program("modprobe", "xen-blkback")
        try:
            yield
        finally:
            await program("modprobe", "-r", "xen-blkback")


Back = Xbbd | Blkback


@asynccontextmanager
async def nbd_server(file: Path, socket: Path) -> AsyncIterator[str]:
    """nbdkit over the file: the target by which xbbd reaches it."""
    ready = socket.with_suffix(".pid")
    process = await asyncio.create_subprocess_exec(
        "nbdkit", "--foreground", "--exit-with-parent", "--unix", str(socket), "--pidfile", str(ready),
        "file", str(file),
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            while not ready.exists() or process.returncode is not None:
                assert process.returncode is None, "nbdkit has ended"
                await asyncio.sleep(0.05)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 30)
