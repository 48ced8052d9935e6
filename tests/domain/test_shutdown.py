"""control/shutdown as a guest obeys it: words, garbage, acknowledgement, features, the end of it."""

import asyncio
import contextlib

import pytest
from tests.support.until import until

from xenbus.domain.shutdown import ShutdownWatcher
from xenbus.errors import PeerError
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon

HOME = "/local/domain/7"
NODE = f"{HOME}/control/shutdown"


class Guest:
    """Domain 7 with a watcher; `heard` is what it obeyed."""

    def __init__(self, daemon, tool, store):
        self.daemon, self.tool, self.store = daemon, tool, store
        self.heard = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail = None
        self.watcher = ShutdownWatcher(
            {word: self._handler(word) for word in ("suspend", "poweroff", "reboot")}
        )

    def _handler(self, word):
        async def obey():
            self.heard.append(word)
            await self.gate.wait()
            if self.fail is not None:
                raise self.fail

        return obey

    async def ask(self, word):
        await self.tool.write(NODE, word)
        await self.tool.wait_for(NODE, lambda value: value == b"", 5.0)


def run(test, control=True):
    async def main():
        daemon = Daemon()
        async with (
            await Client.connect(daemon.connect_local(0)) as tool,
            await Client.connect(daemon.connect_local(7)) as store,
        ):
            await tool.mkdir(HOME)
            await tool.set_perms(HOME, ["n0", "r7"])
            if control:
                for leaf in ("shutdown", "feature-suspend", "feature-poweroff", "feature-reboot"):
                    await tool.write(f"{HOME}/control/{leaf}", "")
                    await tool.set_perms(f"{HOME}/control/{leaf}", ["n7"])
            guest = Guest(daemon, tool, store)
            try:
                await test(guest)
            finally:
                guest.gate.set()
                await guest.watcher.stop()
                assert store.closed or store.counts()["watches"] == 0
        await daemon.close()
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    asyncio.run(main())


def test_features_are_announced_and_words_obeyed_in_order():
    async def test(guest):
        await guest.watcher.start(guest.store)
        for word in ("suspend", "poweroff", "reboot"):
            assert await guest.tool.read(f"{HOME}/control/feature-{word}") == b"1"
        for word in ("suspend", "reboot", "poweroff"):
            await guest.ask(word)
        await until(lambda: guest.heard == ["suspend", "reboot", "poweroff"])

    run(test)


def test_a_word_that_waited_before_the_guest_came_is_obeyed():
    async def test(guest):
        await guest.tool.write(NODE, "poweroff")
        await guest.watcher.start(guest.store)
        await until(lambda: guest.heard == ["poweroff"])

    run(test)


def test_the_acknowledgement_comes_before_the_deed():
    async def test(guest):
        guest.gate.clear()
        await guest.watcher.start(guest.store)
        await guest.ask("suspend")  # returns: the node is empty though the handler still runs
        await until(lambda: guest.heard == ["suspend"])
        await guest.tool.write(NODE, "poweroff")  # waits for its turn
        assert guest.heard == ["suspend"]
        guest.gate.set()
        await until(lambda: guest.heard == ["suspend", "poweroff"])

    run(test)


@pytest.mark.parametrize("word", ["dance", "POWEROFF", "poweroff!", "\x00\xff", "x" * 4000, "suspendx"])
def test_a_word_that_is_none_is_acknowledged_and_does_nothing(word, caplog):
    async def test(guest):
        await guest.watcher.start(guest.store)
        await guest.ask(word.encode("latin1"))
        await guest.ask("reboot")
        await until(lambda: guest.heard)
        assert guest.heard == ["reboot"]

    run(test)
    assert "nothing that this domain does" in caplog.text
    assert len(caplog.text) < 1000


@pytest.mark.parametrize(("word", "obeyed"), [("halt", "poweroff"), (" poweroff\n", "poweroff")])
def test_synonyms_and_blanks(word, obeyed):
    async def test(guest):
        await guest.watcher.start(guest.store)
        await guest.ask(word)
        await until(lambda: guest.heard == [obeyed])

    run(test)


@pytest.mark.parametrize("error", [PeerError("no"), RuntimeError("bug")])
def test_a_handler_that_fails_is_logged_and_the_next_word_is_obeyed(error, caplog):
    async def test(guest):
        guest.fail = error
        await guest.watcher.start(guest.store)
        await guest.ask("suspend")
        await until(lambda: guest.heard == ["suspend"])
        guest.fail = None
        await guest.ask("reboot")
        await until(lambda: guest.heard == ["suspend", "reboot"])

    run(test)
    assert "control/shutdown" in caplog.text


def test_a_toolstack_that_made_no_control_directory_gets_no_features_and_is_no_trouble(caplog):
    async def test(guest):
        await guest.watcher.start(guest.store)
        assert not await guest.tool.exists(f"{HOME}/control")

    run(test, control=False)
    assert "features not announced" in caplog.text


def test_a_node_that_is_removed_is_no_request():
    async def test(guest):
        await guest.watcher.start(guest.store)
        await guest.ask("suspend")
        await guest.tool.rm(f"{HOME}/control")
        await guest.tool.write(NODE, "")
        await guest.tool.set_perms(NODE, ["n7"])
        await guest.ask("reboot")
        await until(lambda: guest.heard == ["suspend", "reboot"])

    run(test)


def test_stop_gives_up_what_is_being_obeyed_and_hears_nothing_more():
    async def test(guest):
        guest.gate.clear()
        await guest.watcher.start(guest.store)
        await guest.ask("suspend")
        await until(lambda: guest.heard == ["suspend"])
        await guest.watcher.stop()
        await guest.tool.write(NODE, "poweroff")
        guest.gate.set()
        await guest.store.directory("control")  # an event on its way would have come before this
        assert guest.heard == ["suspend"]
        assert await guest.tool.read(NODE) == b"poweroff"

    run(test)


def test_a_lost_store_ends_nothing_but_the_watch():
    async def test(guest):
        await guest.watcher.start(guest.store)
        with contextlib.suppress(ConnectionError):
            guest.daemon.domain_died(7)
        await until(lambda: guest.store.closed)
        await guest.watcher.stop()

    run(test)
