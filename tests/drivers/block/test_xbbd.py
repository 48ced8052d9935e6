"""xbbd against fronts that lie: each bad input gets an answer that names it, and loses nothing else."""

from __future__ import annotations

import asyncio
import random
import struct
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tests.support.raw_front import ERROR, OKAY, UNSUPPORTED, content, lying, marked, with_raw_front
from tests.support.raw_vbd import RawFront

from xenbus.bus import XenbusState
from xenbus.drivers.block import Xbbd, blkif
from xenbus.drivers.block.blkif import Op
from xenbus.drivers.block.storage.schemes import file
from xenbus.drivers.block.xbbd_grants import Grants
from xenbus.hypervisor.embedded import EmbeddedHypervisor
from xenbus.hypervisor.interface import CopyOp


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk.img"


@pytest.fixture(params=["mapped", "copied"])
def pages(request, monkeypatch):
    """How a front's pages are reached: copied where the hypervisor has that, as the real one does."""
    if request.param == "copied":
        monkeypatch.setattr(EmbeddedHypervisor, "copy_run", copy_run, raising=False)
    return request.param


def copy_run(hv, domid, pieces, region, *, to_remote):
    """PageCopier.copy_run over the embedded hypervisor's own copies."""
    done, at = [], 0
    for ref, offset, length in pieces:
        op = CopyOp(domid, ref, offset, length, region.view[at : at + length], to_remote)
        done.append(hv._copy(op))
        at += length
    return not any(done)


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("abi", [blkif.X86_64, blkif.X86_32], ids=lambda abi: abi.name)
def test_single_sectors_and_scattered_segments(path, abi):
    async def check(r, front):
        data = content()
        front.put(Op.READ, 77, 3, front.word(0, 2, 2))
        # Pages in any order, parts of pages, one page twice.
        front.put(
            Op.READ,
            2**63 + 5,
            100,
            front.word(5, 0, 3),
            front.word(2),
            front.word(5, 4, 7),
            front.word(9, 6, 7),
        )
        front.push()
        assert sorted(await front.answered(2)) == [(77, Op.READ, OKAY), (2**63 + 5, Op.READ, OKAY)]
        view = front.data.view
        assert view[1024:1536] == data[3 * 512 : 4 * 512]
        assert view[5 * 4096 : 5 * 4096 + 2048] == data[51200 : 51200 + 2048]
        assert view[2 * 4096 : 3 * 4096] == data[53248 : 53248 + 4096]
        assert view[5 * 4096 + 2048 : 6 * 4096] == data[57344 : 57344 + 2048]
        assert view[9 * 4096 + 3072 : 10 * 4096] == data[59392 : 59392 + 1024]
        view[:4096] = b"W" * 4096
        front.put(Op.WRITE, 1, 8, front.word(0, 1, 6))
        front.push()
        assert (await front.answered(3))[2] == (1, Op.WRITE, OKAY)
        assert path.read_bytes()[4096 : 4096 + 3072] == b"W" * 3072
        assert path.read_bytes()[4096 + 3072 :] == data[4096 + 3072 :]

    with_raw_front(path, check, front=lying(abi=abi))


class Persistent(RawFront):
    """Keeps its grants, and uses them in any order, as xen-blkfront does."""

    lies: ClassVar[dict[str, object]] = {"feature-persistent": 1}


