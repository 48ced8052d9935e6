"""A guest that lies, beside one that is honest, both served by one `xenbus serve` in dom0.

After each case: the same process, the liar's device closed or its requests answered with errors, named in the
log; the honest guest was served meanwhile. At the end nothing is mapped, bound or in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.dom0 import MIB, STORE, random_file, sha256
from tests.support.fronts import LinuxFront, file_sums
from tests.support.real_xen import dom0_ports
from tests.support.serving import Daemon, serving
from tests.support.xl_guest import PythonGuest, XlGuest, python_guest, xl, xl_guest
from xenbus.domain.rpc import RpcClient
from xenbus.hypervisor.interface import CopyOp, GNTST_okay
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import detach_device, wait_connected, write_device
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(240)
PATIENCE = 90.0  # seconds, under emulation
HONEST = "xvda"
NAMES = "bcdefghijklmnop"  # of the liar's disks, in turn
LOG_LINE_MAX = 700


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """TimeoutError after PATIENCE."""
    async with asyncio.timeout(PATIENCE):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Stage:
    """A daemon, an honest guest under load, a liar; one loop for all tests of the module."""

    def __init__(self, runner: asyncio.Runner, work: Path) -> None:
        self.runner = runner
        self.work = work
        self.stack = AsyncExitStack()
        self.store: Client
        self.daemon: Daemon
        self.rpc: RpcClient
        self.honest: LinuxFront
        self.liar: PythonGuest
        self.disk: DevicePaths
        self.disks = 0

    async def open(self) -> None:
        enter = self.stack.enter_async_context
        self.store = await enter(await Client.connect(STORE))
        self.ports = dom0_ports()
        self.stack.push_async_callback(self.nothing_left)
        self.daemon = await enter(serving(self.work / "run"))
        await self.meet()
        self.stack.push_async_callback(lambda: self.rpc.close())
        self.before = await self.rpc.call("counts")
        made = await asyncio.gather(
            enter(xl_guest(self.store, "honest")), enter(python_guest(self.store, "liar"))
        )
        honest, self.liar = made
        assert isinstance(honest, XlGuest)
        self.honest = LinuxFront(honest)
        random_file(self.work / "honest.img", 8 * MIB)
        self.disk = await self.plug(honest.domid, HONEST, self.work / "honest.img")
        await wait_connected(self.store, self.disk, PATIENCE)
        await self.honest.appear(HONEST)
        await self.honest.load(HONEST, 0.3)
        await self.liar.call("from tests.support.liar import *")

    async def meet(self) -> None:
        """The daemon that runs now."""
        self.pid = self.daemon.pid
        self.rpc = await RpcClient.connect(self.work / "run" / "Domain-0")

    async def nothing_left(self) -> None:
        assert dom0_ports() == self.ports
        assert not await self.store.exists("backend/xbbd")
        assert not await self.store.exists("error/backend/xbbd")

    async def close(self) -> None:
        """The honest guest's disk holds what it was told it holds; then everything was given back."""
        written = await self.honest.unload(HONEST)
        assert written
        assert await self.honest.sums(HONEST, written) == written
        assert file_sums(self.work / "honest.img", written) == written
        assert await detach_device(self.store, self.disk, timeout=PATIENCE)
        counts = await self.settled()
        await self.stack.aclose()
        assert counts == self.before

    async def settled(self) -> dict[str, int]:
        """What the daemon holds, once it is what it held before there was a guest, or in the end."""

        async def as_before() -> bool:
            return bool(await self.rpc.call("counts") == self.before)

        with suppress(TimeoutError):
            await eventually(as_before)
        return dict(await self.rpc.call("counts"))

    async def plug(self, domid: int, vdev: str, image: Path, **options: object) -> DevicePaths:
        spec = DiskSpec(domid, str(image), vdev, back_kind="xbbd", **options).device()
        await write_device(self.store, spec)
        return spec.paths

    # -- the log

    def mark(self) -> int:
        return self.daemon.log.stat().st_size

    def said_since(self, mark: int) -> str:
        with self.daemon.log.open("rb") as file:
            file.seek(mark)
            return file.read().decode()

    async def said(self, words: str, mark: int) -> None:
        async def found() -> bool:
            return words in self.said_since(mark)

        try:
            await eventually(found)
        except TimeoutError:
            raise AssertionError(f"no {words!r} in the log: {self.said_since(mark)[-3000:]}") from None

    # -- a disk of the liar's

    @asynccontextmanager
    async def lying(
        self, *, ends: bool = True, closes: bool = True, order: int = 0, **options: object
    ) -> AsyncIterator[LiarsDisk]:
        """A disk of its own, waiting for it; afterwards it is gone, and the honest guest was served.

        ends: it is detached then; closes: and the liar answers that
        """
        self.disks += 1
        image = self.work / f"liar{self.disks}.img"
        random_file(image, MIB)
        paths = await self.plug(self.liar.domid, f"xvd{NAMES[self.disks % len(NAMES)]}", image, **options)
        disk = LiarsDisk(self, paths, image)
        await disk.do(f"liar = await Liar.begin({paths.devid}, {order})")
        yield disk
        if ends:
            if closes:
                await disk.do("await liar.close()")
            # An answer that never comes is not waited for long.
            seconds = PATIENCE if closes else 0.5
            assert await detach_device(self.store, paths, timeout=seconds, force=True) == closes
            await disk.do("await liar.end()")
        for node in (paths.back, paths.front, paths.record, paths.back_error):
            assert not await self.store.exists(node), node
        await self.honest.progress(HONEST)
        assert self.daemon.pid == self.pid == (await self.rpc.call("info"))["pid"]
        assert max(map(len, self.said_since(disk.began).splitlines()), default=0) < LOG_LINE_MAX


