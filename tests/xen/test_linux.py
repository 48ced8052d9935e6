"""What Linux's devices do otherwise than the embedded machines, and what a killed process leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.real_xen import dom0_ports
from xenbus.errors import HypervisorError, LinkDown, UsageError
from xenbus.hypervisor.interface import CopyOp, GNTST_bad_copy_arg, GNTST_bad_gntref, GNTST_okay
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.hypervisor.memory import Region

DEADLINE = 40
ROOT = Path(__file__).parents[2]


def with_handles(test, count=2):
    async def main():
        handles = [LinuxHypervisor(0) for _ in range(count)]
        try:
            await asyncio.wait_for(test(*handles), DEADLINE)
        finally:
            for handle in handles:
                await handle.close()

    asyncio.run(main())


async def refused(name, call):
    with pytest.raises(HypervisorError) as caught:
        await call
    assert caught.value.name == name


async def until_withdrawn(hv, ref):
    """Linux looks once a second whether a page that was still mapped is free (gnttab_handle_deferred)."""
    while True:
        try:
            mapping = await hv.map(0, [ref])
        except HypervisorError as error:
            assert error.name == "EPERM"
            return
        await hv.unmap(mapping)
        await asyncio.sleep(1.7)


def test_refs_that_may_not_be_mapped():
    async def test(front, back):
        pages = await front.alloc(0, 2)
        await refused("ENOENT", back.map(0, [pages.refs[0], 4_000_000_000]))
        await refused("ENOENT", back.map(0, [-1]))
        await refused("ENOENT", back.map(0, [1 << 32]))
        await refused("ENOENT", back.map(77, pages.refs))
        for_another = await front.alloc(5, 1)
        await refused("EPERM", back.map(0, [pages.refs[0], for_another.refs[0]]))
        gone = pages.refs
        await front.revoke(pages)
        await refused("EPERM", back.map(0, gone))  # Xen does not tell unused from not ours
        for call in (back.map(0, []), back.alloc(0, 0), back.alloc(0x7FF0, 1), back.map(-1, [8])):
            with pytest.raises(UsageError):
                await call
        assert back.held().mapped_pages == 0

    with_handles(test)


def test_copy_in_batches():
    async def test(front, back):
        pages = await front.alloc(0, 40)
        fixed = await front.alloc(0, 1, writable=False)
        words = [f"segment {n}".encode().ljust(16) for n in range(40)]
        there = [
            CopyOp(0, ref, 4080, 16, memoryview(word), True)
            for ref, word in zip(pages.refs, words, strict=True)
        ]
        assert await back.copy(there) == [GNTST_okay] * 40
        assert [bytes(pages.view[n * 4096 + 4080 : n * 4096 + 4096]) for n in range(40)] == words
        local = memoryview(bytearray(3 * 4096))
        # An address in the middle of a page: the kernel splits the segment.
        whole = [CopyOp(0, pages.refs[7], 0, 4096, local[1000:], False)]
        pages.view[7 * 4096 : 8 * 4096] = bytes(range(256)) * 16
        assert await back.copy(whole) == [GNTST_okay]
        assert local[1000:5096] == bytes(range(256)) * 16
        byte = memoryview(bytearray(1))
        odd = [
            CopyOp(0, pages.refs[0], 4096, 1, byte, False),
            CopyOp(0, 999_999, 0, 1, byte, False),
            CopyOp(0, -1, 0, 1, byte, False),
            CopyOp(0, fixed.refs[0], 0, 1, byte, True),
            CopyOp(77, pages.refs[0], 0, 1, byte, False),
            CopyOp(0, fixed.refs[0], 0, 1, byte, False),
        ]
        status = await back.copy(odd)
        assert status[:3] == [GNTST_bad_copy_arg, GNTST_bad_gntref, GNTST_bad_gntref]
        assert status[3] < 0 and status[4] < 0 and status[5] == GNTST_okay
        assert back.held().mapped_pages == 0

    with_handles(test)


def test_copies_of_a_run_at_once():
    """Parts of many pages, both ways, in one call; one bad piece is told of."""

    async def test(front, back):
        pages = await front.alloc(0, 40)
        region = Region(1 << 20, shared=False)
        pieces = [(ref, 512 * (n % 4), 2048 - 512 * (n % 3)) for n, ref in enumerate(pages.refs)]
        total = sum(length for _, _, length in pieces)
        data = os.urandom(total)
        region.view[:total] = data
        assert back.copy_run(0, pieces, region, to_remote=True)
        at = 0
        for n, (_, offset, length) in enumerate(pieces):
            start = n * 4096 + offset
            assert pages.view[start : start + length] == data[at : at + length]
            at += length
        region.view[:total] = bytes(total)
        assert back.copy_run(0, pieces, region, to_remote=False)
        assert region.view[:total] == data
        bad = [*pieces[:20], (999_999, 0, 512), *pieces[20:]]
        assert not back.copy_run(0, bad, region, to_remote=False)
        assert back.held().mapped_pages == 0
        region.close()

    with_handles(test)


def test_ports_that_may_not_be_bound():
    async def test(front, back):
        channel = await front.alloc_unbound(5, lambda: None)
        await refused("ENOENT", back.bind_interdomain(0, channel.port, lambda: None))
        await refused("ENOENT", back.bind_interdomain(0, 100_000, lambda: None))
        await refused("ENOENT", back.bind_interdomain(0, -1, lambda: None))
        await refused("ENOENT", back.bind_interdomain(77, 1, lambda: None))
        assert back.held().ports == 0

    with_handles(test)


def test_gntalloc_s_limit_is_enospc():
    async def test(front):
        await refused("ENOSPC", front.alloc(0, 200_000))
        assert front.held().granted_pages == 0

    with_handles(test, 1)


def test_a_slice_kept_too_long_keeps_no_grant():
    async def test(front, back):
        pages = await front.alloc(0, 1)
        mapping = await back.map(0, pages.refs)
        mapping.view[:4] = b"kept"
        late = mapping.view[:4]
        refs = pages.refs
        await back.unmap(mapping)
        assert bytes(late) == bytes(4)
        await front.revoke(pages)
        await refused("EPERM", back.map(0, refs))
        late.release()

    with_handles(test)


def test_unmap_clears_a_byte_and_kicks():
    async def test(front, back):
        kicked = asyncio.Event()
        pages = await front.alloc(0, 1)
        waiting = await front.alloc_unbound(0, kicked.set)
        bound = await back.bind_interdomain(0, waiting.port, lambda: None)
        mapping = await back.map(0, pages.refs)
        pages.view[100] = 0xFF
        back.notify_on_unmap(mapping, clear_byte=100, channel=bound)
        await asyncio.sleep(0)
        assert not kicked.is_set() and pages.view[100] == 0xFF
        await back.unmap(mapping)
        await kicked.wait()
        assert pages.view[100] == 0
        with pytest.raises(UsageError):
            back.notify_on_unmap(mapping, clear_byte=0)

    with_handles(test)


def test_a_handler_that_fails_silences_nobody():
    async def test(front, back):
        heard, said = asyncio.Event(), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["exception"]))

        def fails():
            heard.set()
            raise RuntimeError("on purpose")

        bad = await front.alloc_unbound(0, fails)
        kick = await back.bind_interdomain(0, bad.port, lambda: None)
        for _ in range(2):
            heard.clear()
            kick.notify()
            await heard.wait()
        assert [str(error) for error in said] == ["on purpose"] * 2

    with_handles(test)


def test_a_closed_handle_is_closed():
    async def test(front):
        pages = await front.alloc(0, 1)
        await front.alloc_unbound(0, lambda: None)
        await front.close()
        await front.close()
        assert front.held() == type(front.held())(0, 0, 0)
        with pytest.raises(ValueError, match="released"):
            pages.view[0]
        for call in (
            front.alloc(0, 1),
            front.map(0, [8]),
            front.alloc_unbound(0, lambda: None),
            front.copy([]),
        ):
            with pytest.raises(LinkDown):
                await call

    with_handles(test, 1)


VICTIM = """
import asyncio, sys
from xenbus.hypervisor.linux import LinuxHypervisor

