"""blkif.h as bytes: offsets as a C compiler gives them for x86_64 and i386, and the vdev numbers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import ABIS, ARM, X86_32, X86_64, Op
from xenbus.errors import PeerError, UsageError
from xenbus.ring.shared import ring_size

# offsetof() and sizeof() of the structures of blkif.h: gcc -m64 and -m32.
GOLDEN = {
    X86_64: {
        "rw": {
            "operation": 0,
            "nr_segments": 1,
            "handle": 2,
            "id": 8,
            "sector_number": 16,
            "seg": 24,
            "size": 112,
        },
        "discard": {"flag": 1, "handle": 2, "id": 8, "sector_number": 16, "nr_sectors": 24, "size": 32},
        "indirect": {
            "indirect_op": 1,
            "nr_segments": 2,
            "id": 8,
            "sector_number": 16,
            "handle": 24,
            "grefs": 28,
        },
        "response": {"id": 0, "operation": 8, "status": 10, "size": 16},
    },
    X86_32: {
        "rw": {
            "operation": 0,
            "nr_segments": 1,
            "handle": 2,
            "id": 4,
            "sector_number": 12,
            "seg": 20,
            "size": 108,
        },
        "discard": {"flag": 1, "handle": 2, "id": 4, "sector_number": 12, "nr_sectors": 20, "size": 28},
        "indirect": {
            "indirect_op": 1,
            "nr_segments": 2,
            "id": 4,
            "sector_number": 12,
            "handle": 20,
            "grefs": 24,
        },
        "response": {"id": 0, "operation": 8, "status": 10, "size": 12},
    },
}
ID, SECTOR, COUNT = 0x1122334455667788, 0x99AABBCCDDEEFF01, 0x0203040506070809


def at(data: bytes, offset: int, form: str) -> int:
    return struct.unpack_from("<" + form, data, offset)[0]


@pytest.mark.parametrize("abi", GOLDEN, ids=lambda abi: abi.name)
def test_request(abi):
    golden = GOLDEN[abi]["rw"]
    slot = bytearray(abi.request_size)
    abi.rw.pack_into(slot, 0, Op.WRITE, 11, 0xCA00, ID, SECTOR)
    abi.words[11].pack_into(slot, abi.segments_at, *(blkif.segment_word(n + 5, 1, 6) for n in range(11)))
    assert len(slot) == golden["size"] == golden["seg"] + 11 * 8
    assert at(slot, golden["operation"], "B") == 1
    assert at(slot, golden["nr_segments"], "B") == 11
    assert at(slot, golden["handle"], "H") == 0xCA00
    assert at(slot, golden["id"], "Q") == ID
    assert at(slot, golden["sector_number"], "Q") == SECTOR
    for n in range(11):
        assert blkif.SEGMENT.unpack_from(slot, golden["seg"] + 8 * n) == (n + 5, 1, 6)
    assert abi.head.unpack_from(slot) == (1, 11, ID)


@pytest.mark.parametrize("abi", GOLDEN, ids=lambda abi: abi.name)
def test_discard(abi):
    golden = GOLDEN[abi]["discard"]
    slot = abi.discard.pack(Op.DISCARD, blkif.BLKIF_DISCARD_SECURE, 7, ID, SECTOR, COUNT)
    assert len(slot) == golden["size"] <= abi.request_size
    assert at(slot, 0, "B") == 5
    assert at(slot, golden["flag"], "B") == 1
    assert at(slot, golden["handle"], "H") == 7
    assert at(slot, golden["id"], "Q") == ID
    assert at(slot, golden["sector_number"], "Q") == SECTOR
    assert at(slot, golden["nr_sectors"], "Q") == COUNT
    assert abi.head.unpack_from(slot) == (5, 1, ID)


@pytest.mark.parametrize("abi", GOLDEN, ids=lambda abi: abi.name)
def test_indirect(abi):
    golden = GOLDEN[abi]["indirect"]
    slot = abi.indirect.pack(Op.INDIRECT, Op.READ, 0x0102, ID, SECTOR, 9, *range(100, 108))
    assert len(slot) == golden["grefs"] + 32 <= 64
    assert at(slot, 0, "B") == 6
    assert at(slot, golden["indirect_op"], "B") == 0
    assert at(slot, golden["nr_segments"], "H") == 0x0102
    assert at(slot, golden["id"], "Q") == ID
    assert at(slot, golden["sector_number"], "Q") == SECTOR
    assert at(slot, golden["handle"], "H") == 9
    assert [at(slot, golden["grefs"] + 4 * n, "I") for n in range(8)] == list(range(100, 108))


@pytest.mark.parametrize("abi", GOLDEN, ids=lambda abi: abi.name)
def test_response(abi):
    golden = GOLDEN[abi]["response"]
    slot = abi.response.pack(ID, Op.FLUSH_DISKCACHE, blkif.BLKIF_RSP_EOPNOTSUPP)
    assert len(slot) == golden["size"] == abi.response_size
    assert at(slot, golden["id"], "Q") == ID
    assert at(slot, golden["operation"], "B") == 3
    assert at(slot, golden["status"], "h") == -2


def test_ring_has_32_slots_a_page_in_either_abi():
    assert [ring_size(abi.request_size, 4096) for abi in (X86_64, X86_32)] == [32, 32]


def test_abi_by_name():
    assert blkif.abi_of("x86_32-abi") is X86_32
    assert blkif.abi_of("x86_64-abi") is X86_64
    assert blkif.abi_of("arm-abi") is ARM
    assert blkif.abi_of("") is blkif.NATIVE
    assert ABIS["arm-abi"].rw is X86_64.rw
    with pytest.raises(PeerError, match="powerpc64-abi"):
        blkif.abi_of("powerpc64-abi")


def test_a_run_of_pages_is_a_run_of_words():
    words = [at(blkif.SEGMENT.pack(40 + n, 0, 7), 0, "Q") & blkif.SEGMENT_WORD_MASK for n in range(9)]
    assert words == [blkif.segment_word(40 + n) for n in range(9)]
    assert words == list(range(blkif.WHOLE_PAGE + 40, blkif.WHOLE_PAGE + 49))


def test_pages_of_descriptors():
    assert [blkif.indirect_pages(n) for n in (1, 512, 513, 4096)] == [1, 1, 2, 8]


@pytest.mark.parametrize(
    ("name", "vdev", "unit"),
    [
        ("xvda", 51712, 0),
        ("xvda1", 51713, 0),
        ("xvdb", 51728, 1),
        ("xvdp15", 51967, 15),
        ("xvdq", (1 << 28) | (16 << 8), 16),
        ("xvda16", (1 << 28) | 16, 0),
        ("xvdtq37", (1 << 28) | (536 << 8) | 37, 536),
        ("sda", 2048, 0),
        ("sdb3", 2067, 1),
        ("hda", 768, 0),
        ("hdb", 832, 1),
        ("hdc2", 5634, 2),
        ("hdd", 5696, 3),
    ],
)
def test_names_and_numbers(name, vdev, unit):
    assert blkif.vdev_number(name) == vdev
    assert blkif.vdev_name(vdev) == name
    assert blkif.vdev_unit(vdev) == unit


def test_other_spellings():
    assert blkif.vdev_number("d0") == blkif.vdev_number("d0p0") == 51712
    assert blkif.vdev_number("d536p37") == blkif.vdev_number("xvdtq37")
    assert blkif.vdev_number("51712") == blkif.vdev_number("0xca00") == 51712


@pytest.mark.parametrize(
    "name",
    ["", "xvd", "xvda0", "xvda256", "sdq", "hde", "vda", "xvdA", "-1", "1e3", "d", "d01", "xvdzzzzz", "٣"],
)
def test_names_that_are_none(name):
    with pytest.raises(UsageError):
        blkif.vdev_number(name)


@pytest.mark.parametrize("vdev", [-1, 0, 1, 2 << 28, 999, 4 << 8])
def test_numbers_that_are_none(vdev):
    with pytest.raises(UsageError):
        blkif.vdev_name(vdev)


@given(disk=st.integers(0, (1 << 20) - 1), partition=st.integers(0, 255))
def test_every_xvd_has_a_name_and_back(disk, partition):
    vdev = blkif.vdev_number(f"d{disk}p{partition}")
    assert blkif.vdev_number(blkif.vdev_name(vdev)) == vdev
    assert blkif.vdev_parts(vdev) == ("xvd", disk, partition)
