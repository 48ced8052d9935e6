"""A Xen host as the store shows it: whose domains there are, by whom they are seen, which host is meant."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.libxl_nodes import disk, host
from tests.support.store_links import Store

from xenbus.errors import LinkDown, NotFound
from xenbus.toolstack import xenhost
from xenbus.toolstack.xenhost import XenHost
from xenbus.xenstore.client import Client


def on_host(test: Any, nodes: dict[str, str], run: Path = Path("/nonexistent")) -> Any:
    async def main() -> Any:
        store = Store()
        client, _ = await store.link("memory")
        try:
            for path, value in nodes.items():
                await client.write(path, value)
            async with asyncio.timeout(20):
                return await test(XenHost(client, run), client, store)
        finally:
            await client.close()
            await store.close()

    return asyncio.run(main())


def test_domains_are_those_of_the_store():
    async def test(found: XenHost, client: Client, _store: Store) -> None:
        await client.write("/local/domain/12/name", "bad\x1b[2J")
        await client.write("/local/domain/7/vm", "/vm/7")
        infos = await found.domains()
        assert [(info.domid, info.name) for info in infos] == [
            (0, "Domain-0"),
            (5, "guest"),
            (7, "7"),
            (12, "bad\\x1b[2J"),
        ]
        assert (await found.find("guest")).domid == (await found.find("5")).domid == 5
        with pytest.raises(NotFound, match="no domain 'nobody'"):
            await found.find("nobody")

    on_host(test, host())


def test_a_guest_sees_itself():
    async def test(_found: XenHost, client: Client, store: Store) -> None:
        guest = await store.guest(client, 5)
        await client.set_perms("/local/domain", ["n0"])
        for path in ("/local/domain/5", "/local/domain/5/name", "/local/domain/5/domid"):
            await client.set_perms(path, ["n0", "r5"])
        try:
            own = XenHost(guest, Path("/nonexistent"))
            assert [(info.domid, info.name) for info in await own.domains()] == [(5, "guest")]
            assert (await own.ask("guest", "tree"))["domid"] == 5
        finally:
            await guest.close()

    on_host(test, host() | disk(4, 4))


def test_a_store_without_domains_has_none():
    async def test(found: XenHost, client: Client, _store: Store) -> None:
        assert await found.domains() == []

    on_host(test, {})


def test_only_the_store_answers_where_no_daemon_of_ours_is(tmp_path):
    async def test(found: XenHost, client: Client, _store: Store) -> None:
        tree = await found.ask("guest", "tree")
        assert any("vbd-51712" in line for line in tree["lines"])
        one = await found.ask("guest", "sysctl", name="dev.vbd-51712.xenbus_peer_domid")
        assert one == [("dev.vbd-51712.xenbus_peer_domid", 0)]
        with pytest.raises(NotFound, match="unknown oid"):
            await found.ask("guest", "sysctl", name="dev.vbd-5")
        with pytest.raises(LinkDown):
            await found.ask("guest", "counts")
        await client.write("/local/domain/5/name", "a name/with anything")
        with pytest.raises(LinkDown, match="no daemon of ours serves"):
            await found.ask("a name/with anything", "counts")
        await found.domains()
        assert (await found.ask("a name/with anything", "tree"))["domid"] == 5

    on_host(test, host() | disk(4, 4), tmp_path)


def test_which_machine_is_a_xen_domain(monkeypatch, tmp_path):
    monkeypatch.setattr(xenhost, "_SIGNS", (str(tmp_path / "capabilities"),))
    for name in ("XENBUS_STORE", "XENSTORED_PATH", "XENSTORED_RUNDIR"):
        monkeypatch.delenv(name, raising=False)
    assert not xenhost.on_xen()
    for name in ("XENBUS_STORE", "XENSTORED_PATH", "XENSTORED_RUNDIR"):
        with monkeypatch.context() as named:
            named.setenv(name, "/x")
            assert xenhost.on_xen()
    (tmp_path / "capabilities").touch()
    assert xenhost.on_xen()


def test_the_store_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv("XENBUS_STORE", str(tmp_path / "mine"))
    with pytest.raises(LinkDown, match="mine"):
        asyncio.run(XenHost.open())
    monkeypatch.delenv("XENBUS_STORE")
    monkeypatch.setenv("XENSTORED_PATH", str(tmp_path / "libxenstore"))
    with pytest.raises(LinkDown, match="libxenstore"):
        asyncio.run(XenHost.open())
