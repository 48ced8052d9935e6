"""`xenbus store`: what the xenstore-* programs do, and a daemon alone.

Knows the blocking client and the daemon's entry. Any XenStore will do, Xen's own too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xenbus.cli.context import STORE_VARIABLE, answering, dir_option, emit, emit_line, json_option, need_dir
from xenbus.cli.exits import Exit
from xenbus.cli.recordings import add_to
from xenbus.cli.values import escaped, jsonable, unescaped
from xenbus.errors import DeadlineError, UsageError, XenbusError

if TYPE_CHECKING:
    from xenbus.xenstore.sync import SyncClient, Transaction

UPDATE_SECONDS = 60.0  # that a live update may take, whatever it waits for
F = TypeVar("F", bound=Callable[..., Any])


def address(directory: Path | None, socket: Path | None) -> str:
    """Which store is meant: --socket, --dir (a host's, or one of `store serve`), XENBUS_STORE, else as
    libxenstore does."""
    if socket is not None:
        return str(socket)
    if directory is not None:
        alone = directory / "socket"
        host = directory / "xenstored" / "socket"
        return str(alone if alone.exists() and not host.exists() else host)
    from xenbus.xenstore.transport import default_address

    return os.environ.get(STORE_VARIABLE) or default_address()


def address_options(command: F) -> F:
    """--dir and --socket, handed over as `where: str`."""
    import functools

    @functools.wraps(command)
    def wrapped(*args: Any, directory: Path | None, socket: Path | None, **kwargs: Any) -> Any:
        return command(*args, where=address(directory, socket), **kwargs)

    option = click.option(
        "--socket", metavar="PATH", type=click.Path(path_type=Path), help="The store's socket or device."
    )
    return dir_option(option(wrapped))  # type: ignore[return-value]


def target_options(command: F) -> F:
    """--dir and --socket, handed over as `connect: Callable[[], SyncClient]`."""
    import functools

    @functools.wraps(command)
    def wrapped(*args: Any, where: str, **kwargs: Any) -> Any:
        return command(*args, connect=lambda: _connect(where), **kwargs)

    return address_options(wrapped)  # type: ignore[return-value]


def _connect(where: str) -> SyncClient:
    from xenbus.xenstore.sync import SyncClient

    with answering(where):
        return SyncClient.connect(where)


def _perms(client: SyncClient, path: str) -> list[str]:
    return [str(perm) for perm in client.get_perms(path)]


# Commands


@click.group("store", short_help="Read, write and watch a XenStore, or serve one.")
def command() -> None:
    """Read, write and watch a XenStore, or serve one.

    Without --dir and --socket the store is found as Xen's own tools find it: XENSTORED_PATH,
    XENSTORED_RUNDIR/socket, /dev/xen/xenbus.

    \b
    Example:
      xenbus store ls -f --dir /tmp/host /local/domain
    """


@command.command("ls")
@click.argument("path", default="/")
@click.option("-f", "full", is_flag=True, help="Print whole paths instead of a tree.")
@click.option("-p", "perms", is_flag=True, help="Print permissions too.")
@json_option
@target_options
def ls(connect: Callable[[], SyncClient], path: str, full: bool, perms: bool, as_json: bool) -> None:
    """List the nodes below PATH with their values.

    \b
    Example:
      xenbus store ls -f /local/domain/1/device
    """
    with connect() as client:
        top, *nodes = client.walk(path, perms)
    listed: dict[str, object] = {}
    above = top.path.rstrip("/").count("/") + 1
    for node in nodes:
        rights = [str(perm) for perm in node.perms or ()] if perms else None
        if as_json:
            shown = jsonable(node.value)
            listed[node.path] = shown if rights is None else {"value": shown, "perms": rights}
            continue
        name = node.path if full else " " * (node.path.count("/") - above) + node.path.rpartition("/")[2]
        line = f"{name}:" if node.value is None else f'{name} = "{escaped(node.value)}"'
        click.echo(line if rights is None else f"{line}  ({','.join(rights)})")
    if as_json:
        emit(listed, True, "")


@command.command("read")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-p", "prefix", is_flag=True, help="Print each path before its value.")
@click.option("--raw", is_flag=True, help="Print the bytes as they are, with nothing added.")
@json_option
@target_options
def read(
    connect: Callable[[], SyncClient], paths: tuple[str, ...], prefix: bool, raw: bool, as_json: bool
) -> None:
    """Print the values of nodes, a line each, what is no plain text escaped.

    \b
    Example:
      xenbus store read /local/domain/1/name
    """
    with connect() as client:
        values = {path: client.read(path) for path in paths}
    if raw:
        for value in values.values():
            click.echo(value, nl=False)
        return
    lines = "\n".join((f"{path}: " if prefix else "") + escaped(values[path]) for path in paths)
    if as_json:
        emit({path: jsonable(value) for path, value in values.items()}, True, "")
    else:
        click.echo(lines)


@command.command("write")
@click.argument("pairs", nargs=-1, required=True, metavar="PATH VALUE...")
@click.option("-e", "escapes", is_flag=True, help="Values have escapes, as `read` prints them.")
@target_options
def write(connect: Callable[[], SyncClient], pairs: tuple[str, ...], escapes: bool) -> None:
    """Write values, taken as they stand; several pairs in one transaction. Missing parents are made.

    \b
    Example:
      xenbus store write /local/domain/1/data/a 1 /local/domain/1/data/b 2
    """
    if len(pairs) % 2:
        raise UsageError(f"{pairs[-1]}: a value is missing")
    values = [unescaped(value) if escapes else value for value in pairs[1::2]]
    with connect() as client:
        if len(pairs) == 2:
            client.write(pairs[0], values[0])
            return

        batch = client.batch()
        for path, value in zip(pairs[::2], values, strict=True):
            batch.write(path, value)
        batch.commit()


@command.command("mkdir")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@target_options
def mkdir(connect: Callable[[], SyncClient], paths: tuple[str, ...]) -> None:
    """Make nodes; those that are there stay as they are.

    \b
    Example:
      xenbus store mkdir /local/domain/1/data
    """
    with connect() as client:
        for path in paths:
            client.mkdir(path)


@command.command("rm")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "-t", "tidy", is_flag=True, help="Remove parents, too, that are left empty: no value, no child."
)
@target_options
def rm(connect: Callable[[], SyncClient], paths: tuple[str, ...], tidy: bool) -> None:
    """Remove nodes and all below them, all or none; one that is not there is an error.

    \b
    Example:
      xenbus store rm -t /local/domain/1/device/vbd/51712
    """

    def remove(tx: Transaction) -> None:
        for path in paths:
            tx.read(path)  # the store itself calls it a success when only the last name is missing
            tx.rm(path)
            above = path.rpartition("/")[0]
            while tidy and above and not tx.directory(above) and not tx.read(above):
                tx.rm(above)
                above = above.rpartition("/")[0]

    with connect() as client:
        client.transaction(remove)


@command.command("exists")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@target_options
@click.pass_context
def exists(context: click.Context, connect: Callable[[], SyncClient], paths: tuple[str, ...]) -> None:
    """End with 0 if all of the nodes are there, with 3 if one is not. Nothing is printed.

    \b
    Example:
      xenbus store exists /local/domain/1/device/vbd/51712 && echo attached
    """
    with connect() as client:
        if not all(client.exists(path) for path in paths):
            context.exit(Exit.NOT_FOUND)


@command.command("list")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-p", "full", is_flag=True, help="Print whole paths.")
@json_option
@target_options
def list_children(
    connect: Callable[[], SyncClient], paths: tuple[str, ...], full: bool, as_json: bool
) -> None:
    """Print the names of the children of nodes, a line each; `ls` prints all that is below, with values.

    \b
    Example:
      xenbus store list /local/domain
    """
    from xenbus.xenstore.wire.paths import join

    with connect() as client:
        names = {path: client.directory(path) for path in paths}
    lines = (join(path, name) if full else name for path, below in names.items() for name in below)
    emit(names, as_json, lambda: "\n".join(lines))


@command.command("perms")
@click.argument("path")
@click.argument("entries", nargs=-1, metavar="[PERM]...")
@click.option("-r", "below", is_flag=True, help="Set those of all nodes below, too, in one transaction.")
@json_option
@target_options
def perms(
    connect: Callable[[], SyncClient], path: str, entries: tuple[str, ...], below: bool, as_json: bool
) -> None:
    """Print a node's permissions, or set them: n, r, w or b and a domain's number; the owner first.

    \b
    Example:
      xenbus store perms /local/domain/1/data n1 r0
    """
    with connect() as client:
        if entries and below:
            client.transaction(lambda tx: [tx.set_perms(node.path, entries) for node in tx.walk(path)])
            return
        if entries:
            client.set_perms(path, entries)
            return
        found = _perms(client, path)
    emit({path: found}, as_json, " ".join(found))


@command.command("watch")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-n", "count", type=click.IntRange(min=1), help="End after that many events.")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds for -n events (exit code 5).")
@json_option
@target_options
def watch(
    connect: Callable[[], SyncClient],
    paths: tuple[str, ...],
    count: int | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Print the path of each event at or below PATH, a line each; the first one comes at once.

    \b
    Example:
      xenbus store watch -n 2 /local/domain/1/device
    """
    with connect() as client:
        for path in paths:
            client.watch(path)
        until = None if timeout is None else time.monotonic() + timeout
        seen = 0
        while count is None or seen < count:
            left = 3600.0 if until is None else until - time.monotonic()
            event = client.poll_watch(left) if left > 0 else None
            if event is not None:
                seen += 1
                emit_line({"path": event[1], "watch": event[0].path}, as_json, event[1])
            elif until is not None and time.monotonic() >= until:
                what = f"{count} events" if count else "an end of the watch"
                raise DeadlineError(
                    f"{what} below {', '.join(paths)} ({seen} came)", client.peer, timeout or 0
                )


@command.command("control")
@click.argument("words", nargs=-1, required=True, metavar="WORD...")
@target_options
def control(connect: Callable[[], SyncClient], words: tuple[str, ...]) -> None:
    """Ask the daemon itself: `help` lists what it knows, `check` looks for what is inconsistent.

    \b
    Example:
      xenbus store control quota 1
    """
    with connect() as client:
        answer = client.control(*words)
    click.echo(answer, nl=not answer.endswith("\n"))


@command.command("live-update")
@click.argument("program", required=False, metavar="[PROGRAM]")
@click.option("--arguments", metavar="WORDS", help="Its arguments; without it those that the daemon has.")
@click.option(
    "--timeout", default=60, metavar="SECONDS", show_default=True, help="Wait for transactions so long,"
)
@click.option("--force", is_flag=True, help="and drop them then, where they cannot go along.")
@target_options
def live_update(
    connect: Callable[[], SyncClient], program: str | None, arguments: str | None, timeout: int, force: bool
) -> None:
    """Replace the daemon's program while its clients stay connected. Without PROGRAM: by the Python, and with
    it the xenbus, that runs this command.

    \b
    Example:
      xenbus store live-update --dir /tmp/store
    """
    import sys

    steps = [["-f", program or sys.executable], ["-s", "-t", str(timeout), *(["-F"] if force else [])]]
    if arguments is not None:
        steps.insert(1, ["-c", arguments])
    with connect() as client:
        client.timeout = timeout + UPDATE_SECONDS
        for words in steps:
            answer = client.control("live-update", *words)
            if answer != "OK":
                raise XenbusError(f"the daemon goes on as it is: {answer}")


@command.command("serve")
@dir_option
@click.option("--quota", "quotas", multiple=True, metavar="NAME=N", help="A guest's limit, e.g. nodes=10000.")
@click.option(
    "--profile", default="xenstored", metavar="NAME", help="The daemon it is like: xenstored, oxenstored."
)
@click.option("--state", metavar="FILE", help="Keep the store in this file, and begin with what is in it.")
def serve(directory: Path | None, quotas: tuple[str, ...], profile: str, state: str | None) -> None:
    """Serve a XenStore alone, at DIR/socket, until SIGTERM or SIGINT. Prints `ready` when it is.

    \b
    Example:
      xenbus store serve --dir /tmp/store &
      XENSTORED_RUNDIR=/tmp/store xenstore-ls
    """
    from xenbus.xenstore.daemon.__main__ import serve as serve_store
    from xenbus.xenstore.daemon.loop import run
    from xenbus.xenstore.engine import profile_of

    place = need_dir(directory)
    chosen = profile_of(profile)
    limits = chosen.parse_quotas(quotas)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror}") from None
    run(serve_store(str(place / "socket"), limits, ready=_say_ready, profile=chosen, state=state))


def _say_ready() -> None:
    try:
        click.echo("ready")
    except OSError as error:
        raise UsageError(f"standard output: {error.strerror}") from None


add_to(command, address_options)
