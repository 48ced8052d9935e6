"""Runs in the lab's Python guest, on its console: a line of JSON is a command, a line of JSON its answer.

{"id": 1, "do": "exec", "source": ...}: Python with `await` at its top, in one namespace that stays; the
answer is the value of the last expression. {"id": 1, "do": "shell", "line": ...}: its exit code and output.
Commands run side by side, each as a task of one event loop, so what one starts lives on. Bytes travel as
base64 (`pack`).
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import sys
import traceback

from tests.support.hypervisor_actor import pack, unpack

MARK = "@@"  # of a line that is an answer; all else on the console is somebody's words
ROOM = 64 << 20


class Agent:
    """`namespace` is what the test's source sees and leaves."""

    def __init__(self) -> None:
        self.namespace: dict[str, object] = {"agent": self, "asyncio": asyncio, "__name__": "guest"}
        self._running: set[asyncio.Task[None]] = set()

    def start(self, line: bytes) -> None:
        task = asyncio.create_task(self._answer(line))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, line: bytes) -> None:
        try:
            command = json.loads(line)
        except ValueError:
            print(f"not a command: {line[:200]!r}", flush=True)
            return
        answer: dict[str, object] = {"id": command.get("id")}
        try:
            answer["value"] = pack(await self._do(command))
            text = json.dumps(answer)
        except Exception as error:  # noqa: BLE001 - it goes to the test
            answer |= {"error": type(error).__name__, "said": str(error), "trace": traceback.format_exc()}
            answer["args"] = [arg if isinstance(arg, (str, int)) else repr(arg) for arg in error.args]
            answer.pop("value", None)
            text = json.dumps(answer)
        sys.stdout.write(f"\n{MARK}{text}\n")
        sys.stdout.flush()

    async def _do(self, command: dict[str, object]) -> object:
        if command["do"] == "shell":
            return await shell(str(command["line"]))
        return await self.execute(str(command["source"]), unpack_all(command.get("args")))

    async def execute(self, source: str, args: dict[str, object]) -> object:
        self.namespace.update(args)
        tree = ast.parse(source, "<test>")
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            name = ast.Name("_", ast.Store())
            tree.body[-1] = ast.copy_location(ast.Assign([name], last.value), last)
            ast.fix_missing_locations(tree)
        code = compile(tree, "<test>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waits = eval(code, self.namespace)
        if inspect.iscoroutine(waits):
            await waits
        return self.namespace.pop("_", None) if isinstance(last, ast.Expr) else None


def unpack_all(args: object) -> dict[str, object]:
    return {str(name): unpack(value) for name, value in args.items()} if isinstance(args, dict) else {}


async def shell(line: str) -> list[object]:
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        line,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return [process.returncode, out.decode(errors="replace")]


async def main() -> None:
    agent = Agent()
    reader = asyncio.StreamReader(limit=ROOM)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    print("the agent is up", flush=True)
    while line := await reader.readline():
        if line.strip():
            agent.start(line)


if __name__ == "__main__":
    asyncio.run(main())
