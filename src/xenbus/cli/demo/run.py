"""Runs the demo's steps on a stage and says how it ended."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from xenbus.cli.demo.picture import furnish
from xenbus.cli.demo.show import Data, Person, Show
from xenbus.cli.demo.stage import GUEST, Stage, give, give_disk
from xenbus.cli.demo.steps import SCRATCH, STEPS
from xenbus.drivers.block import image as shipped
from xenbus.drivers.block.blkif import SECTOR_SIZE
from xenbus.errors import UsageError, XenbusError
from xenbus.toolstack.console import ConsoleSpec


def run(*, as_json: bool, image: Path | None, hold: bool, directory: Path | None) -> int:
    """0 if all of it held, 1 otherwise."""
    show: Show = Data() if as_json else Person()
    with tempfile.TemporaryDirectory(prefix="xenbus-") as temporary:
        root = (directory or Path(temporary) / "host").absolute()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk = root / "disk.img"
        if disk.exists():
            raise UsageError(f"{disk} is there already: the demo writes on its own copy only")
        try:
            if image is None:
                shipped.write_to(disk)
            else:
                shutil.copyfile(image, disk)
                _check(image, disk.stat().st_size)
            return asyncio.run(_run(Stage(root, disk, show), hold))
        finally:
            if directory is not None:
                disk.unlink(missing_ok=True)


def _check(image: Path, size: int) -> None:
    """UsageError for what could not be the demo's disk: it compares every byte, and writes at the end."""
    if size < SCRATCH or size % SECTOR_SIZE:
        raise UsageError(
            f"{image}: {size} bytes; the demo needs {SCRATCH} or more, in whole sectors of {SECTOR_SIZE}"
        )


async def _run(stage: Stage, hold: bool) -> int:
    title = ""
    task = asyncio.current_task()
    assert task is not None
    ends: list[str] = []

    def terminate() -> None:
        ends.append("SIGTERM")
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        for step in STEPS:
            title = (step.__doc__ or step.__name__).strip()
            stage.show.step(title)
            await step(stage)
        if hold:
            await _hold(stage)
    except (XenbusError, TimeoutError, OSError) as error:
        stage.show.end(f"FAILED in {title!r}: {type(error).__name__}: {error}", ok=False)
        return 1
    except asyncio.CancelledError:
        if not ends:  # Ctrl-C is asyncio's
            raise
        stage.show.end(f"ended in {title!r} by SIGTERM", ok=False)
        return 128 + signal.SIGTERM
    finally:
        await stage.stop_host()
    stage.show.end("verified: " + ", ".join(stage.verified), ok=True)
    return 0


async def _hold(stage: Stage) -> None:
    """Up until Ctrl-C: a guest with its disk, and around it the seed's picture, to play with."""
    await stage.toolstack.create(GUEST)
    await give_disk(stage, GUEST, stage.image, "xvda")
    async with AsyncExitStack() as exits:
        made = await furnish(stage, exits)
        await made.talk.ready()
        await give(stage, ConsoleSpec(made.left.domid).device())
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        stage.show.step(f"Held until Ctrl-C: xenbus tree --dir {stage.root}")
        for hint in made.talk.hints():
            stage.show.note(hint)
        await stop.wait()