def test_kept_pages_in_any_order_are_read_and_written_at_once(path, monkeypatch):
    """Nothing of it is left for a task, once the pages are mapped; each page's bytes are in its place."""
    monkeypatch.setattr(file, "SLOW_WRITE", 60.0)  # however busy this machine is

    async def check(r, front):
        view, order = front.data.view, random.Random(3).sample(range(15), 11)
        spawned = []
        for turn in range(2):
            for page in range(15):
                view[page * 4096 : (page + 1) * 4096] = bytes([turn + 1, page]) * 2048
            front.put(Op.WRITE, 1, 800, *map(front.word, order))
            front.push()
            await front.answered(4 * turn + 1)
            written = b"".join(bytes([turn + 1, page]) * 2048 for page in order)
            assert path.read_bytes()[800 * 512 :][: len(written)] == written
            front.put(Op.READ, 2, 800, *map(front.word, reversed(order)))
            front.push()
            await front.answered(4 * turn + 2)
            for page, other in zip(order, reversed(order), strict=True):
                assert view[page * 4096 : (page + 1) * 4096] == bytes([turn + 1, other]) * 2048
            words = [front.word(page) for page in order[:5]]
            view[15 * 4096 : 15 * 4096 + 40] = struct.pack("<5Q", *words)
            for op, ident in ((Op.READ, 3), (Op.WRITE, 4)):
                refs = (front.data.refs[15], *(0,) * 7)
                front.put_raw(front.abi.indirect.pack(Op.INDIRECT, op, 5, ident, 64 * ident, 0, *refs))
                front.push()
                await front.answered(4 * turn + ident)
            assert path.read_bytes()[256 * 512 :][: 5 * 4096] == content()[192 * 512 :][: 5 * 4096]
            if turn == 0:
                r.back._links[0].queue._spawn = spawned.append
        assert {status for _, _, status in front.answers} == {OKAY}
        assert not spawned
        assert r.back.sysctl()["persistent_grants"]() == 12
        # A part of a page, and one that is not there, are not taken for whole pages that are.
        front.put(Op.READ, 9, 0, front.word(1, 0, 8), front.word(0))
        front.push()
        assert (await front.answered(9))[8] == (9, Op.READ, ERROR)

    with_raw_front(path, check, front=Persistent)


def test_a_front_that_needs_more_pages_than_are_kept_is_served_all_the_same(path, monkeypatch):
    monkeypatch.setattr(Xbbd, "max_persistent_grants", 6)

    async def check(r, front):
        view = front.data.view
        for number in range(40):
            pages = random.Random(number).sample(range(16), 4)
            front.put(Op.READ, number, 8 * number, *map(front.word, pages))
            front.push()
            await front.answered(number + 1)
            got = b"".join(view[page * 4096 : (page + 1) * 4096] for page in pages)
            assert got == content()[number * 4096 :][: 4 * 4096]
            assert r.back.sysctl()["persistent_grants"]() <= 6
        assert {status for _, _, status in front.answers} == {OKAY}

    with_raw_front(path, check, front=Persistent)


def test_no_page_is_mapped_where_pages_can_be_copied(path, pages, monkeypatch):
    """What cannot be done at once is mapped all the same: so a write that has to wait for the disk."""

    async def check(r, front):
        mapped = []

        async def map_(hv, domid, refs, **options):
            mapped.append(len(refs))
            return await real_map(hv, domid, refs, **options)

        real_map = EmbeddedHypervisor.map
        monkeypatch.setattr(EmbeddedHypervisor, "map", map_)
        front.data.view[: 2 * 4096] = b"1" * 4096 + b"2" * 4096
        front.put(Op.WRITE, 1, 80, front.word(1), front.word(0))
        front.push()
        await front.answered(1)
        front.put(Op.READ, 2, 0, front.word(3), front.word(2, 0, 0))
        front.push()
        await front.answered(2)
        assert path.read_bytes()[80 * 512 :][:8192] == b"2" * 4096 + b"1" * 4096
        assert front.data.view[3 * 4096 : 4 * 4096] == content()[:4096]
        assert front.data.view[2 * 4096 : 2 * 4096 + 512] == content()[4096:4608]
        assert mapped == ([] if pages == "copied" else [2, 2])
        monkeypatch.setattr(file.FileStorage, "try_writev", lambda *_: False)
        mapped.clear()
        for ident in (3, 4):
            front.put(Op.WRITE, ident, 96, front.word(1))
            front.push()
            await front.answered(ident)
        assert path.read_bytes()[96 * 512 :][:4096] == b"2" * 4096
        assert mapped == [1, 1]
        assert {status for _, _, status in front.answers} == {OKAY}

    monkeypatch.setattr(file, "SLOW_WRITE", 60.0)
    with_raw_front(path, check)


def test_a_page_that_is_being_unmapped_is_found_no_more():
    """Requests are served while the unmapping of a page waits for its turn."""
    seen = []

    async def map_(refs, writable):
        return SimpleNamespace(refs=refs, view=memoryview(bytearray(4096 * len(refs))))

    async def unmap(mapping):
        seen.append([grants.whole_pages([blkif.segment_word(ref)]) for ref in mapping.refs])

    grants = Grants(map_, unmap, 6)

    async def main():
        assert await grants.keep([1, 2, 3])
        assert [len(page) for page in grants.whole_pages([blkif.segment_word(ref) for ref in (3, 1)])] == [
            4096
        ] * 2
        assert await grants.keep([4, 5, 6, 7])
        assert seen == [[None] * 3]
        await grants.close()
        assert seen == [[None] * 3, [None] * 4]

    asyncio.run(main())


