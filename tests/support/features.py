"""What a disk's two ends can be set to, what must come of it, and hands on either end that set it and say
what came. No test here.

A Setup is in the words of our own two drivers (Xbd's class attributes, Options of xbbd); each front and back
says it in its own way, as blkfront's and blkback's module parameters, or why it cannot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support.fronts import APPEAR, XbdFront
from tests.support.serving import Daemon
from tests.support.xl_guest import PythonGuest, program
from xenbus.drivers.block.xbbd_options import OPTIONS
from xenbus.toolstack.paths import DevicePaths
from xenbus.toolstack.xenhost import XenHost
from xenbus.xenstore.client import Client

FRONT: Mapping[str, int] = {
    "num_queues": 1,
    "ring_page_order": 0,
    "persistent": 1,
    "indirect_segments": 64,  # blkfront makes pages for all that its rings could ask for at once
    "flush": 1,
    "barrier": 1,
    "discard": 1,
}
BACK: Mapping[str, int] = {
    "max_queues": 2,
    "max_ring_page_order": 4,
    "max_persistent_grants": 1024,
    "max_indirect_segments": 256,
    "flush": 1,
    "barrier": 1,
    "discard": 1,
}
SEGMENTS = 11  # BLKIF_MAX_SEGMENTS_PER_REQUEST, of a request that is not indirect


class Impossible(Exception):
    """This end cannot be set so; why."""


@dataclass(frozen=True)
class Facts:
    """What was agreed. None: this end does not show it.

    segments: pages in one request, at most; cache: "flush", "barrier", or "none"; sector: bytes
    """

    persistent: bool | None
    queues: int | None
    ring_pages: int | None
    segments: int | None
    discard: bool | None
    cache: str | None
    readonly: bool | None
    sector: int | None

    def otherwise(self, expected: Facts) -> dict[str, tuple[object, object]]:
        """What is otherwise than expected: found, expected."""
        return {
            name: (found, getattr(expected, name))
            for name in self.__dataclass_fields__
            if (found := getattr(self, name)) is not None and found != getattr(expected, name)
        }


@dataclass(frozen=True)
class Setup:
    """front, back: what differs from FRONT and BACK. shows: the rows of the table, (feature, setting)."""

    name: str
    shows: tuple[tuple[str, str], ...]
    front: Mapping[str, int] = field(default_factory=dict)
    back: Mapping[str, int] = field(default_factory=dict)
    readonly: bool = False
    sector: int = 512

    def expected(self) -> Facts:
        front, back = {**FRONT, **self.front}, {**BACK, **self.back}
        both = {name: front[name] and back[name] for name in ("flush", "barrier", "discard")}
        indirect = min(front["indirect_segments"], back["max_indirect_segments"])
        return Facts(
            persistent=bool(front["persistent"] and back["max_persistent_grants"]),
            queues=min(front["num_queues"], back["max_queues"]),
            ring_pages=1 << min(front["ring_page_order"], back["max_ring_page_order"]),
            segments=max(indirect, SEGMENTS),
            discard=bool(both["discard"]) and not self.readonly,
            cache="flush" if both["flush"] else "barrier" if both["barrier"] else "none",
            readonly=self.readonly,
            sector=self.sector,
        )


ON, OFF, BY_FRONT, BY_BACK = "on", "off", "off by the front", "off by the back"
PERSISTENT, QUEUES, RINGS = "persistent grants", "multi-queue", "multi-page rings"
INDIRECT, DISCARD, FLUSH, BARRIER = "indirect descriptors", "discard", "flush", "barrier"
READONLY, SECTORS = "read-only", "4096-byte sectors"
ROWS = (PERSISTENT, QUEUES, RINGS, INDIRECT, DISCARD, FLUSH, BARRIER, READONLY, SECTORS)
_NO_CACHE = {"flush": 0, "barrier": 0}

SETUPS = (
    Setup(
        "plain",
        (
            *((feature, ON) for feature in (PERSISTENT, INDIRECT, DISCARD, FLUSH)),
            *((feature, BY_FRONT) for feature in (QUEUES, RINGS)),
            *((feature, OFF) for feature in (READONLY, SECTORS)),
        ),
    ),
    Setup("persistent-not-front", ((PERSISTENT, BY_FRONT),), front={"persistent": 0}),
    Setup("persistent-not-back", ((PERSISTENT, BY_BACK),), back={"max_persistent_grants": 0}),
    Setup("queues", ((QUEUES, ON),), front={"num_queues": 2}),
    Setup("queues-not-back", ((QUEUES, BY_BACK),), front={"num_queues": 2}, back={"max_queues": 1}),
    Setup("rings", ((RINGS, ON),), front={"ring_page_order": 3}),
    Setup(
        "rings-not-back", ((RINGS, BY_BACK),), front={"ring_page_order": 3}, back={"max_ring_page_order": 0}
    ),
    Setup("indirect-not-front", ((INDIRECT, BY_FRONT),), front={"indirect_segments": 0}),
    Setup("indirect-not-back", ((INDIRECT, BY_BACK),), back={"max_indirect_segments": 0}),
    Setup("discard-not-front", ((DISCARD, BY_FRONT),), front={"discard": 0}),
    Setup("discard-not-back", ((DISCARD, BY_BACK),), back={"discard": 0}),
    Setup("cache-not-front", ((FLUSH, BY_FRONT), (BARRIER, BY_FRONT)), front=_NO_CACHE),
    Setup("cache-not-back", ((FLUSH, BY_BACK), (BARRIER, BY_BACK)), back=_NO_CACHE),
    Setup("barrier-alone-front", ((BARRIER, ON),), front={"flush": 0}),
    Setup("barrier-alone-back", ((BARRIER, ON),), back={"flush": 0}),
    Setup("readonly", ((READONLY, ON),), readonly=True),
    Setup("sectors", ((SECTORS, ON),), sector=4096),
    Setup(
        "all-at-once",
        tuple((feature, ON) for feature in (PERSISTENT, QUEUES, RINGS, INDIRECT, DISCARD, FLUSH, SECTORS)),
        front={"num_queues": 2, "ring_page_order": 3},
        sector=4096,
    ),
    Setup(
        "nothing",
        tuple((feature, BY_FRONT) for feature in (PERSISTENT, INDIRECT)),
        front={"persistent": 0, "indirect_segments": 0},
        back={"max_queues": 1, "max_ring_page_order": 0, "discard": 0, **_NO_CACHE},
    ),
)

# -- fronts: the same five functions in the guest, whichever driver has the disk

_BLKFRONT = """
import errno, fcntl, hashlib, mmap, os, struct
from pathlib import Path
PIECE = 1 << 20
BLKDISCARD = 0x1277  # linux/fs.h

