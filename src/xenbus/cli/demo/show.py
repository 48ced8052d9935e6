"""How the demo tells what it does: for a person on a terminal, or as one JSON document at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

Advance = Callable[[int], None]


class Show(Protocol):
    def step(self, title: str) -> None: ...
    def fact(self, text: str, /, **data: object) -> None:
        """Something that was checked and holds; `data` is what --json keeps of it."""
        ...

    def note(self, text: str) -> None:
        """What a person may want to know, or do next."""
        ...

    def tree(self, trees: Mapping[str, list[str]]) -> None:
        """Each domain's device tree, as its control socket gives it."""
        ...

    def progress(self, label: str, total: int) -> Any:
        """A context manager that yields `advance(done_bytes)`."""
        ...

    def end(self, verdict: str, *, ok: bool) -> None: ...


class Person:
    """Lines, trees and progress bars; colour and bars only where stdout is a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._number = 0

    def step(self, title: str) -> None:
        self._number += 1
        self._console.print(f"\n[bold]{self._number}. {title}[/bold]")

    def fact(self, text: str, /, **data: object) -> None:
        self._console.print(Text("   ok  ", style="green") + Text(text))

    def note(self, text: str) -> None:
        self._console.print(Text("       " + text))

    def tree(self, trees: Mapping[str, list[str]]) -> None:
        for domain, lines in trees.items():
            self._console.print(Text(f"       {domain}", style="cyan"))
            for line in lines:
                self._console.print(Text("         " + line))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("       {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        terminal = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not terminal) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)

    def end(self, verdict: str, *, ok: bool) -> None:
        self._console.print()
        self._console.print(Text(verdict, style="bold green" if ok else "bold red"))


class Data:
    """The same as one JSON document on stdout; what is under way goes to stderr, a line a step."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def step(self, title: str) -> None:
        print(f"xenbus demo: {title}", file=sys.stderr)  # noqa: T201 - stdout is for the document
        self._steps.append({"step": title, "facts": [], "trees": []})

    def fact(self, text: str, /, **data: object) -> None:
        self._steps[-1]["facts"].append({"text": text, **data})

    def note(self, text: str) -> None:
        print(f"xenbus demo: {text}", file=sys.stderr)  # noqa: T201 - as above

    def tree(self, trees: Mapping[str, list[str]]) -> None:
        self._steps[-1]["trees"].append(dict(trees))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        yield lambda _done: None

    def end(self, verdict: str, *, ok: bool) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        document = {"ok": ok, "verdict": verdict, "seconds": seconds, "steps": self._steps}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
