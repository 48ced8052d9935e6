"""Our store daemon as a process that may be killed: a socket, guests of a machine in a folder, a state file.

`python -m tests.support.kept_store FOLDER STATE` serves FOLDER/run/socket; `KeptStore` is its parent's side.
With `-U` after that it goes on where Debian's xenstored stopped: with FOLDER/run/state_dump.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from pathlib import Path

from tests.support.machine import FileHypervisor, GuestRing, Machine
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.daemon.server import Daemon
from xenbus.xenstore.daemon.update import Resumed, Updater, tried
from xenbus.xenstore.engine import XENSTORED
from xenbus.xenstore.state.load import read
from xenbus.xenstore.sync import SyncClient

DEADLINE = 20.0


def of_xenstored(file: Path) -> Resumed:
    image = read(file.read_bytes())
    file.unlink()
    assert image.globals is not None
    os.close(image.globals.evtchn_fd)
    return Resumed(image, image.globals.socket_fd, None)


async def serve(folder: Path, state: str) -> None:
    if tried(XENSTORED):
        return
    resumed = of_xenstored(folder / "run" / "state_dump") if "-U" in sys.argv else Resumed.take()
    hypervisor = FileHypervisor(folder)
    keeper = Keeper(state) if resumed is None else resumed.keeper(state)
    image = None if resumed is None else resumed.image
    daemon = Daemon(hypervisor, keeper=keeper, image=image)  # type: ignore[arg-type]
    daemon.updater = Updater(daemon)
    await daemon.go_on(sockets=resumed is not None)
    if resumed is None:
        await daemon.listen_unix(folder / "run" / "socket")
        print("ready", flush=True)
    else:
        daemon.adopt_listener(resumed.listener)
    await asyncio.Event().wait()


class KeptStore:
    """The machine stays, whatever happens to the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = Machine(folder / "machine")
        self.state = folder / "state"
        self.errors = b""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> SyncClient:
        """The daemon serves; a client of domain 0."""
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kept_store", str(self.machine.folder), str(self.state)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stderr is not None
        assert select.select([process.stdout], [], [], DEADLINE)[0], "it never said that it is ready"
        said = process.stdout.readline()
        if said != b"ready\n":
            self.kill()
            raise AssertionError(f"it says {said!r}, exit code {process.returncode}: {self.errors.decode()}")
        return SyncClient.connect(str(self.machine.folder / "run" / "socket"), timeout=DEADLINE)

    def introduce(self, client: SyncClient, domid: int) -> GuestRing:
        self.machine.create(domid)
        client.write(f"/local/domain/{domid}", "")
        client.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
        client.introduce(domid, 1, domid + 10)
        return self.machine.guest(domid)

    def kill(self) -> None:
        """As the kernel does it when memory is short. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(DEADLINE)
            assert process.stdout is not None and process.stderr is not None
            self.errors = process.stderr.read()
            process.stdout.close()
            process.stderr.close()

    def close(self) -> None:
        self.kill()
        self.machine.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
