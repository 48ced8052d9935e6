"""`xenbus store record`, `decode` and `replay`: what programs and a store say to each other.

Knows the relay, transcripts and reruns of the store's room.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xenbus.cli.context import DIR_VARIABLE, STORE_VARIABLE, answering, emit, emit_line, json_option
from xenbus.cli.exits import Exit
from xenbus.cli.values import escaped, jsonable
from xenbus.errors import UsageError

if TYPE_CHECKING:
    from xenbus.xenstore.transcript import Line
    from xenbus.xenstore.transport import Pipe, Transport
    from xenbus.xenstore.transport.recording import Record, Tape


# ---- record ----


def record(file: Path, where: str, listen: Path | None, command: tuple[str, ...]) -> int:
    """Records what passes between COMMAND, or whoever connects to `listen`, and the store. The command's
    exit code."""
    import asyncio
    import contextlib
    import tempfile

    from xenbus.xenstore.transport.recording import Tape

    if not command and listen is None:
        raise UsageError("record: give a command to run, or --listen PATH for whoever connects")
    try:
        tape = Tape(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    try:
        with contextlib.ExitStack() as stack:
            if listen is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="xenbus-record-"))
                listen = Path(folder) / "socket"
            code = asyncio.run(_record(tape, where, listen, command))
    finally:
        tape.close()
    full = " (it is full: the rest was not recorded)" if tape.full else ""
    click.echo(f"{file}: {tape.messages} messages of {tape.connections} connections{full}", err=True)
    return code


async def _record(tape: Tape, where: str, listen: Path, command: tuple[str, ...]) -> int:
    import asyncio

    from xenbus.xenstore.relay import Relay
    from xenbus.xenstore.transport import resolve

    scheme, rest = resolve(where)

    def dial() -> Transport:
        return scheme.connect(rest)

    with answering(where):
        dial().close()
    relay = Relay(tape, dial)
    relay.listen(listen)
    try:
        if command:
            return await _run(command, listen)
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        click.echo("ready")
        await ended.wait()
        return 0
    finally:
        await relay.close()


async def _run(command: tuple[str, ...], listen: Path) -> int:
    import asyncio
    import contextlib

    environment = os.environ | {"XENSTORED_PATH": str(listen), STORE_VARIABLE: str(listen)}
    environment.pop(DIR_VARIABLE, None)  # by which our own commands would pass the recorder by
    if listen.name == "socket":
        environment["XENSTORED_RUNDIR"] = str(listen.parent)
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as error:
        raise UsageError(f"{command[0]}: {error.strerror}") from None

    def pass_on(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    # The end is the command's to decide: it may have more to say to the store. A terminal's
    # Ctrl-C is sent to it as well.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, pass_on, number)
    code = await process.wait()
    return code if code >= 0 else 128 - code


# ---- decode ----


def read(file: Path) -> Iterator[Record]:
    from xenbus.xenstore.transport.recording import read_recording

    try:
        yield from read_recording(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: no recording") from None


def decode(file: Path, as_json: bool) -> None:
    from xenbus.xenstore.transcript import explain

    for line in explain(read(file)):
        emit_line(_data(line), as_json, "" if as_json else _sentence(line))


def _sentence(line: Line) -> str:
    record = line.record
    message = record.message
    arrow = ">" if record.outgoing else "<"
    inside = f" in transaction {message.tx_id}" if message.tx_id and record.outgoing else ""
    head = f"{record.seconds:11.6f} {record.connection} {arrow} {message.req_id or '-':>4} "
    return head + _what(line) + inside


def _what(line: Line) -> str:
    subject = _subject(line.asked) if line.asked is not None else line.op
    if line.raw is not None:
        return f"{line.op if line.kind == 'request' else subject}: malformed: {_quoted(line.raw)}"
    if line.kind == "request":
        if "commit" in line.arguments:
            return f"{line.op} {'commit' if line.arguments['commit'] else 'abort'}"
        rest = [_shown(value) for name, value in line.arguments.items() if name != "path"]
        return " ".join([_subject(line), *rest])
    if line.kind == "event":
        return f"event {_shown(line.arguments['path'])} token {_shown(line.arguments['token'])}"
    if line.kind == "error":
        return f"{subject}: {_shown(line.error)}"
    return f"{subject}: {'OK' if line.result is None else _shown(line.result)}"


def _subject(line: Line) -> str:
    return f"{line.op} {_shown(line.arguments['path'])}" if "path" in line.arguments else line.op


def _quoted(value: bytes) -> str:
    return f'"{escaped(value)}"'


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return _quoted(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == []:
        return "(none)"
    if isinstance(value, (list, tuple)):
        return " ".join(str(one) if hasattr(one, "access") else _shown(one) for one in value)
    return escaped(str(value).encode("utf-8", "surrogateescape"))


def _data(line: Line) -> dict[str, Any]:
    record = line.record
    found: dict[str, Any] = {
        "seconds": round(record.seconds, 6),
        "connection": record.connection,
        "kind": line.kind,
        "op": line.op,
        "req_id": record.message.req_id,
        "tx_id": record.message.tx_id,
    }
    if line.arguments:
        found["arguments"] = {name: _jsonable(value) for name, value in line.arguments.items()}
    if line.kind == "reply" and line.raw is None:
        found["result"] = _jsonable(line.result)
    if line.error:
        found["error"] = line.error
    if line.raw is not None:
        found["payload"] = jsonable(line.raw)
    if line.asked is not None:
        found["took"] = round(line.took, 6)
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return jsonable(value)
    if isinstance(value, (list, tuple)):
        # A permission is a tuple, too, and is written as the store writes it.
        return [str(one) if hasattr(one, "access") else _jsonable(one) for one in value]
    return value


# ---- replay ----


def replay(file: Path, where: str, as_json: bool) -> int:
    from xenbus.xenstore.rerun import rerun
    from xenbus.xenstore.transcript import explain
    from xenbus.xenstore.transport import resolve

    records = list(read(file))
    scheme, rest = resolve(where)
    connect = scheme.pipe

    def dial() -> Pipe:
        with answering(where):
            return connect(rest)

    compared, difference = rerun(records, dial)
    if difference is None:
        emit({"answers": compared, "difference": None}, as_json, f"{compared} answers, all the same")
        return Exit.OK
    place = next(n for n, record in enumerate(records) if record is difference.record)
    lines = list(explain(records))
    recorded, got = lines[place], None
    if difference.got is not None:
        other = type(difference.record)(0.0, False, difference.got, difference.record.connection)
        asked = [recorded.asked.record] if recorded.asked is not None else []
        got = list(explain([*asked, other]))[-1]
    came = "it closed the connection" if difference.closed else "nothing came" if got is None else _what(got)
    emit(
        {
            "answers": compared,
            "difference": {
                "message": place + 1,
                "recorded": _data(recorded),
                "got": None if got is None else _said(got),
                "closed": difference.closed,
            },
        },
        as_json,
        f"{compared} answers are the same; message {place + 1} is not:\n"
        f"recorded: {_what(recorded)}\n     now: {came}",
    )
    return Exit.FAILED


def _said(line: Line) -> dict[str, Any]:
    return {name: value for name, value in _data(line).items() if name not in ("seconds", "took")}


# ---- the commands ----


def add_to(group: click.Group, target_address: Callable[[Any], Any]) -> None:
    """`record`, `decode` and `replay`; `target_address` gives a command --dir and --socket as `where`."""

    @group.command("record", context_settings={"ignore_unknown_options": False})
    @click.argument("file", type=click.Path(path_type=Path))
    @click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
    @click.option(
        "--listen",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="Serve there until SIGTERM or SIGINT.",
    )
    @target_address
    @click.pass_context
    def record_command(
        context: click.Context, where: str, file: Path, command: tuple[str, ...], listen: Path | None
    ) -> None:
        """Record to FILE what programs and the store say to each other: COMMAND's, or theirs who connect.

        COMMAND is run with XENSTORED_PATH, XENSTORED_RUNDIR and XENBUS_STORE (without XENBUS_DIR) such that
        Xen's library, and ours, find the recorder; its exit code is ours. FILE (mode 0600) is a line of JSON
        a message, and holds what the store held.

        \b
        Example:
          xenbus store record tape -- xenstore-ls /local
        """
        context.exit(record(file, where, listen, command))

    @group.command("decode")
    @click.argument("file", type=click.Path(path_type=Path))
    @json_option
    def decode_command(file: Path, as_json: bool) -> None:
        """Print a recording: time, connection, direction, request, and what was said.

        \b
        Example:
          xenbus store decode tape
        """
        decode(file, as_json)

    @group.command("replay")
    @click.argument("file", type=click.Path(path_type=Path))
    @json_option
    @target_address
    @click.pass_context
    def replay_command(context: click.Context, where: str, file: Path, as_json: bool) -> None:
        """Send a recording's requests to a store, and say where it first answers otherwise (exit code 1).

        It writes what was written then. Ids of transactions, generations of lists and answers to CONTROL
        are not compared.

        \b
        Example:
          xenbus store replay tape --socket /run/xenstored/socket
        """
        context.exit(replay(file, where, as_json))