BAD = {
    "no segment": (lambda f: f.put(Op.READ, 9, 0), "0 segments"),
    "too many segments": (lambda f: f.put(Op.READ, 9, 0, f.word(0), count=12), "12 segments"),
    "255 segments": (lambda f: f.put(Op.WRITE, 9, 0, f.word(0), count=255), "255 segments"),
    "first after last": (lambda f: f.put(Op.READ, 9, 0, f.word(0, 5, 4)), "sectors 5 to 4"),
    "last beyond the page": (lambda f: f.put(Op.READ, 9, 0, f.word(0, 0, 8)), "sectors 0 to 8"),
    "beyond the disk": (lambda f: f.put(Op.READ, 9, 2047, f.word(0, 0, 1)), "2 sectors at 2047"),
    "far beyond the disk": (lambda f: f.put(Op.WRITE, 9, 2**64 - 1, f.word(0)), f"8 sectors at {2**64 - 1}"),
    "never granted": (lambda f: f.put(Op.READ, 9, 0, blkif.segment_word(54321)), "54321"),
    "never granted write": (lambda f: f.put(Op.WRITE, 9, 0, blkif.segment_word(54321)), "54321"),
    "barrier never granted": (lambda f: f.put(Op.WRITE_BARRIER, 9, 0, blkif.segment_word(54321)), "54321"),
    "discard beyond": (
        lambda f: f.put_raw(f.abi.discard.pack(Op.DISCARD, 0, 0, 9, 2000, 49)),
        "discard of 49",
    ),
    "discard wraps": (
        lambda f: f.put_raw(f.abi.discard.pack(Op.DISCARD, 0, 0, 9, 2**63, 2**63)),
        "discard of",
    ),
    "discard of nothing": (
        lambda f: f.put_raw(f.abi.discard.pack(Op.DISCARD, 0, 0, 9, 0, 0)),
        "discard of 0",
    ),
    "indirect flush": (lambda f: indirect(f, Op.FLUSH_DISKCACHE, 1), "operation 3 in an indirect"),
    "indirect barrier": (lambda f: indirect(f, Op.WRITE_BARRIER, 1), "operation 2 in an indirect"),
    "no indirect segment": (lambda f: indirect(f, Op.READ, 0), "0 indirect"),
    "too many indirect": (lambda f: indirect(f, Op.READ, 257), "257 indirect"),
    "65535 indirect": (lambda f: indirect(f, Op.READ, 65535), "65535 indirect"),
    "descriptors never granted": (lambda f: indirect(f, Op.READ, 1, refs=(4444,)), "4444"),
    "descriptors with nonsense": (lambda f: indirect(f, Op.WRITE, 3, fill=b"\xff"), "sectors 255 to 255"),
}


def indirect(front, op, count, refs=None, fill=None):
    refs = tuple(refs or (front.data.refs[15],))
    if fill:
        front.data.view[15 * 4096 : 16 * 4096] = fill * 4096
    front.put_raw(front.abi.indirect.pack(Op.INDIRECT, op, count, 9, 0, 0, *refs, *(0,) * (8 - len(refs))))


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("what", marked(BAD))
def test_a_bad_request_is_answered_and_the_others_go_on(path, what):
    put, words = BAD[what]

    async def check(r, front):
        front.put(Op.READ, 1, 0, front.word(1))
        put(front)
        front.put(Op.READ, 2, 8, front.word(2))
        front.push()
        answers = {ident: status for ident, _, status in await front.answered(3)}
        assert answers == {1: OKAY, 9: ERROR, 2: OKAY}
        assert front.data.view[4096:12288] == content()[:8192]
        assert path.read_bytes() == content()
        back = r.back.sysctl()
        assert back["errors"]() == 1
        assert words in back["last_error"]()
        assert r.back_dev.state is XenbusState.CONNECTED

    with_raw_front(path, check)


def test_unknown_operations(path):
    async def check(r, front):
        for n, op in enumerate((4, 7, 99, 255)):
            front.put(op, n, 0, front.word(0))
        front.push()
        assert sorted(await front.answered(4)) == [
            (n, op, UNSUPPORTED) for n, op in enumerate((4, 7, 99, 255))
        ]

    with_raw_front(path, check)


