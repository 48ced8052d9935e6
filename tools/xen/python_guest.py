"""Makes the Python guest's initrd, in dom0: Python, busybox and e2fsprogs of dom0, modules, the tree's `src`.

    python3 /xenbus/tools/xen/python_guest.py /guest/python.cpio

It is made when a test first asks for such a guest (tests/support/xl_guest.py) and costs dom0's image nothing.
Its /init is python-guest-init.sh, which starts tests/support/guest_agent.py on the guest's console.
"""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cpio import Writer

HERE = Path(__file__).parent
PYTHON = Path("/usr/bin/python3.11")
STDLIB = Path("/usr/lib/python3.11")
E2FS = (Path("/usr/sbin/mke2fs"), Path("/usr/sbin/e2fsck"))
MODULES = Path("/usr/lib/modules")
TREE = Path("/xenbus")
# Never imported there, and unpacked by an emulated CPU at each of its boots.
LEFT_OUT = re.compile(
    r"(test|pydoc_data|unittest|xmlrpc|wsgiref|lib2to3|idlelib|tkinter|turtledemo|ensurepip|venv|distutils)/"
    r"|(__pycache__/)?(turtle|pydoc|doctest|_pydecimal|mailbox|cgi|nntplib|imaplib|smtplib)\."
    r"|lib-dynload/(_codecs_|_curses|_dbm|_gdbm|_hashlib|_sqlite3|_ssl|_test|_xx|xx|nis|readline|ossaudio|_tkinter)"
)


def libraries() -> list[Path]:
    """The shared libraries that the programs and what is kept of Python's extension modules need, by ldd."""
    extensions = [path for path in STDLIB.glob("lib-dynload/*.so") if _kept(path)]
    said = subprocess.run(
        ["ldd", *map(str, (PYTHON, *E2FS, *extensions))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [Path(path) for path in sorted(set(re.findall(r"(/\S+\.so\S*) \(0x", said.stdout)))]


def _kept(path: Path) -> bool:
    return not LEFT_OUT.match(str(path.relative_to(STDLIB)))


def files() -> Iterator[Path]:
    yield from (PYTHON, Path("/usr/bin/busybox"), *E2FS, Path("/etc/mke2fs.conf"))
    yield from libraries()
    yield from (path for path in STDLIB.rglob("*") if path.is_file() and _kept(path))
    yield from (path for path in MODULES.rglob("*") if path.is_file())
    yield from (path for path in TREE.glob("src/**/*") if path.is_file())
    yield from TREE.glob("xenbus.pyz")
    yield TREE / "tests/__init__.py"
    yield from (path for path in TREE.glob("tests/support/**/*") if path.is_file())


def make(target: Path) -> None:
    for tree in ("src", "tests/support"):
        # Compiled once, here, and not at each start in a guest.
        compileall.compile_dir(TREE / tree, quiet=1)
    with target.open("wb") as out, Writer(out) as writer:
        for name in ("proc", "sys", "dev", "run", "mnt", "tmp", "root"):
            writer.directory(name)
        writer.node("dev/console", 5, 1)
        for name in ("bin", "lib", "lib64", "sbin"):  # the one /usr of Debian
            writer.symlink(name, f"usr/{name}")
        writer.symlink("usr/bin/python3", PYTHON.name)
        writer.symlink("usr/bin/sh", "busybox")
        writer.directory("usr/sbin")
        writer.file("init", (HERE / "python-guest-init.sh").read_bytes(), 0o755)
        for path in files():
            real = path.parent.resolve() / path.name
            status = real.stat()
            mode = 0o755 if status.st_mode & 0o100 else 0o644
            writer.file(str(real).lstrip("/"), real.read_bytes(), mode, mtime=int(status.st_mtime))


if __name__ == "__main__":
    made = Path(sys.argv[1])
    work = made.with_suffix(f".{os.getpid()}")
    make(work)
    work.rename(made)