def marked(cases: Iterable[str], *features: str) -> list[object]:
    """These of them are left to `make xen-test-all`."""
    return [pytest.param(case, marks=pytest.mark.features if case in features else ()) for case in cases]


class LiarsDisk:
    def __init__(self, stage: Stage, paths: DevicePaths, image: Path) -> None:
        self.stage = stage
        self.paths = paths
        self.image = image
        self.was = sha256(image)
        self.began = stage.mark()

    async def do(self, source: str, **args: object) -> object:
        return await self.stage.liar.call(source, PATIENCE, **args)

    async def sysctl(self, leaf: str) -> object:
        """A leaf of the back end's device."""
        node = self.paths.back.removeprefix("/local/domain/0/")
        for name, value in await self.stage.rpc.call("sysctl"):
            if name.endswith(".xenstore_path") and value == node:
                device = name.removesuffix(".xenstore_path")
                return dict(await self.stage.rpc.call("sysctl", name=device))[f"{device}.{leaf}"]
        raise AssertionError(f"no device at {self.paths.back}")

    async def given_back(self) -> None:
        """The back end is closed, and holds nothing of the liar's."""

        async def empty() -> bool:
            return not await self.sysctl("held")

        await eventually(empty)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with asyncio.Runner() as runner:
        made = Stage(runner, tmp_path_factory.mktemp("hostile"))
        try:
            runner.run(made.open())
        except BaseException:
            runner.run(made.stack.aclose())
            raise
        yield made
        runner.run(made.close())


REFS = {
    "never granted": ("{'ring-ref': 4711}", "(ref 4711)"),
    "beyond the table": ("{'ring-ref': 2**32 - 5}", f"(ref {2**32 - 5})"),
    "another domain's": ("{'ring-ref': honest_ref}", "mapping 1 pages"),
    "granted to another domain": (
        "{'ring-ref': (other := await liar.hv.grants.alloc(honest, 1)).refs[0]}",
        "mapping 1 pages",
    ),
    "granted for reading only": (
        "{'ring-ref': (readonly := await liar.hv.grants.alloc(0, 1, writable=False)).refs[0]}",
        "can be read, and not written",
    ),
    "no port": ("{'event-channel': 4000}", "port 4000"),
    "a port for another domain": (
        "{'event-channel': (port := await liar.hv.evtchn.alloc_unbound(honest, print)).port}",
        "port ",
    ),
    "a ring that is nonsense": ("(liar.poke(REQ_PROD, 1000), {})[1]", "req_prod jumped to 1000"),
}


