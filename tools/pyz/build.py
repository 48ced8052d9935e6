"""xenbus.pyz: the whole package and what its command needs, in one file that any Python from 3.11 on runs.

    python tools/pyz/build.py [FILE]

The same sources, versions (requirements.txt) and Python make the same bytes: names sorted, one time for all.
"""

from __future__ import annotations

import marshal
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WHEN = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive knows
# The host's processes are Pythons of their own (`python -m xenbus...`), which have to find the file as well.
MAIN = b"""import os
import sys

here = os.path.abspath(sys.path[0])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))

from xenbus.cli import main

main()
"""
# Compiled too, for the Python that builds; another one takes the source, and longer to start.
COMPILED = ("xenbus/", "click/", "rich/")
# Of what pip installs: nothing reads it, or it says where and when it was installed.
LEFT_OUT = re.compile(r"(^|/)(__pycache__|bin)/|\.pyc$|\.dist-info/(RECORD|INSTALLER|REQUESTED)$")


def install(folder: Path) -> None:
    """The pinned wheels, pure Python all of them."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary", ":all:", "--platform", "any", "--python-version", "3.11"]
    command += ["--target", str(folder), "--requirement", str(HERE / "requirements.txt")]
    subprocess.run(command, check=True)


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not LEFT_OUT.search(name):
            yield name, path.read_bytes()


def dist_info() -> Iterator[tuple[str, bytes]]:
    """What importlib.metadata finds drivers by, as pip would have written it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = f"{project['name']}-{project['version']}.dist-info"
    about = [("Metadata-Version", "2.1"), ("Name", project["name"]), ("Version", project["version"])]
    about += [("Summary", project["description"]), ("License", project["license"])]
    yield f"{home}/METADATA", "".join(f"{key}: {value}\n" for key, value in about).encode()
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    text = "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in groups.items()
    )
    yield f"{home}/entry_points.txt", text.encode()
    yield f"{home}/LICENSE", (ROOT / "LICENSE").read_bytes()


def compiled(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """PEP 552's kind that is never compared with its source; zipimport looks for it beside that."""
    for name, data in files.items():
        if name.startswith(COMPILED) and name.endswith(".py"):
            code = compile(data, name, "exec", dont_inherit=True, optimize=0)
            yield (
                f"{name}c",
                MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(data) + marshal.dumps(code),
            )


def build(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="xenbus-pyz-") as work:
        install(Path(work))
        files = dict(files_below(Path(work)))
    files |= {f"xenbus/{name}": data for name, data in files_below(ROOT / "src" / "xenbus")}
    files |= {**dict(dist_info()), "__main__.py": MAIN}
    files |= dict(compiled(files))
    part = target.with_name(target.name + ".part")
    with part.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in sorted(files.items()):
                entry = zipfile.ZipInfo(name, WHEN)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
    part.chmod(0o755)
    part.replace(target)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "xenbus.pyz"))