def test_writes_to_a_read_only_disk(path):
    async def check(r, front):
        front.put(Op.WRITE, 1, 0, front.word(0))
        front.put(Op.WRITE_BARRIER, 2, 0, front.word(0))
        front.put_raw(front.abi.discard.pack(Op.DISCARD, 0, 0, 3, 0, 8))
        front.put(Op.FLUSH_DISKCACHE, 4, 0)
        front.put(Op.READ, 5, 0, front.word(1))
        front.push()
        answers = {ident: status for ident, _, status in await front.answered(5)}
        assert answers == {1: ERROR, 2: ERROR, 3: UNSUPPORTED, 4: OKAY, 5: OKAY}
        front.put(Op.WRITE, 6, 0, front.word(0))
        front.push()
        await front.answered(6)
        assert r.back.sysctl()["last_error"]() == "a write to a read-only disk"  # before the storage is asked
        assert path.read_bytes() == content()

    with_raw_front(path, check, mode="r")


def test_4096_byte_sectors_are_kept_whole(path):
    async def check(r, front):
        front.put(Op.READ, 1, 4, front.word(0))  # starts in the middle of one
        front.put(Op.READ, 2, 8, front.word(0, 0, 3))  # half of one
        front.put(Op.READ, 3, 8, front.word(1))
        front.push()
        assert {i: s for i, _, s in await front.answered(3)} == {1: ERROR, 2: ERROR, 3: OKAY}
        assert front.data.view[4096:8192] == content()[4096:8192]

    with_raw_front(path, check, sector_size_wanted="4096")


@pytest.mark.usefixtures("pages")
def test_indirect_by_hand(path):
    """One page of descriptors, segments out of order and in parts."""

    async def check(r, front):
        words = [front.word(n) for n in (3, 1, 2)] + [front.word(7, 4, 5)]
        front.data.view[15 * 4096 : 15 * 4096 + 32] = struct.pack("<4Q", *(w | 0xABCD << 48 for w in words))
        indirect(front, Op.READ, 4)
        front.push()
        assert await front.answered(1) == [(9, Op.READ, OKAY)]
        view, data = front.data.view, content()
        assert view[3 * 4096 : 4 * 4096] == data[:4096]
        assert view[4096 : 3 * 4096] == data[4096 : 3 * 4096]
        assert view[7 * 4096 + 2048 : 7 * 4096 + 3072] == data[12288 : 12288 + 1024]

    with_raw_front(path, check)


def test_an_empty_barrier_is_a_flush(path):
    async def check(r, front):
        front.put(Op.WRITE_BARRIER, 1, 0)
        front.put(Op.FLUSH_DISKCACHE, 2, 0)
        front.push()
        assert sorted(await front.answered(2)) == [(1, Op.WRITE_BARRIER, OKAY), (2, Op.FLUSH_DISKCACHE, OKAY)]

    with_raw_front(path, check)


def test_a_disk_that_shrank_under_us(path):
    async def check(r, front):
        with path.open("r+b") as file:
            file.truncate(4096)
        front.put(Op.READ, 1, 0, front.word(0))
        front.put(Op.READ, 2, 1024, front.word(1))
        front.push()
        assert {i: s for i, _, s in await front.answered(2)} == {1: OKAY, 2: ERROR}
        assert "disk.img" in r.back.sysctl()["last_error"]()

    with_raw_front(path, check)


@pytest.mark.usefixtures("pages")
def test_pages_granted_read_only_can_be_written_from(path):
    """A front without persistent grants grants what it wants written for reading only."""

    async def check(r, front):
        given = await front.dev.grant_ring(2, writable=False)
        given.view[:] = b"R" * 8192
        for ident, op, sector, ref in ((1, Op.WRITE, 0, 0), (2, Op.WRITE, 8, 1), (3, Op.READ, 16, 0)):
            front.put(op, ident, sector, blkif.segment_word(given.refs[ref]))
        front.put(Op.READ, 4, 0, front.word(0))
        front.push()
        assert {i: s for i, _, s in await front.answered(4)} == {1: OKAY, 2: OKAY, 3: ERROR, 4: OKAY}
        assert path.read_bytes()[:8192] == b"R" * 8192

    with_raw_front(path, check)
