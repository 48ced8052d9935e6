"""What a toolstack's nodes turn on and off: each feature both ways, against a real front end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.raw_vbd import RawFront
from tests.support.until import until
from tests.support.vbd import rig

from xenbus.bus import XenbusState
from xenbus.drivers.block import DiskError, Xbbd, Xbd, blkif
from xenbus.drivers.block.blkif import Op
from xenbus.drivers.block.xbbd_options import OPTIONS, Options
from xenbus.errors import UsageError

NOTHING = {option.key: None for option in OPTIONS}


@given(st.sampled_from(OPTIONS), st.integers(0, 1 << 65))
def test_a_node_is_taken_in_its_range_and_named_outside_of_it(option, value):
    said = NOTHING | {option.key: b"%d" % value}
    if option.least <= value <= option.most:
        found = Options.of(Xbbd, "backend/vbd/1/51712", said)
        assert getattr(found, option.name) == value
        rest = [o.name for o in OPTIONS if o is not option]
        assert all(getattr(found, name) == getattr(Xbbd, name) for name in rest)
    else:
        with pytest.raises(UsageError, match=f"backend/vbd/1/51712/{option.key}: "):
            Options.of(Xbbd, "backend/vbd/1/51712", said)


@given(st.sampled_from(OPTIONS), st.binary(max_size=12))
def test_a_node_that_is_no_number(option, raw):
    if raw.isdigit():
        return
    with pytest.raises(UsageError, match=option.key):
        Options.of(Xbbd, "backend", NOTHING | {option.key: raw})


def test_the_page_for_operators_has_every_one():
    page = Path(__file__).parents[3].joinpath("docs", "block.md").read_text()
    for option in OPTIONS:
        default = int(getattr(Xbbd, option.name))
        assert f"| `{option.key}` | {option.least} to {option.most} | {default} |" in page


# node -> value, the feature that xbd sees, its value with the node, and without
SWITCHES = {
    "xbbd-max-queues": ("1", "queues", 1, 2),
    "xbbd-max-ring-page-order": ("0", "ring-page-order", 0, 1),
    "xbbd-max-persistent-grants": ("0", "persistent", 0, 1),
    "xbbd-max-indirect-segments": ("0", "indirect-segments", 0, 256),
    "xbbd-flush": ("0", "flush", 0, 1),
    "xbbd-barrier": ("0", "barrier", 0, 1),
    "discard-enable": ("0", "discard", 0, 1),
}


@pytest.mark.parametrize("key", [None, *SWITCHES])
def test_each_on_and_off(key):
    """The rest stays as it is, and the disk works whatever is off."""

    async def run():
        async with rig(front=type("Xbd", (Xbd,), {"num_queues": 2})) as r:
            await r.plug("memory:1M", **({key: SWITCHES[key][0]} if key else {}))
            await r.connected()
            agreed, disk = r.front_dev.features, r.disk
            for node, (_, feature, off, on) in SWITCHES.items():
                assert agreed[feature] == (off if node == key else on), feature
            assert r.front.sysctl()["queues"]() == r.back.sysctl()["queues"]() == agreed["queues"]
            data = bytes(range(256)) * 1024
            await disk.write(4096, data)
            assert await disk.read(4096, len(data)) == data
            assert (r.back._grants.pages > 0) == bool(agreed["persistent"])
            assert (r.back.counters.requests[Op.INDIRECT] > 0) == bool(agreed["indirect-segments"])
            await disk.flush()
            flushes = r.back.counters.requests
            assert flushes[Op.FLUSH_DISKCACHE if agreed["flush"] else Op.WRITE_BARRIER] == 1
            for call, feature in ((disk.write_barrier, "barrier"), (disk.discard, "discard")):
                arguments = (0, bytes(512)) if feature == "barrier" else (0, 4096)
                if agreed[feature]:
                    await call(*arguments)
                else:
                    with pytest.raises(DiskError, match=f"feature-{feature}"):
                        await call(*arguments)
            await r.gone()

    asyncio.run(run())


def test_neither_flush_nor_barrier_is_a_disk_without_a_cache():
    async def run():
        async with rig() as r:
            await r.plug("memory:1M", **{"xbbd-flush": "0", "xbbd-barrier": "0"})
            await r.connected()
            await r.disk.write(0, bytes(512))
            await r.disk.flush()
            requests = r.back.counters.requests
            assert requests[Op.FLUSH_DISKCACHE] == requests[Op.WRITE_BARRIER] == 0

    asyncio.run(run())


def test_an_option_that_makes_no_sense_ends_the_device_with_a_word_on_it():
    async def run():
        async with rig() as r:
            await r.plug("memory:1M", **{"xbbd-max-queues": "17"})
            async with asyncio.timeout(5):
                while "xbbd-max-queues: 17, 1 to 16" not in await r.error_of(r.bnode):  # noqa: ASYNC110
                    await asyncio.sleep(0.002)

    asyncio.run(run())


def test_what_was_not_offered_is_not_done():
    off = dict.fromkeys(("xbbd-max-indirect-segments", "xbbd-flush", "xbbd-barrier", "discard-enable"), "0")

    async def run():
        async with rig(front=RawFront) as r:
            await r.plug("memory:1M", **off)
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev, back_dev = r.front_dev, r.back_dev
            await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
            front, abi = r.front, r.front.abi
            front.data.view[:4096] = b"w" * 4096
            front.put(Op.FLUSH_DISKCACHE, 1, 0)
            front.put(Op.WRITE_BARRIER, 2, 0, front.word(0))
            front.put(Op.WRITE_BARRIER, 3, 0)
            front.put_raw(abi.discard.pack(Op.DISCARD, 0, 0, 4, 0, 8))
            front.put_raw(abi.indirect.pack(Op.INDIRECT, Op.WRITE, 1, 5, 0, 0, front.data.refs[1], *(0,) * 7))
            front.put(Op.READ, 6, 0, front.word(2))
            front.push()
            statuses = {ident: status for ident, _, status in await front.answered(6)}
            assert statuses == dict.fromkeys(range(1, 6), blkif.BLKIF_RSP_EOPNOTSUPP) | {
                6: blkif.BLKIF_RSP_OKAY
            }
            assert front.data.view[2 * 4096 : 3 * 4096] == bytes(4096)
            assert r.back.sysctl()["last_error"]() == "INDIRECT, which was not offered"
            await r.gone()

    asyncio.run(run())