async def granted_by(domid: int, not_by: int) -> int:
    """A ref that is good in one domain's table, and not in the other's."""
    hv, byte = LinuxHypervisor(0), memoryview(bytearray(1))
    try:
        for ref in range(8, 1000):
            tried = [CopyOp(domain, ref, 0, 1, byte, False) for domain in (domid, not_by)]
            good, bad = await hv.gntdev.copy(tried)
            if good == GNTST_okay != bad:
                return ref
    finally:
        await hv.close()
    raise AssertionError("none")


async def refused(disk: LiarsDisk, lies: Mapping[str, tuple[str, str]]) -> None:
    """One after the other: each closes the device, and the log says why; nothing is kept of any."""
    mark = disk.stage.mark()
    lines = ["found = []"]
    for source, _ in lies.values():
        lines += [f"found.append(await liar.publish({source}))", "await liar.begin_anew()"]
    found = await disk.do("\n".join([*lines, "found"]))
    assert set(found) <= {b"5", b"6"}, dict(zip(lies, found, strict=True))
    for _, words in lies.values():
        await disk.stage.said(words, mark)
    await disk.given_back()


def test_wrong_refs_and_ports(stage: Stage) -> None:
    async def test() -> None:
        async with stage.lying() as disk:
            honest = stage.honest.guest.domid
            await disk.do("pass", honest=honest, honest_ref=await granted_by(honest, stage.liar.domid))
            await refused(disk, REFS)
            # And then the truth: it is served as anybody.
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do("liar.put(Op.READ, 1, 0, liar.word(0)); await liar.answered(1)")
            assert await disk.do("bytes(liar.data.view[:4096])") == disk.image.read_bytes()[:4096]

    stage.runner.run(test())


PARAMETERS = {
    "a ring too large": ("{'ring-page-order': 5}", "ring-page-order: 5, at most 4"),
    "a ring of 2**40 pages": ("{'ring-page-order': 2**40}", "ring-page-order"),
    "too few refs": ("{'ring-page-order': 2}", "ring-ref0"),
    "one page four times": (
        "{'ring-page-order': 1, 'ring-ref0': liar.pages.refs[0], 'ring-ref1': liar.pages.refs[0]}",
        "ring-ref1: grant reference",
    ),
    "no queue": ("{'multi-queue-num-queues': 0}", "multi-queue-num-queues: 0"),
    "10000 queues": ("{'multi-queue-num-queues': 10000}", "multi-queue-num-queues: 10000"),
    "queues without keys": ("{'multi-queue-num-queues': 2}", "queue-0/event-channel is missing"),
    "no ref": ("{'ring-ref': None}", "ring-ref is missing"),
    "no port": ("{'event-channel': None}", "event-channel is missing"),
    "no number": ("{'ring-ref': b'\\xff\\x00\\n[31m'}", r"ring-ref: b'\xff\x00\n[31m' is not a number"),
    "below nothing": ("{'event-channel': -1}", "event-channel: b'-1' is not a number"),
    "1900 digits": ("{'ring-ref': b'9' * 1900}", "ring-ref: b'9999"),
    "a layout nobody knows": ("{'protocol': b'\\x07' * 1900}", "protocol"),
}


def test_wrong_parameters(stage: Stage) -> None:
    async def test() -> None:
        async with stage.lying() as disk:
            await refused(disk, PARAMETERS)
            assert await disk.do("await liar.publish()") == b"4"

    stage.runner.run(test())