def _opened(name, flags):
    return os.open(f"/dev/{name}", flags | os.O_DIRECT)

def _error(function):
    try:
        function()
    except OSError as error:
        # One number has two names.
        return errno.errorcode[error.errno].replace("ENOTSUP", "EOPNOTSUPP")
    return ""

def _digest(name):
    sha, fd, buffer = hashlib.sha256(), _opened(name, os.O_RDONLY), mmap.mmap(-1, PIECE)
    try:
        at = 0
        while got := os.preadv(fd, [buffer], at):
            sha.update(buffer[:got])
            at += got
    finally:
        os.close(fd)
    return sha.hexdigest()

def _put(name, at, data):
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    fd = _opened(name, os.O_WRONLY)
    try:
        assert os.pwritev(fd, [buffer], at) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)

def _drop(name, at, length):
    fd = _opened(name, os.O_WRONLY)
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", at, length))
    finally:
        os.close(fd)

async def digest(name):
    return await asyncio.to_thread(_digest, name)

async def put(name, at, length):
    data = os.urandom(length)
    # By each CPU once: with two queues each has its own.
    half = length // 2
    error = ""
    for n, cpu in enumerate(sorted(os.sched_getaffinity(0))[:2]):
        def one(n=n, cpu=cpu):
            os.sched_setaffinity(0, {cpu})
            _put(name, at + n * half, data[n * half :] if n else data[:half])
        error = error or await asyncio.to_thread(_error, one)
    return [hashlib.sha256(data).hexdigest(), error]

