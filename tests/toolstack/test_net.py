"""Network devices as the toolstack describes them: libxl's nodes, one far side, addresses, numbers."""

import asyncio

import pytest
from tests.support.embedded_store import embedded_store

from xenbus.errors import UsageError
from xenbus.toolstack.devices import DeviceThere, list_devices, remove_device, write_device, write_numbered
from xenbus.toolstack.net import NicSpec, free_devid

MAC = "00:16:3e:11:22:33"


def test_both_halves_are_as_libxl_writes_them():
    spec = NicSpec(5, 1, MAC, bridge="xenbr0", mtu=9000).device()
    assert spec.paths.front == "/local/domain/5/device/vif/1"
    assert spec.paths.back == "/local/domain/0/backend/vif/5/1"
    assert spec.front == {"handle": "1", "mac": MAC, "trusted": "1"} and spec.told == {"mtu": "9000"}
    assert spec.back == {
        "handle": "1",
        "mac": MAC,
        "mtu": "9000",
        "type": "vif",
        "bridge": "xenbr0",
        "xenbus-port": "tap:vif5.1?bridge=xenbr0",
    }
    # The default MTU is not written, and nothing waits for a script that nobody runs.
    plain = NicSpec(5).device()
    assert not {"mtu", "bridge", "script", "hotplug-status"} & set(plain.back) and not plain.told


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({}, "switch:lan"),
        ({"switch": "blue"}, "switch:blue"),
        ({"tap": "mine"}, "tap:mine"),
        ({"tap": "mine?netns=lab&mtu=1400"}, "tap:mine?netns=lab&mtu=1400"),
        ({"bridge": "br0"}, "tap:vif5.0?bridge=br0"),
        ({"capture": "/tmp/a b&c.pcapng"}, "switch:lan?capture=/tmp/a%20b%26c.pcapng"),
        ({"bridge": "br0", "capture": "/tmp/x"}, "tap:vif5.0?bridge=br0&capture=/tmp/x"),
    ],
)
def test_the_far_side(given, target):
    spec = NicSpec(5, **given).device()
    assert spec.back["xenbus-port"] == target and "xenbus-port" not in spec.front


def test_the_guests_own_far_side_and_queues():
    spec = NicSpec(5, front="tap:eth0?mac=guest", queues=4, back_kind="xnb", back_domid=2).device()
    assert spec.front["xenbus-port"] == "tap:eth0?mac=guest"
    assert spec.paths.back == "/local/domain/2/backend/xnb/5/0"
    assert (spec.front["xn-max-queues"], spec.back["xnb-max-queues"]) == ("4", "4")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"bridge": "b", "tap": "t"}, "one far side"),
        ({"tap": "t", "switch": "s"}, "one far side"),
        ({"bridge": "a/b"}, "no name of a network device"),
        ({"bridge": "a?mtu=9"}, "no name"),
        ({"front": "nonsense"}, "no far side"),
        ({"tap": "a\0b"}, "no far side"),
        ({"mac": "00:16:3e"}, "no MAC"),
        ({"mac": ""}, "no MAC"),
        ({"mac": "00:16:3e:11-22-33"}, "no MAC"),
        ({"mac": "ff:ff:ff:ff:ff:ff"}, "group"),
        ({"mtu": 67}, "68 to"),
        ({"mtu": 65522}, "65521"),
        ({"queues": -1}, "1 to 16"),
        ({"queues": 17}, "1 to 16"),
    ],
)
def test_what_makes_no_sense(given, text):
    with pytest.raises(UsageError, match=text):
        NicSpec(5, **given).device()


def test_addresses_are_xens_and_by_chance():
    made = {NicSpec(5).device().front["mac"] for _ in range(200)}
    assert len(made) > 190 and all(mac.startswith("00:16:3e:") for mac in made)
    # The lower half of them is for this: libxl masks with 0x7f.
    assert all(int(mac.split(":")[3], 16) < 0x80 for mac in made)
    spec = NicSpec(5, mac="00-16-3E-AA-BB-CC").device()
    assert spec.front["mac"] == spec.back["mac"] == "00:16:3e:aa:bb:cc"


def test_numbers_and_the_record():
    async def main():
        async with embedded_store(0, 5) as (store, _, _):
            specs = []
            for number in range(3):
                assert await free_devid(store, 5) == number
                specs.append(NicSpec(5, number, switch="s", mtu=1400).device())
                await write_device(store, specs[-1])
            # The guest reads its MTU, and can't write it.
            perms = await store.get_perms(f"{specs[1].paths.front}/mtu")
            assert [str(perm) for perm in perms] == ["n0", "r5"]
            [again] = [spec for spec in await list_devices(store, 5) if spec.paths.devid == 1]
            assert (again.front, again.back, again.told) == (specs[1].front, specs[1].back, {"mtu": "1400"})
            await remove_device(store, specs[1].paths)
            assert await free_devid(store, 5) == 1

    asyncio.run(main())


def test_operators_who_look_for_a_number_at_once_all_find_one():
    async def main():
        async with embedded_store(0, 5) as (store, _, _):

            async def attach():
                async def make():
                    number = await free_devid(store, 5)
                    await asyncio.sleep(0)  # the others look, too
                    return NicSpec(5, number, switch="s").device()

                return (await write_numbered(store, make)).paths.devid

            assert sorted(await asyncio.gather(*(attach() for _ in range(8)))) == list(range(8))

            async def same():
                return NicSpec(5, 3, switch="s").device()

            with pytest.raises(DeviceThere, match="has a vif 3 already"):
                await write_numbered(store, same)

    asyncio.run(main())
