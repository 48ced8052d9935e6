"""The command itself: its start, its table, its exit codes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys

import click
import pytest

import xenbus.cli.main as main  # `from xenbus.cli` would have its function of that name
from xenbus import __version__
from xenbus.cli import exits
from xenbus.cli.context import need_dir
from xenbus.errors import (
    DeadlineError,
    LinkDown,
    PeerError,
    StoreError,
    UsageError,
    XenbusError,
    store_error,
)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from xenbus.cli.main import run; assert run(['--help']) == 0; "
        "print(sorted({'rich', 'asyncio', 'ctypes', 'xenbus.xenstore', 'xenbus.bus'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_brings_nothing_along_that_takes_time():
    """What keeps its start short (bench/startup.py measures it): no loop, no rich, no room of the house."""
    code = (
        "import sys; from xenbus.cli.main import run; run(['--help'])\n"
        "heavy = {'asyncio', 'rich', 'xenbus.bus', 'xenbus.xenstore', 'xenbus.hypervisor', 'xenbus.domain'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_every_row_of_the_table_is_a_command_with_an_example(capsys):
    for name, (module, text) in main.COMMANDS.items():
        command = importlib.import_module(f"xenbus.cli.{module}").command
        assert isinstance(command, click.Command), name
        assert command.get_short_help_str(200) == text
        leaves = command.commands.values() if isinstance(command, click.Group) else [command]
        for leaf in leaves:
            assert "Example:" in (leaf.help or ""), f"{name} {leaf.name}"
        assert main.run([name, "--help"]) == 0


def test_help_lists_the_commands_and_the_exit_codes(capsys):
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in main.COMMANDS)
    assert "Exit codes: 0 done" in out


def test_the_version(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"xenbus {__version__}\n"


@pytest.mark.parametrize("words", [["nothing-of-the-kind"], ["--nonsense"], ["completion", "tcsh"]])
def test_wrong_usage_is_two_and_says_what(words, capsys):
    assert main.run(words) == 2
    assert words[-1] in capsys.readouterr().err


CODES = [
    (UsageError("x"), 2),
    (store_error("ENOENT", "READ", "/a"), 3),
    (store_error("EACCES", "READ", "/a"), 4),
    (DeadlineError("x", "y", 1), 5),
    (LinkDown("x"), 6),
    (StoreError("EQUOTA"), 1),
    (PeerError("x"), 1),
    (XenbusError("x"), 1),
    (OSError(28, "No space left"), 1),
]


@pytest.mark.parametrize(("error", "code"), CODES)
def test_each_kind_of_error_has_its_code_and_one_line(error, code, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(main.cli, "main", fails)
    assert main.run([]) == code
    err = capsys.readouterr().err
    assert err == f"xenbus: {error}\n"
    assert main.run(["--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_error_from_a_control_socket_keeps_its_kind():
    error = XenbusError("x")
    error.kind = "DeadlineError"
    assert exits.code_of(error) == 5
    error.kind = ""
    error.name = "ENOENT"
    assert exits.code_of(error) == 3


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(main.cli, "main", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.run([])


def test_an_error_cannot_write_control_characters_to_the_terminal():
    assert exits.line_of(XenbusError("a\x1b[31m\nb")) == "a\\x1b[31m b"


def test_no_directory_is_a_usage_error():
    with pytest.raises(UsageError, match="XENBUS_DIR"):
        need_dir(None)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_the_shell_takes(shell, capsys, tmp_path):
    assert main.run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_XENBUS_COMPLETE" in script
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([program, "-n", tmp_path / "script"], check=True, timeout=10)


def test_completion_knows_the_subcommands():
    env = os.environ | {"_XENBUS_COMPLETE": "bash_complete", "COMP_WORDS": "xenbus st", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from xenbus.cli.main import main; main()"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert "plain,store" in done.stdout


def test_a_reader_that_has_had_enough_is_no_traceback():
    command = f"{sys.executable} -m xenbus.cli.main completion bash | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.stderr == ""


def test_without_its_extra_the_command_says_what_is_missing():
    code = "import sys; sys.modules['click'] = None; from xenbus.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "xenbus: the command needs click: install xenbus[cli]\n"


def test_a_pipe_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "xenbus.cli.main", "completion", "bash"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=30)
    os.close(writing)
    assert (done.returncode, done.stderr) == (exits.BROKEN_PIPE, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_closed_is_as_dev_null(closed):
    """What is opened next would get its number, and be read or written in its place."""
    code = (
        "import atexit, os, sys, xenbus.cli.main as main; sys.argv[1:] = ['--help']\n"
        "atexit.register(lambda: os.open('/', os.O_RDONLY) > 2 or os._exit(9)); main.main()"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("Usage" in done.stdout) == (">&-" not in closed.split())