async def short(name, at):
    return await asyncio.to_thread(_error, lambda: _put(name, at, os.urandom(512)))

async def drop(name, at, length):
    return await asyncio.to_thread(_error, lambda: _drop(name, at, length))

def facts(name):
    disk = Path("/sys/block") / name
    queue = disk / "queue"
    def number(key): return int((queue / key).read_text())
    cached = (queue / "write_cache").read_text().strip() == "write back"
    mq = [path for path in (disk / "mq").iterdir()]
    return [[*pair] for pair in dict(
        persistent=None,
        queues=len(mq),
        ring_pages=int((mq[0] / "nr_tags").read_text()) // 32,
        segments=number("max_segments"),
        discard=number("discard_max_bytes") > 0,
        cache="none" if not cached else "barrier" if number("fua") else "flush",
        readonly=(disk / "ro").read_text().strip() == "1",
        sector=number("logical_block_size"),
    ).items()]

def held():
    return [line.split()[-1] for line in Path("/proc/interrupts").read_text().splitlines()
            if line.rstrip().endswith("blkif")]
"""

_XBD = """
from xenbus.drivers.block.disk import DiskError
from xenbus.drivers.block.xbd import Xbd
from xenbus.errors import UsageError

def configure(options):
    for key, value in options:
        setattr(Xbd, key, value)

async def _error(call):
    try:
        await call
    except DiskError as error:
        return error.name
    except UsageError as error:
        return str(error)
    return ""

async def put(name, at, length):
    disk, data = dev(name).driver.disk, os.urandom(length)
    half = length // 2
    async def one():
        await asyncio.gather(disk.write(at, data[:half]), disk.write(at + half, data[half:]))
        await disk.flush()
    return [hashlib.sha256(data).hexdigest(), await _error(one())]

async def short(name, at):
    return await _error(dev(name).driver.disk.write(at, os.urandom(512)))

async def drop(name, at, length):
    return await _error(dev(name).driver.disk.discard(at, length))

def facts(name):
    device = dev(name)
    driver, agreed = device.driver, device.features
    geometry = driver.disk.geometry
    connections = driver.queue.connections
    return [[*pair] for pair in dict(
        persistent=bool(agreed["persistent"]),
        queues=len(connections),
        ring_pages=driver._links[0].ring_pages,
        segments=connections[0].max_segments,
        discard=geometry.discard,
        cache="flush" if geometry.flush else "barrier" if geometry.barrier else "none",
        readonly=geometry.readonly,
        sector=geometry.sector_size,
    ).items()]

def held():
    now = runtime.hv.held()
    return [now.granted_pages, now.mapped_pages, now.ports]
"""


class Blkfront:
    """Linux's front end, loaded anew with other parameters for each setup."""

    name = "Linux xen-blkfront"
    parameters: Mapping[str, str] = {
        "num_queues": "max_queues",
        "ring_page_order": "max_ring_page_order",
        "persistent": "feature_persistent",
        "indirect_segments": "max_indirect_segments",
    }
    # What the two writes, errors of Linux's block layer, say.
    readonly_error, sector_error, discard_error = "EPERM", "EINVAL", "EOPNOTSUPP"

    def __init__(self, guest: PythonGuest) -> None:
        self.guest = guest

    async def start(self) -> None:
        await self.guest.call(_BLKFRONT, APPEAR)

    async def configure(self, setup: Setup) -> None:
        absent = sorted(set(setup.front) - set(self.parameters))
        if absent:
            raise Impossible(f"xen-blkfront has no parameter for {' and '.join(absent)}")
        values = {**FRONT, **setup.front}
        words = " ".join(f"{parameter}={values[name]}" for name, parameter in self.parameters.items())
        await self.guest.run(
            f"! grep -q ^xen_blkfront /proc/modules || rmmod xen_blkfront; modprobe xen-blkfront {words}"
        )

    async def appear(self, dev: str) -> None:
        await self._until(f"[ -b /dev/{dev} ]")

    async def vanish(self, dev: str) -> None:
        await self._until(f"[ ! -e /dev/{dev} ]")

    async def _until(self, test: str) -> None:
        line = f"for i in $(seq {int(APPEAR * 10)}); do {test} && break; sleep 0.1; done; {test}"
        await self.guest.run(line, APPEAR + 30)