# What is put on the ring, and what the log says of it.
REQUESTS = (
    ("liar.put(Op.READ, ident, 0)", "0 segments"),
    ("liar.put(Op.READ, ident, 0, liar.word(0), count=12)", "12 segments"),
    ("liar.put(Op.WRITE, ident, 0, liar.word(0), count=255)", "255 segments"),
    ("liar.put(Op.READ, ident, 0, liar.word(0, 5, 4))", "sectors 5 to 4"),
    ("liar.put(Op.WRITE, ident, 0, liar.word(0, 0, 8))", "sectors 0 to 8"),
    ("liar.put(Op.READ, ident, 2047, liar.word(0))", "8 sectors at 2047"),
    ("liar.put(Op.WRITE, ident, 2**64 - 1, liar.word(0))", f"8 sectors at {2**64 - 1}"),
    ("liar.put(Op.READ, ident, 0, segment_word(4711))", "(ref 4711)"),
    ("liar.put(Op.WRITE, ident, 0, segment_word(4711))", "(ref 4711)"),
    ("liar.put(Op.READ, ident, 0, segment_word(2**32 - 5))", f"(ref {2**32 - 5})"),
    ("liar.put(Op.READ, ident, 0, segment_word(others.refs[0]))", "mapping 1 pages"),
    ("liar.put(Op.READ, ident, 0, segment_word(readonly.refs[0]))", "can be read, and not written"),
    ("liar.indirect(Op.READ, ident, 0)", "0 indirect segments"),
    ("liar.indirect(Op.READ, ident, 257)", "257 indirect segments"),
    ("liar.indirect(Op.FLUSH_DISKCACHE, ident, 1)", "operation 3 in an indirect request"),
    ("liar.indirect(Op.READ, ident, 1, 4711)", "descriptors: "),
    ("liar.indirect(Op.WRITE, ident, 3, fill=b'\\xff' * 24)", "sectors 255 to 255"),
    ("liar.put_raw(liar.abi.discard.pack(Op.DISCARD, 0, 0, ident, 2**63, 2**63))", "discard of"),
)
UNKNOWN = (4, 7, 255)


def test_wrong_requests(stage: Stage) -> None:
    async def test() -> None:
        for requests in (REQUESTS[:9], REQUESTS[9:]):  # a device has so many lines of the log at once
            async with stage.lying() as disk:
                assert await disk.do("await liar.publish()") == b"4"
                await disk.do(
                    "from xenbus.drivers.block.blkif import segment_word\n"
                    "others = await liar.hv.grants.alloc(honest, 1)\n"
                    "readonly = await liar.hv.grants.alloc(0, 1, writable=False)",
                    honest=stage.honest.guest.domid,
                )
                mark = stage.mark()
                put = [f"ident = {n}; {source}" for n, (source, _) in enumerate(requests)]
                put += [f"liar.put({op}, {100 + op}, 0, liar.word(0))" for op in UNKNOWN]
                put += [
                    "liar.put(Op.READ, 1000, 8, liar.word(1))",
                    "liar.put(Op.READ, 1001, 0, *[liar.word(2)] * 11)",  # one ref, many times: no lie
                ]
                count = len(put)
                answers = await disk.do("\n".join([*put, f"await liar.answered({count})"]))
                status = {ident: status for ident, _, status in answers}
                assert status == {
                    **dict.fromkeys(range(len(requests)), -1),
                    **{100 + op: -2 for op in UNKNOWN},
                    1000: 0,
                    1001: 0,
                }
                for n, (_, words) in enumerate(requests):
                    await stage.said(f"(domain {stage.liar.domid}): request {n}, ", mark)
                    said = stage.said_since(mark).splitlines()
                    assert words in next(line for line in said if f": request {n}, " in line)
                for op in UNKNOWN:
                    await stage.said(f"unknown operation {op}", mark)
                data = disk.image.read_bytes()
                assert await disk.do("bytes(liar.data.view[4096:8192])") == data[4096:8192]
                assert sha256(disk.image) == disk.was
                await disk.do("await liar.hv.grants.revoke(others); await liar.hv.grants.revoke(readonly)")

    stage.runner.run(test())


