"""Child processes: exit codes are never lost, an end has a deadline, descriptors are given back."""

import asyncio
import signal
import sys

import pytest
from tests.support.until import descriptors

from xenbus.domain import child as module
from xenbus.domain.child import Child

# Says a word when it is up: a signal before that would meet an interpreter that is still starting.
SLEEP = "import sys,time; print('up', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


async def _start(tmp_path, code, **options):
    path = tmp_path / "out"
    with path.open("ab") as output:
        child = Child([sys.executable, "-c", code], output=output, **options)
    if "'up'" in code:
        async with asyncio.timeout(10):
            while path.read_text() != "up\n":  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    return child


def test_an_exit_code_is_kept_and_its_output_is_in_the_file(tmp_path):
    async def main():
        before = descriptors()
        child = await _start(
            tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(90)"
        )
        assert child.returncode is None
        async with asyncio.timeout(10):
            assert await child.wait() == 90
        assert child.returncode == 90
        assert descriptors() == before
        child.send_signal(signal.SIGKILL)  # nobody there any more: nothing happens
        assert await child.end() == 90

    asyncio.run(main())
    assert sorted((tmp_path / "out").read_text().split()) == ["err", "out"]


def test_an_end_that_races_a_signal_keeps_its_code(tmp_path):
    async def main():
        children = [await _start(tmp_path, "raise SystemExit(90)") for _ in range(3)]
        async with asyncio.timeout(10):
            while any(child.returncode is None for child in children):
                for child in children:
                    child.send_signal(0)  # what asyncio's own would have reaped by polling
                await asyncio.sleep(0)
        assert [await child.end() for child in children] == [90, 90, 90]

    asyncio.run(main())


def test_a_child_ends_by_sigterm_and_by_sigkill(tmp_path):
    async def main():
        child = await _start(tmp_path, SLEEP)
        assert await child.end() == -signal.SIGTERM
        (tmp_path / "out").unlink()
        child = await _start(tmp_path, SLEEP)
        assert await child.end(kill=True) == -signal.SIGKILL

    asyncio.run(main())


def test_one_that_is_deaf_to_sigterm_is_killed_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_DEADLINE", 0.1)

    async def main():
        child = await _start(tmp_path, DEAF)
        async with asyncio.timeout(10):
            assert await child.end() == -signal.SIGKILL

    asyncio.run(main())


def test_only_the_descriptors_that_were_meant_are_passed(tmp_path):
    code = "import os; print(*os.listdir('/proc/self/fd'))"

    async def main():
        with (tmp_path / "meant").open("wb") as meant, (tmp_path / "other").open("wb") as other:
            child = await _start(tmp_path, code, pass_fds=[meant.fileno()])
            async with asyncio.timeout(10):
                await child.wait()
            seen = set(map(int, (tmp_path / "out").read_text().split()))
            assert meant.fileno() in seen and other.fileno() not in seen

    asyncio.run(main())


def test_a_command_that_is_not_there_leaves_nothing(tmp_path):
    async def main():
        before = descriptors()
        with (tmp_path / "out").open("ab") as output, pytest.raises(OSError):
            Child([str(tmp_path / "nothing")], output=output)
        assert descriptors() == before

    asyncio.run(main())