class OurXbd(XbdFront):
    """Ours, in the guest's Python."""

    name = "our xbd"
    readonly_error, sector_error, discard_error = "read-only", "not whole sectors of 4096", "EOPNOTSUPP"

    async def start(self) -> None:
        await super().start()
        await self.guest.call(_XBD, APPEAR)

    async def configure(self, setup: Setup) -> None:
        options = [list(pair) for pair in {**FRONT, **setup.front}.items()]
        await self.guest.call("configure(options)", options=options)


# -- backs


@dataclass
class Target:
    """file: where the bytes are in the end; path: what the back end opens, it or a loop device over it;
    seen: through which of the two dom0 sees what the back end wrote"""

    file: Path
    path: Path
    seen: Path

    def flushes(self) -> int:
        """How many reached the loop device (Documentation/block/stat.rst of Linux, field 16)."""
        return int((Path("/sys/block") / self.path.name / "stat").read_text().split()[15])


@asynccontextmanager
async def _loop(file: Path, setup: Setup, *, cached: bool = True) -> AsyncIterator[Path]:
    words = ["--sector-size", str(setup.sector), *(["--read-only"] if setup.readonly else [])]
    device = Path((await program("losetup", "--find", "--show", *words, str(file))).strip())
    try:
        if not cached:
            (Path("/sys/block") / device.name / "queue/write_cache").write_text("write through")
        yield device
    finally:
        await program("losetup", "--detach", str(device))


class OurXbbd:
    """`xenbus serve`, which serves the type xbbd; what differs is in nodes of the device."""

    name = "our xbbd"
    kind = "xbbd"

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def expected(self, setup: Setup) -> Facts:
        return setup.expected()

    @asynccontextmanager
    async def target(self, file: Path, setup: Setup) -> AsyncIterator[Target]:
        """A file; a loop device, which counts flushes, where these are what is shown."""
        if {feature for feature, _ in setup.shows}.isdisjoint({FLUSH, BARRIER}):
            yield Target(file, file, file)
        else:
            async with _loop(file, setup) as device:
                yield Target(file, device, device)

    async def options(self, setup: Setup, target: Target) -> dict[str, str]:
        values = {**BACK, **setup.back}
        return {option.key: str(values[option.name]) for option in OPTIONS}

    async def facts(self, paths: DevicePaths, nodes: Mapping[str, str]) -> tuple[Facts, dict[str, int]]:
        """And its counters."""
        async with await XenHost.open(run=self.daemon.run) as host:
            domain = await host.find("Domain-0")
            leaves = dict(await host.ask(domain.name, "sysctl", name=""))
        (unit,) = {
            name.rpartition(".")[0]
            for name, value in leaves.items()
            if name.endswith(".xenstore_path") and value and paths.back.endswith(str(value))
        }
        found = {name.removeprefix(f"{unit}."): value for name, value in leaves.items()}
        queues = int(found["queues"])
        counters = {
            "flushes": int(found["requests_flush_diskcache"]),
            "barriers": int(found["requests_write_barrier"]),
            "discards": int(found["requests_discard"]),
            "indirect": int(found["requests_indirect"]),
            "errors": int(found["errors"]),
        }
        facts = Facts(
            persistent=int(found["persistent_grants"]) > 0,
            queues=queues,
            ring_pages=int(found["ring_pages"]) // queues,
            segments=None,
            discard=None,
            cache=None,
            readonly=nodes["info"] == "4",
            sector=int(nodes["sector-size"]),
        )
        return facts, counters


