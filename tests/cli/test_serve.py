"""`xenbus serve` where there is no Xen, the files that go with it, and its directory. On Xen: tests/xen."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from xenbus.cli.exits import Exit
from xenbus.cli.main import run
from xenbus.errors import UsageError
from xenbus.toolstack.serving import make_run_directory, only_one


def test_without_a_store_it_says_so(tmp_path, capsys):
    code = run(["serve", "--store", str(tmp_path / "no-socket"), "--run", str(tmp_path / "run")])
    assert code == Exit.NOT_RUNNING
    assert "no-socket" in capsys.readouterr().err


def test_what_nobody_drives_cannot_be_claimed(tmp_path, capsys):
    assert run(["serve", "--claim", "vtoaster", "--run", str(tmp_path)]) == Exit.USAGE
    assert "vtoaster" in capsys.readouterr().err


def test_the_unit_starts_what_printed_it(capsys):
    assert run(["serve", "--claim", "vbd", "--bus", "both", "--show", "unit"]) == 0
    unit = capsys.readouterr().out
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert start.endswith(" serve --bus both --claim vbd") and start.startswith("ExecStart=/")
    assert "Type=notify" in unit and "@" not in start


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path, capsys):
    assert run(["serve", "--show", "unit"]) == 0
    text = capsys.readouterr().out
    unit = tmp_path / "xenbus.service"
    lines = ["ExecStart=/bin/true" if line.startswith("ExecStart=") else line for line in text.splitlines()]
    unit.write_text("\n".join(lines))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "xenbus.service" not in done.stderr, done.stderr


@pytest.fixture
def script(tmp_path, capsys):
    """Runs it with tools in place of Xen's that keep nodes as files: `script(word, params=...)`."""
    assert run(["serve", "--show", "script"]) == 0
    path = tmp_path / "block-xenbus"
    path.write_text(capsys.readouterr().out)
    path.chmod(0o755)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "xenstore-read").write_text(f'#!/bin/sh\ncat "{tmp_path}/nodes$1"\n')
    write = '#!/bin/sh\nwhile [ $# -gt 0 ]; do printf "%s" "$2" >"{}/nodes$1"; shift 2; done\n'
    (tools / "xenstore-write").write_text(write.format(tmp_path))
    for tool in tools.iterdir():
        tool.chmod(0o755)
    node = tmp_path / "nodes/backend/vbd/5/51712"
    node.mkdir(parents=True)

    def call(word, params=None):
        if params is not None:
            (node / "params").write_text(params)
        variables = os.environ | {"XENBUS_PATH": "/backend/vbd/5/51712"}
        # The script puts the system's own directories first, which hold no such tool where there is no Xen.
        text = path.read_text().replace("PATH=/usr/sbin", f"PATH={tools}:/usr/sbin")
        path.write_text(text)
        done = subprocess.run(
            [path, word], env=variables, capture_output=True, text=True, timeout=30, check=False
        )
        return done, {child.name: child.read_text() for child in node.iterdir()}

    return call


def test_the_script_tells_libxl_that_the_disk_is_there(script):
    done, nodes = script("add", "/srv/disk.img")
    assert done.returncode == 0 and nodes["hotplug-status"] == "connected", done.stderr
    assert script("remove")[0].returncode == 0


def test_the_script_says_what_is_wrong(script):
    done, nodes = script("add", "")
    assert (
        done.returncode == 1 and nodes["hotplug-status"] == "error" and nodes["hotplug-error"] == "no target"
    )
    assert script("frobnicate")[0].returncode == 2


def test_the_run_directory_is_ours_alone(tmp_path):
    assert make_run_directory(tmp_path / "run").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError, match="others may write there"):
        make_run_directory(tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        make_run_directory(tmp_path / "file")


def test_a_domain_is_served_once(tmp_path):
    with only_one(tmp_path, "Domain-0"):
        with pytest.raises(UsageError, match="served already"), only_one(tmp_path, "Domain-0"):
            pass
        with only_one(tmp_path, "other"):
            pass
    with only_one(tmp_path, "Domain-0"):
        pass
