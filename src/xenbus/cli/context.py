"""What subcommands share: --dir and --json, printing for a person or a program, and who does not answer.

Knows no room of the house but errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from xenbus.errors import LinkDown, UsageError

DIR_VARIABLE = "XENBUS_DIR"
STORE_VARIABLE = "XENBUS_STORE"  # as toolstack/xenhost.py has it: a store by its address
F = TypeVar("F", bound=Callable[..., Any])


def dir_option(command: F) -> F:
    """`--dir DIR` or $XENBUS_DIR, as the argument `directory: Path | None`."""
    option = click.option(
        "--dir",
        "directory",
        metavar="DIR",
        envvar=DIR_VARIABLE,
        type=click.Path(path_type=Path),
        help=f"An embedded host's directory (or {DIR_VARIABLE}).",
    )
    return option(command)


def json_option(command: F) -> F:
    """`--json`, as the argument `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def need_dir(directory: Path | None, why: str = "") -> Path:
    """The directory of the host that is meant. UsageError if none was named; `why` one is needed."""
    if directory is None:
        raise UsageError(f"which host? Give --dir DIR, or set {DIR_VARIABLE}{why and f'; {why}'}")
    return directory


@contextmanager
def answering(where: str) -> Iterator[None]:
    """Within it a store is connected to. LinkDown names the address that nobody answers at."""
    try:
        yield
    except (LinkDown, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise LinkDown(f"no XenStore answers at {where} ({reason})") from error


def emit(data: object, as_json: bool, text: str | Callable[[], str]) -> None:
    """Print `data` as one JSON document, or `text` (made only if it is wanted)."""
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    if callable(text):
        text = text()
    if text:
        click.echo(text)


def emit_line(data: object, as_json: bool, text: str) -> None:
    """One event of a stream: a line, flushed; a JSON document a line with --json."""
    click.echo(json.dumps(data) if as_json else text)