class LinuxBlkback:
    """Loaded anew with other parameters for each setup, over a loop device."""

    name = "Linux xen-blkback"
    kind = "vbd"

    def expected(self, setup: Setup) -> Facts:
        """A read-only loop device has no cache that could be flushed, and blkback says so."""
        facts = setup.expected()
        return replace(facts, cache="none") if setup.readonly else facts

    @asynccontextmanager
    async def target(self, file: Path, setup: Setup) -> AsyncIterator[Target]:
        values = {**BACK, **setup.back}
        if values["max_indirect_segments"] != BACK["max_indirect_segments"]:
            raise Impossible("xen-blkback always offers 256 indirect segments")
        if values["flush"] != values["barrier"]:
            raise Impossible("xen-blkback offers flush and barrier both or neither")
        parameters = {
            "max_queues": values["max_queues"],
            "max_ring_page_order": values["max_ring_page_order"],
            "max_persistent_grants": values["max_persistent_grants"] or BACK["max_persistent_grants"],
            "feature_persistent": int(values["max_persistent_grants"] > 0),
        }
        async with _loop(file, setup, cached=bool(values["flush"])) as device:
            await program("modprobe", "xen-blkback", *(f"{name}={n}" for name, n in parameters.items()))
            try:
                yield Target(file, device, file)
            finally:
                await program("modprobe", "-r", "xen-blkback")

    async def options(self, setup: Setup, target: Target) -> dict[str, str]:
        number = (await program("stat", "-c", "%t:%T", str(target.path))).strip()
        return {
            "physical-device": number,
            "physical-device-path": str(target.path),
            "discard-enable": str({**BACK, **setup.back}["discard"]),
        }

    async def facts(self, paths: DevicePaths, nodes: Mapping[str, str]) -> tuple[Facts, dict[str, int]]:
        home = Path(f"/sys/bus/xen-backend/devices/vbd-{paths.front_domid}-{paths.devid}/statistics")
        counts = {path.name: int(path.read_text()) for path in home.iterdir()}
        interrupts = Path("/proc/interrupts").read_text().splitlines()
        counters = {
            "flushes": counts["f_req"],  # of both kinds
            "discards": counts["ds_req"],
            # More sectors than eleven pages have go into one request only if it is indirect.
            "indirect": int(counts["rd_sect"] > counts["rd_req"] * SEGMENTS * 8),
        }
        facts = Facts(
            persistent=None,
            queues=sum("blkif-backend" in line for line in interrupts),
            ring_pages=None,
            segments=None,
            discard=None,
            cache=None,
            readonly=nodes["info"] == "4",
            sector=int(nodes["sector-size"]),
        )
        return facts, counters


Front = Blkfront | OurXbd
Back = OurXbbd | LinuxBlkback


async def nodes(store: Client, home: str) -> dict[str, str]:
    """The values of a device's directory, not of what is below it."""
    return {name: await store.read_str(f"{home}/{name}") for name in await store.directory(home)}


def published(front: Mapping[str, str], back: Mapping[str, str]) -> Facts:
    """What both ends' nodes come to."""
    indirect = int(back.get("feature-max-indirect-segments", 0))
    pages = int(front.get("num-ring-pages", 0)) or 1 << int(front.get("ring-page-order", 0))
    assert sum(name.startswith("ring-ref") for name in front) in (0, pages)  # 0: below queue-N
    queues = int(front.get("multi-queue-num-queues", 1))
    assert sum(name.startswith("queue-") for name in front) == (queues if queues > 1 else 0)
    assert queues <= int(back["multi-queue-max-queues"])
    return Facts(
        persistent=front.get("feature-persistent") == back.get("feature-persistent") == "1",
        queues=queues,
        ring_pages=pages,
        segments=None if indirect else SEGMENTS,  # whether a front uses what is offered it does not write
        discard=None if back.get("feature-discard") == "1" else False,
        cache=None if "1" in (back.get("feature-flush-cache"), back.get("feature-barrier")) else "none",
        readonly=back["info"] == "4",
        sector=int(back["sector-size"]),
    )
