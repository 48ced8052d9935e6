"""A back end in a process of its own, made to be killed: `BackProcess` starts it, this module is its program.

It says "ready N" once its bus has seen every device (N requests were done again), "stuck" when enough writes
hang (`stick`). SIGUSR2: it hands its devices over and ends. SIGTERM: it closes them and ends. No test here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
STUCK = 4


class BackProcess:
    """handle: the process's end of a broker's handle, for an embedded machine; None: this is a real dom0."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.again = -1

    @classmethod
    async def start(
        cls,
        store: str,
        handle: socket.socket | None = None,
        journals: Path | None = None,
        *,
        inherits: bool = True,
        stick: int | None = None,
        patience: float | None = None,
    ) -> BackProcess:
        """Up and ready. stick: so many writes are done, all later ones hang; patience: seconds that a former
        process has to be gone, if not BackEnd's own."""
        command = [sys.executable, "-m", "tests.support.back_process", "--store", store]
        command += ["--handle", str(handle.fileno())] if handle is not None else []
        command += ["--journals", str(journals)] if journals is not None else []
        command += ["--inherits"] if inherits else []
        command += ["--stick", str(stick)] if stick is not None else []
        command += ["--patience", str(patience)] if patience is not None else []
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            pass_fds=[handle.fileno()] if handle is not None else [],
        )
        if handle is not None:
            handle.close()
        made = cls(process)
        try:
            made.again = int((await made.said("ready")).split()[1])
        except BaseException:
            await made.kill()
            raise
        return made

    async def said(self, word: str) -> str:
        """Its next line, which begins with that word."""
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), DEADLINE)).decode().strip()
        assert line.startswith(word), f"the back end said {line!r}, not {word!r}"
        return line

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def hand_over(self) -> str:
        """ "released", and what could not end."""
        self.process.send_signal(signal.SIGUSR2)
        line = await self.said("released")
        assert await asyncio.wait_for(self.process.wait(), DEADLINE) == 0
        self._close()
        return line

    async def stop(self) -> None:
        assert await self._end(signal.SIGTERM) == 0

    async def _end(self, number: int) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), DEADLINE)
        self._close()
        return code

    def _close(self) -> None:
        self.process._transport.close()  # type: ignore[attr-defined]


def _stick(after: int) -> None:
    from xenbus.drivers.block.storage.schemes.file import FileStorage

    writev, count = FileStorage.writev, 0

    async def sticking(self, offset, buffers):
        nonlocal count
        count += 1
        if count > after:
            if count == after + STUCK:
                print("stuck", flush=True)
            await asyncio.Event().wait()
        await writev(self, offset, buffers)

    FileStorage.writev = sticking  # type: ignore[method-assign]
    # A disk that hangs takes nothing at once either.
    FileStorage.try_writev = lambda *_: False  # type: ignore[method-assign]


async def _serve(given: argparse.Namespace) -> None:
    import tests.support.echo_port  # noqa: F401 - a far side that needs nobody
    import xenbus.drivers.block  # in the lab no package says that it is there
    import xenbus.drivers.net  # noqa: F401
    from xenbus.bus import BackBus, Settings
    from xenbus.hypervisor.broker import connect
    from xenbus.hypervisor.linux import LinuxHypervisor
    from xenbus.newbus import Newbus
    from xenbus.xenstore.client import Client

    store = await Client.connect(given.store)
    hv = LinuxHypervisor(0) if given.handle is None else await connect(given.handle)
    tree = Newbus()
    parent = tree.add_child(tree.root, name="xenstore")
    settings = Settings(journals=given.journals, detach=5.0)
    bus = BackBus(store, hv, parent, settings=settings, inherits=given.inherits)
    await bus.attach()
    while not all(dev.mailbox.idle for dev in bus.devices.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    again = [getattr(dev.driver, "_again", 0) for dev in bus.devices.values()]
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        asyncio.get_running_loop().add_signal_handler(number, ended.set_result, number)
    print("ready", sum(again), flush=True)
    if await ended == signal.SIGUSR2:
        failures = await bus.release()
        print("released", *failures.values(), flush=True)
        held = hv.held()
        assert not any((held.granted_pages, held.mapped_pages, held.ports)), held
    else:
        await bus.detach()
    await hv.close()
    await store.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--handle", type=int)
    parser.add_argument("--journals", type=Path)
    parser.add_argument("--inherits", action="store_true")
    parser.add_argument("--stick", type=int)
    parser.add_argument("--patience", type=float)
    given = parser.parse_args()
    if given.patience is not None:
        from xenbus.drivers import halves

        halves.BUSY_TIMEOUT = given.patience
    if given.stick is not None:
        _stick(given.stick)
    from xenbus.hypervisor.polling import polling_loop

    with asyncio.Runner(loop_factory=polling_loop) as runner:
        runner.run(_serve(given))


if __name__ == "__main__":
    main()
