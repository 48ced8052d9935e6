"""Other people's client libraries, each method of them: the same on ours as on the C daemon."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.xenstored import Xenstored
from tests.xenstore.peers.conftest import Both

HERE = Path(__file__).parent
MODULES = sorted(Path("/usr/lib").glob("xen-4.*/lib/python/xen/lowlevel/xs*.so"))
TIMEOUT = 30.0


def run(daemon: Xenstored, command: list[str]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "XENSTORED_RUNDIR": str(daemon.folder / "run"),
        "XENSTORED_PATH": str(daemon.socket),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_xen_lowlevel_xs(both: Both) -> None:
    if not MODULES:
        pytest.skip("xen.lowlevel.xs is not installed (Debian: xen-utils-4.17)")
    built_for = re.search(r"cpython-3(\d+)", MODULES[0].name)
    assert built_for is not None
    python = shutil.which(f"python3.{built_for[1]}", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip(f"xen.lowlevel.xs is for Python 3.{built_for[1]}, which is not there")
    command = [python, str(HERE / "lowlevel_xs.py"), str(MODULES[0].parents[2])]
    theirs, ours = run(both.theirs, command), run(both.ours, command)
    assert ours == theirs
    results = ours["results"]
    assert ["read", {"bytes": b"value".hex()}] in results
    assert ["end", False] in results, "a conflict"
    assert ["event", ["/xs/w/below", "token"]] in results
    source = (HERE / "lowlevel_xs.py").read_text()
    assert [name for name in ours["methods"] if f".{name}" not in source] == [], "a method was not tried"


def test_pyxs(both: Both) -> None:
    if importlib.util.find_spec("pyxs") is None:
        pytest.skip("pyxs is not installed (PyPI)")
    command = [sys.executable, str(HERE / "pyxs_client.py")]
    theirs = run(both.theirs, [*command, str(both.theirs.socket)])
    ours = run(both.ours, [*command, str(both.ours.socket)])
    assert ours == theirs
    assert ["event", ["/pyxs/w/below", "token"]] in ours["results"]
    assert ["commit", False] in ours["results"], "a conflict"
