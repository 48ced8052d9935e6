"""The pages: every block that can run is run, links lead somewhere, subcommands and options are all named.

How pages are written for this test:
- a ```python block is a whole program. What it prints stands in comments that start with `# ->`, in order.
- ```console blocks of one page are one shell session in an empty directory: `$ ` and a command, then what it
  prints (both streams). `...` stands for anything within a line, a line of `...` for any lines. A command
  that ends with ` &` runs on; the session goes on when it has printed what the page shows. A command that
  fails is followed by `$ echo $?`. One that only looks (LOOKS) is run until it shows what the page does. One
  whose program is not installed is passed over.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import pytest

from xenbus.cli.main import cli, run
from xenbus.xenstore.engine.quotas import QUOTAS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
DRIVER = ROOT / "docs" / "writing-a-driver.md"  # tests/docs/test_writing_a_driver.py runs it
DEADLINE = 20.0  # seconds for one command
PATIENCE = 5.0  # seconds until a look shows what it is to show
KEYWORDS = {"until"}
LOOKS = ("xenbus tree", "xenbus sysctl", "xenbus domain list", "xenbus store read")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def blocks(page: Path, kind: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language == kind]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- python ----

PROGRAMS = [
    pytest.param(text, id=f"{name(page)}-{n}")
    for page in PAGES
    for n, text in enumerate(blocks(page, "python"))
    if page != DRIVER and text not in blocks(DRIVER, "python")
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_prints_what_its_comments_say(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "<page>", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == re.findall(r"# -> (.*)", program)


def test_the_driver_of_the_readme_is_the_one_that_is_tested():
    assert blocks(DRIVER, "python")[0] in blocks(ROOT / "README.md", "python")


# ---- console ----


def commands(session: str) -> Iterator[tuple[str, str]]:
    """(command, what it is to print) of a block."""
    for part in re.split(r"^\$ ", session, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def pattern(output: str) -> re.Pattern[str]:
    lines = [
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n"
        for line in output.splitlines()
    ]
    return re.compile("".join(lines))


class Shell:
    """One page's session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("XEN")}
        self.environment |= {"PATH": PATH, "PWD": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
        self.status = 0
        self.unexplained = ""
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self, command: str, expected: str) -> None:
        if match := re.fullmatch(r"export (\w+)=(.*)", command):
            self.environment[match[1]] = match[2].replace("$PWD", str(self.folder))
            return
        words = [word for word in command.split() if "=" not in word.split("/")[0]]
        if words[0] not in KEYWORDS and shutil.which(words[0], path=PATH) is None:
            print(f"not installed: {words[0]}")
            return
        if self.unexplained and command != "echo $?":
            raise AssertionError(self.unexplained)
        if command.endswith(" &"):
            self._start(command, expected)
        else:
            self._call(command, expected)

    def _call(self, command: str, expected: str) -> None:
        plain = command.startswith("xenbus ") and not set(command) & set("|&;<>$()`\\")
        end = time.monotonic() + (PATIENCE if command.startswith(LOOKS) else 0)
        while True:
            printed = self._here(shlex.split(command)[1:]) if plain else self._bash(command)
            if pattern(expected).fullmatch(printed) or time.monotonic() > end:
                break
            time.sleep(0.02)
        self.unexplained = f"$ {command}\n{printed}ended with {self.status}" if self.status else ""
        assert pattern(expected).fullmatch(printed), f"$ {command}\n{printed}\nexpected:\n{expected}"

    def _here(self, words: list[str]) -> str:
        """The command in this process: starting Python would be most of its time."""
        output = io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment, clear=True),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            self.status = run(words)
        return output.getvalue()

    def _bash(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"(exit {self.status})\n{command}"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.status = done.returncode
        return done.stdout

    def _start(self, command: str, expected: str) -> None:
        log = self.folder / f".{len(self.background)}.out"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command.removesuffix(' &')}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.background.append(process)
        end = time.monotonic() + DEADLINE
        while not pattern(expected).fullmatch(log.read_text()):
            assert process.poll() is None and time.monotonic() < end, f"$ {command}\n{log.read_text()}"
            time.sleep(0.01)

    def close(self) -> None:
        # All at once: some wait for their clients, which are others of them.
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


SESSIONS = [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, "console")]


@pytest.mark.slow
@pytest.mark.parametrize("page", SESSIONS)
def test_a_session_prints_what_the_page_shows(page):
    # Not tmp_path: sockets' paths have to be short.
    with tempfile.TemporaryDirectory(prefix="xb-") as folder:
        shell = Shell(Path(folder))
        try:
            for session in blocks(page, "console"):
                for command, expected in commands(session):
                    shell.run(command, expected)
            assert not shell.unexplained
        finally:
            shell.close()


def test_a_session_that_prints_something_else_is_found_out(tmp_path):
    shell = Shell(tmp_path)
    shell.run("echo one; echo two; echo three", "one\n...\nthree\n")
    shell.run("echo one two three", "one ... three\n")
    shell.run("false", "")
    shell.run("echo $?", "1\n")
    with pytest.raises(AssertionError):
        shell.run("echo one", "two\n")
    with pytest.raises(AssertionError):
        shell.run("echo one; echo two", "one\n")
    shell.run("false", "")
    with pytest.raises(AssertionError, match="ended with 1"):
        shell.run("true", "")


# ---- what pages say of each other and of the code ----


def slug(heading: str) -> str:
    """A heading's anchor, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> set[str]:
    return {slug(text) for text in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target}: no such page"
        assert not anchor or anchor in headings(other), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_are_there(page):
    """`src/...`, `tests/...`, `docs/...` and the like in backquotes."""
    for path in re.findall(r"`((?:src|tests|docs|bench|tools)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def subcommands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    with click.Context(group) as context:
        for word in group.list_commands(context):
            command = group.get_command(context, word)
            assert command is not None
            yield f"{path} {word}", command
            if isinstance(command, click.Group):
                yield from subcommands(command, f"{path} {word}")


def test_every_subcommand_and_option_is_named():
    text = (ROOT / "docs" / "cli.md").read_text()
    sections = dict(re.findall(r"^#+ `(xenbus[^`]*)`\n(.*?)(?=^#+ |\Z)", text, re.M | re.S))
    known = {"xenbus": cli, **dict(subcommands(cli, "xenbus"))}
    assert set(sections) == set(known)
    for path, command in known.items():
        named = set(re.findall(r"`(-{1,2}[\w-]+)", sections[path]))
        options = {word for p in command.params if isinstance(p, click.Option) for word in p.opts}
        assert named == options, f"{path}: {named ^ options}"


def test_every_quota_is_named():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "xenstore.md").read_text(), re.M)
    assert {quota: int(default) for quota, default in rows} == {
        quota: default for quota, (default, _) in QUOTAS.items()
    }
