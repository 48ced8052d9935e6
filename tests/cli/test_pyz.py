"""xenbus.pyz: built as `make pyz` does, run by a Python that sees nothing else, in an empty environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from xenbus import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
BUILD = Path(__file__).parents[2] / "tools" / "pyz" / "build.py"


def build(target: Path) -> Path:
    subprocess.run([sys.executable, str(BUILD), str(target)], check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pyz") / "xenbus.pyz")


def alone(pyz: Path, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """No site-packages (-S), no PYTHON variables and no current directory (-I)."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(pyz), *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=pyz.parent,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done


def test_it_runs_with_nothing_installed(pyz):
    assert alone(pyz, "--version").stdout == f"xenbus {__version__}\n"
    assert "tree" in alone(pyz, "--help").stdout
    assert "which host?" in alone(pyz, "domain", "list", code=2, XENBUS_DIR="").stderr
    assert "Example" in alone(pyz, "attach", "block", "--help").stdout


def test_drivers_are_found_in_it(pyz):
    code = (
        f"import sys; sys.path.insert(0, {str(pyz)!r})\n"
        "from importlib.metadata import entry_points, version\n"
        "print(*(each.load().__name__ for each in entry_points(group='xenbus.drivers')), version('xenbus'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, env={}, timeout=60
    )
    drivers = [f"xenbus.drivers.{name}" for name in ("block", "net", "console")]
    assert done.stdout.split() == [*drivers, __version__], done.stderr


def test_it_starts_a_host_with_all_its_processes(pyz):
    """They are Pythons of their own; the demo shows that storage, rings and the tree work in them."""
    said = alone(pyz, "demo", PATH=os.environ["PATH"], HOME=str(pyz.parent), LANG="C.UTF-8").stdout
    assert "verified:" in said


def test_the_same_sources_make_the_same_bytes(pyz, tmp_path):
    assert build(tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
    assert names == sorted(names)
    assert {"__main__.py", f"xenbus-{__version__}.dist-info/entry_points.txt"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("/")]


def test_another_python_takes_the_source(pyz, tmp_path):
    """As if this Python had another number for its bytecode."""
    other = tmp_path / "other.pyz"
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, b"\0\0\r\n" + data[4:] if name.endswith(".pyc") else data)
    assert alone(other, "--version").stdout == f"xenbus {__version__}\n"


def test_it_shows_a_xen_host(pyz, tmp_path):
    """Of a store that is not ours, as far as it can tell: a daemon alone, with nodes in it."""
    socket = tmp_path / "socket"
    with subprocess.Popen(
        [sys.executable, "-m", "xenbus", "store", "serve", "--dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as daemon:
        try:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            where = {"XENBUS_STORE": str(socket), "XENBUS_RUN": str(tmp_path)}
            for path, value in {
                "/local/domain/5/name": "guest",
                "/local/domain/5/device/vbd/51712/state": "1",
                "/local/domain/5/device/vbd/51712/backend": "/local/domain/0/backend/vbd/5/51712",
            }.items():
                alone(pyz, "store", "write", path, value, **where)
            (tree,) = json.loads(alone(pyz, "tree", "guest", "--json", **where).stdout)
            assert tree["devices"][0]["children"][0]["children"][0]["nameunit"] == "vbd-51712"
            assert "dev.vbd-51712.xenstore_path" in alone(pyz, "sysctl", "-a", **where).stdout
        finally:
            daemon.terminate()