JUMPS = {
    "ahead": ("liar.poke(REQ_PROD, 33)", "req_prod jumped to 33"),
    "far ahead": ("liar.poke(REQ_PROD, 2**31)", f"req_prod jumped to {2**31}"),
    "back": (
        "liar.put(Op.READ, 1, 0, liar.word(0)); await liar.answered(1); liar.poke(REQ_PROD, 0)",
        "req_prod jumped to 0",
    ),
    "beyond the end": ("liar.poke(REQ_PROD, -1)", f"req_prod jumped to {2**32 - 1}"),
}


def test_indices_that_jump(stage: Stage) -> None:
    async def test() -> None:
        async with stage.lying() as disk:
            mark = stage.mark()
            for source, _ in JUMPS.values():
                assert await disk.do("await liar.publish()") == b"4"
                await disk.do(f"{source}\nawait liar.until(CLOSING, CLOSED)\nawait liar.begin_anew()")
            for _, words in JUMPS.values():
                await stage.said(words, mark)
            await disk.given_back()
            # Not a lie: a ring that begins just before the end of all numbers.
            await disk.do(
                "ring = liar.ring\n"
                "for n in range(4): ring.words[n] = 2**32 - 3\n"
                "ring.req_prod_pvt = ring.rsp_cons = ring._published = 2**32 - 3\n"
                "ring.words[1] = ring.words[3] = 2**32 - 2\n"
            )
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do("for n in range(8): liar.put(Op.READ, n, 8 * n, liar.word(n))")
            answers = await disk.do("await liar.answered(8)")
            assert answers == [[n, 0, 0] for n in range(8)]
            assert await disk.do("bytes(liar.data.view[:32768])") == disk.image.read_bytes()[:32768]
            # rsp_prod is ours: what the front writes there, we do not read.
            await disk.do(
                "liar.ring.words[RSP_PROD] = 12345\n"
                "liar.put(Op.READ, 99, 0, liar.word(0)); liar.ring.push_requests(); liar.channel.notify()"
            )

            async def read() -> bool:
                return bool(await disk.sysctl("requests_read") == 10)

            await eventually(read)

    stage.runner.run(test())


def test_slots_overwritten_while_they_are_served(stage: Stage) -> None:
    """All of the ring is noise, all the time; in the end its journal shows that it cannot be."""

    async def test() -> None:
        async with stage.lying(order=2) as disk:
            mark = stage.mark()
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do("liar.scribble()")
            await stage.honest.progress(HONEST, 5)
            assert await disk.do("await liar.stop()") > 0
            lines = stage.said_since(mark).splitlines()
            assert any(f"(domain {stage.liar.domid}): request " in line for line in lines) or any(
                "wrote over it" in line or "req_prod jumped" in line for line in lines
            )
            assert len(lines) < LINES_MOST

    stage.runner.run(test())


# The levels' bursts, and some for the time that a case takes.
LINES_MOST = 3 * 20 + 30


def test_storms_of_events(stage: Stage) -> None:
    """From a guest that does not close either, when its disk is detached."""

    async def test() -> None:
        async with stage.lying(closes=False) as disk:
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do("liar.storm()")
            before = await disk.do("liar.done")
            await stage.honest.progress(HONEST, 10)
            assert await disk.do("liar.done") > before
            # It is served itself, too.
            await disk.do("liar.put(Op.READ, 1, 0, liar.word(0)); await liar.answered(1)")
            assert await disk.do("liar.done") > 1000

    stage.runner.run(test())


FLAPS = {
    "all of them": (["4", "5", "6", "1"], ""),
    "connecting": (["1", "3", "4", "3"], ""),
    "no states": (["9", "x" * 1000, "-1", "4"], "is not a XenbusState"),
    "begun and ended": (["3", "6", "1"], ""),
}


@pytest.mark.parametrize("how", marked(FLAPS, "connecting", "begun and ended"))
def test_states_that_flap(stage: Stage, how: str) -> None:
    states, words = FLAPS[how]

    async def test() -> None:
        async with stage.lying() as disk:
            assert await disk.do("await liar.publish()") == b"4"
            mark = stage.mark()
            await disk.do("liar.flap(states)", states=states)
            before = await disk.do("liar.done")
            await stage.honest.progress(HONEST, 6)
            assert await disk.do("liar.done") > before
            assert await disk.do("await liar.stop()") > 10
            if words:
                await stage.said(words, mark)
            assert len(stage.said_since(mark).splitlines()) < LINES_MOST

    stage.runner.run(test())


