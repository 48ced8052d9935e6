"""Control sockets: what a caller sees of results, errors, progress and ends; what a bad caller can't do."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import stat

import pytest

from xenbus.domain import rpc
from xenbus.domain.rpc import REQUEST_MAX, SUN_PATH_MAX, RemoteError, RpcClient, RpcServer
from xenbus.errors import DeadlineError, LinkDown, NoEntry, UsageError


async def _serve(path, **methods):
    server = RpcServer(methods)
    await server.serve(path)
    return server


def test_a_call_gets_its_result_and_its_progress_in_order(tmp_path):
    async def count(call):
        for i in range(call.number("to")):
            await call.progress(i)
        return "done"

    async def main():
        server = await _serve(tmp_path / "s", count=count)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        seen = []
        async with await RpcClient.connect(tmp_path / "s") as client:
            assert await client.call("count", to=3, progress=seen.append) == "done"
        await server.close()
        assert not (tmp_path / "s").exists()
        return seen

    assert asyncio.run(main()) == [0, 1, 2]


def test_calls_of_one_connection_run_side_by_side(tmp_path):
    async def main():
        gate = asyncio.Event()

        async def wait(call):
            await gate.wait()
            return "waited"

        async def open_gate(call):
            gate.set()

        server = await _serve(tmp_path / "s", wait=wait, open=open_gate)
        async with await RpcClient.connect(tmp_path / "s") as client:
            first = asyncio.create_task(client.call("wait", timeout=5))
            await client.call("open", timeout=5)
            assert await first == "waited"
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (UsageError("no such thing"), UsageError),
        (NoEntry("ENOENT", "READ", "/x"), RemoteError),
        (RuntimeError("bug"), RemoteError),
    ],
)
def test_an_error_keeps_its_kind_and_words(tmp_path, raised, expected):
    async def fail(call):
        raise raised

    async def main():
        server = await _serve(tmp_path / "s", fail=fail)
        async with await RpcClient.connect(tmp_path / "s") as client:
            with pytest.raises(expected) as caught:
                await client.call("fail", timeout=5)
        await server.close()
        return caught.value

    error = asyncio.run(main())
    assert str(raised) in str(error)


@pytest.mark.parametrize("value", [True, "5", None, 1.5])
def test_a_parameter_of_the_wrong_type_is_named(tmp_path, value):
    async def number(call):
        return call.number("n")

    async def main():
        server = await _serve(tmp_path / "s", number=number)
        async with await RpcClient.connect(tmp_path / "s") as client:
            with pytest.raises(UsageError, match="n: int wanted"):
                await client.call("number", timeout=5, n=value)
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"[]\n",
        b'{"method": "x", "params": 3}\n',
        b"\xff\xfe\n",
        b"{}\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=["garbage", "list", "params", "bytes", "empty", "nested"],
)
def test_garbage_is_answered_and_the_connection_lives(tmp_path, line):
    async def echo(call):
        return call.params

    async def main():
        server = await _serve(tmp_path / "s", echo=echo)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        writer.write(line)
        reply = json.loads(await asyncio.wait_for(reader.readline(), 5))
        assert reply["error"]["kind"] == "UsageError"
        writer.write(b'{"id": 7, "method": "echo", "params": {"a": 1}}\n')
        reply = json.loads(await asyncio.wait_for(reader.readline(), 5))
        assert reply == {"id": 7, "result": {"a": 1}}
        writer.close()
        await writer.wait_closed()
        await server.close()

    asyncio.run(main())


def test_an_endless_line_ends_that_connection_and_no_other(tmp_path):
    async def echo(call):
        return "here"

    async def main():
        server = await _serve(tmp_path / "s", echo=echo)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        writer.write(b"x" * (3 * REQUEST_MAX))
        with contextlib.suppress(ConnectionError):  # a reset, where what we sent was not all read
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        async with await RpcClient.connect(tmp_path / "s") as client:
            assert await client.call("echo", timeout=5) == "here"
        await server.close()

    asyncio.run(main())


def test_what_a_call_left_open_goes_with_its_caller(tmp_path):
    async def main():
        gone = asyncio.Event()

        async def hold(call):
            async def give_back():
                gone.set()

            call.on_gone(give_back)

        server = await _serve(tmp_path / "s", hold=hold)
        client = await RpcClient.connect(tmp_path / "s")
        await client.call("hold", timeout=5)
        assert not gone.is_set()
        await client.close()
        await asyncio.wait_for(gone.wait(), 5)
        await server.close()

    asyncio.run(main())


def test_a_server_that_ends_fails_every_waiter_at_once(tmp_path):
    async def main():
        entered = asyncio.Event()

        async def hang(call):
            entered.set()
            await asyncio.Event().wait()

        server = await _serve(tmp_path / "s", hang=hang)
        client = await RpcClient.connect(tmp_path / "s")
        calls = [asyncio.create_task(client.call("hang", timeout=30)) for _ in range(3)]
        await asyncio.wait_for(entered.wait(), 5)
        await asyncio.wait_for(server.close(), 5)
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        await client.close()
        return results

    assert [type(r) for r in asyncio.run(main())] == [LinkDown] * 3


def test_a_deadline_names_what_was_waited_for(tmp_path):
    async def hang(call):
        await asyncio.Event().wait()

    async def main():
        server = await _serve(tmp_path / "s", hang=hang)
        async with await RpcClient.connect(tmp_path / "s") as client:
            with pytest.raises(DeadlineError, match="answer to hang"):
                await client.call("hang", timeout=0.05)
        await server.close()

    asyncio.run(main())


def test_nobody_there_is_said_plainly(tmp_path):
    with pytest.raises(LinkDown, match="nobody answers there"):
        asyncio.run(RpcClient.connect(tmp_path / "none"))


def test_a_path_that_no_socket_can_have_is_said_plainly(tmp_path):
    path = tmp_path / ("x" * SUN_PATH_MAX)
    with pytest.raises(UsageError, match="at most"):
        asyncio.run(RpcClient.connect(path))


def test_out_of_descriptors_it_waits_quietly_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rpc, "ACCEPT_PAUSE", 0.02)

    async def echo(call):
        return "here"

    async def main():
        server = await _serve(tmp_path / "s", echo=echo)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
        caller, taken = socket.socket(socket.AF_UNIX), []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.eventfd(0))
            caller.connect(str(tmp_path / "s"))
            loop = asyncio.get_running_loop()
            await asyncio.sleep(0.2)
            # Timers that breed would have taken every turn of the loop by now.
            assert len(loop._scheduled) < 10
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with await RpcClient.connect(tmp_path / "s") as client:
            assert await client.call("echo", timeout=5) == "here"
        caller.close()
        await server.close()

    asyncio.run(main())