async def main():
    hv = LinuxHypervisor(0)
    ref, port = map(int, sys.argv[1:])
    pages = await hv.alloc(0, 4)
    pages.view[:10] = b"last words"
    mapping = await hv.map(0, [ref])
    mine = await hv.alloc_unbound(0, lambda: None)
    theirs = await hv.bind_interdomain(0, port, lambda: None)
    hv.notify_on_unmap(mapping, clear_byte=0, channel=theirs)
    print(pages.refs[0], mine.port, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_process_leaves_nothing():
    async def test(back):
        before = dom0_ports()
        gone = asyncio.Event()
        offered = await back.alloc(0, 1)
        offered.view[0] = 1
        port = await back.alloc_unbound(0, gone.set)
        command = [sys.executable, "-c", VICTIM, str(offered.refs[0]), str(port.port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        # Blocks until it has said its two numbers: nothing else is to happen here before.
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as victim:  # noqa: ASYNC220
            assert victim.stdout is not None
            ref, its_port = map(int, victim.stdout.readline().split())
            mapping = await back.map(0, [ref])
            bound = await back.bind_interdomain(0, its_port, lambda: None)
            gone.clear()
            victim.send_signal(signal.SIGKILL)
        await gone.wait()
        assert offered.view[0] == 0
        bound.notify()
        assert bytes(mapping.view[:10]) == b"last words"
        await back.unmap(mapping)
        await until_withdrawn(back, ref)
        await refused("ENOENT", back.bind_interdomain(0, its_port, lambda: None))
        for channel in (port, bound):
            await channel.close()
        assert dom0_ports() == before

    with_handles(test, 1)


# Every step of a driver's life as system calls; the process kills itself at its `step`th one.
AT_A_STEP = """
import asyncio, os, signal, sys
from xenbus.hypervisor import linux_abi as abi
from xenbus.hypervisor.interface import CopyOp
from xenbus.hypervisor.linux import LinuxHypervisor

ref, port, step = map(int, sys.argv[1:])
real, count = abi.call, 0

def call(*args):
    global count
    count += 1
    if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

abi.call = call

async def main():
    hv = LinuxHypervisor(0)
    pages = await hv.alloc(0, 2)
    print(pages.refs[0], flush=True)
    mine = await hv.alloc_unbound(0, lambda: None)
    mapping = await hv.map(0, [ref])
    theirs = await hv.bind_interdomain(0, port, lambda: None)
    hv.notify_on_unmap(mapping, clear_byte=0)
    theirs.notify()
    await hv.copy([CopyOp(0, ref, 0, 16, memoryview(bytearray(16)), False)])
    await hv.unmap(mapping)
    await theirs.close()
    await mine.close()
    await hv.revoke(pages)
    print("over", flush=True)

asyncio.run(main())
"""


def finished(command, environment):
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.timeout(180)
def test_killed_at_any_step_it_leaves_nothing():
    async def test(back):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        before = dom0_ports()
        for step in range(1, 30):
            offered = await back.alloc(0, 1)
            port = await back.alloc_unbound(0, lambda: None)
            command = [sys.executable, "-c", AT_A_STEP, str(offered.refs[0]), str(port.port), str(step)]
            done = await asyncio.to_thread(
                subprocess.run,
                command,
                capture_output=True,
                text=True,
                env=environment,
                timeout=60,
                check=False,
            )
            said = done.stdout.split()
            refs = [int(word) for word in said if word.isdigit()]
            taken = offered.refs[0]
            await port.close()
            await back.revoke(offered)
            for ref in (taken, *refs):
                await until_withdrawn(back, ref)
            assert dom0_ports() == before, step
            if "over" in said:
                assert step > 10 and done.returncode == 0, done.stderr
                return
            assert done.returncode == -signal.SIGKILL, done.stderr
        raise AssertionError("it was never over")

    async def main():
        handle = LinuxHypervisor(0)
        try:
            await asyncio.wait_for(test(handle), 160)
        finally:
            await handle.close()

    asyncio.run(main())