REMOVALS = {
    "its directory": "await liar.store.rm(liar.node)",
    "its state": "await liar.store.rm(f'{liar.node}/state')",
}


@pytest.mark.parametrize("what", marked(REMOVALS, "its state"))
def test_nodes_removed_under_us(stage: Stage, what: str) -> None:
    """Connected, with requests on their way, and in the middle of a handshake."""

    async def test() -> None:
        async with stage.lying() as disk:
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do(
                "for n in range(16): liar.put(Op.WRITE, n, 8 * n, liar.word(n % 15))\n"
                "liar.ring.push_requests(); liar.channel.notify()\n" + REMOVALS[what]
            )
            await disk.do("await liar.until(CLOSED)")
            await disk.given_back()
        async with stage.lying() as disk:
            await disk.do(f"await liar.say(3); {REMOVALS[what]}; await liar.until(CLOSED)")
            await disk.given_back()

    stage.runner.run(test())


def test_a_directory_rewritten_and_filled(stage: Stage) -> None:
    """`backend` elsewhere, and nodes until the store says that it is enough."""

    async def test() -> None:
        async with stage.lying() as disk:
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do(
                "await liar.store.write(f'{liar.node}/backend', other)\n"
                "await liar.store.write(f'{liar.node}/backend-id', '77')",
                other=stage.disk.back,
            )
            filled = await disk.do(
                "n = 0\n"
                "try:\n"
                "    for n in range(5000): await liar.store.write(f'{liar.node}/{n}', 'x' * 500)\n"
                "except Exception as error: why = str(error)\n"
                "(n, why)"
            )
            assert (filled[0] > 100 and "ENOSPC" in filled[1]) or "EQUOTA" in filled[1], filled
            await disk.do("liar.put(Op.READ, 1, 0, liar.word(0)); await liar.answered(1)")
            assert await disk.sysctl("xenbus_connection_state") == "Connected"

    stage.runner.run(test())


def test_rsp_prod_overwritten_before_another_process_goes_on(stage: Stage) -> None:
    """The one time that it is read. The honest guest's disk goes on, whatever was in flight."""

    async def test() -> None:
        async with stage.lying() as disk:
            assert await disk.do("await liar.publish()") == b"4"
            await disk.do("for n in range(8): liar.put(Op.WRITE, n, 8 * n, liar.word(n))")
            await disk.do("await liar.answered(8); liar.ring.words[RSP_PROD] = 12345")
            mark = stage.mark()
            await stage.daemon.kill()
            await stage.daemon.start()
            await stage.rpc.close()
            await stage.meet()
            await stage.said("rsp_prod 12345 does not fit 8 requests taken", mark)
            await disk.do("await liar.until(CLOSING, CLOSED)")
            await disk.given_back()

    stage.runner.run(test())


def test_destroyed_in_the_middle_of_it_all(stage: Stage) -> None:
    """A storm, states that flap and requests under way, each on a disk of its own: and the guest is gone."""

    async def test() -> None:
        domid, store = stage.liar.domid, stage.store

        async def gone() -> bool:
            """Xen keeps a dead domain for as long as somebody has a page of it mapped."""
            listed = [line.split()[1] for line in (await xl("list")).splitlines()]
            return str(domid) not in listed and not await store.exists(f"backend/xbbd/{domid}")

        async with AsyncExitStack() as stack:
            for lie in ("liar.storm()", "liar.flap([4, 5, 6, 1, 3])", "liar.scribble()"):
                disk = await stack.enter_async_context(stage.lying(ends=False))
                assert await disk.do("await liar.publish()") == b"4"
                await disk.do(lie)
            await stage.honest.progress(HONEST)
            await stage.liar.destroy()
            await eventually(gone)

    stage.runner.run(test())
