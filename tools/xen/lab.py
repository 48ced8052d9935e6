"""A real Xen and dom0 under QEMU's software emulation, the working tree in it: `make xen-test` and others.

    python tools/xen/lab.py test [--seconds N] [--results DIR] [pytest's arguments]
    python tools/xen/lab.py all  [the same]      the tests marked `features`, too
    python tools/xen/lab.py bench [--seconds N] [--results DIR] [bench.xen's arguments]
    python tools/xen/lab.py shell
    python tools/xen/lab.py build

Needs no root, no hardware support, and changes nothing on the machine: what it keeps is in $XENBUS_CACHE
(~/.cache/xenbus-xen), what a run says in the results' directory. The exit code of `test` is pytest's, 70 if
dom0 did not come to its end.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import image
import progress
from cpio import Writer

ROOT = Path(__file__).parents[2]
TREES = ("src", "tests", "bench", "tools")
RESULTS_SIZE = 256 << 20  # of the disk by which dom0 hands out its results; sparse
LOST = 70  # sysexits.h, EX_SOFTWARE
SECONDS = {"test": 900, "all": 3000, "bench": 1500}  # that the tests may take in dom0
END_SECONDS = 120  # for what comes before and after them
PR_SET_PDEATHSIG = 1
MACHINE = "-accel tcg,thread=multi -cpu qemu64,+svm -smp 2 -m 4096 -nic none -display none -no-reboot".split()
XEN_LINE = "console=com1 com1=115200 dom0_mem=2560M,max:2560M cpuidle=0 gnttab_max_frames=256"
DOM0_LINE = "console=hvc0 loglevel=4 panic=1"


def write_job(path: Path, mode: str, arguments: list[str], seconds: int) -> None:
    """The second archive: the working tree, dom0's init and what it is to do."""
    with path.open("ab") as out, Writer(out) as writer:
        out.write(bytes(-out.tell() % 4))
        for name in TREES:
            for file in sorted((ROOT / name).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    mode_bits = 0o755 if file.stat().st_mode & 0o100 else 0o644
                    writer.file(f"xenbus/{file.relative_to(ROOT)}", file.read_bytes(), mode_bits)
        for name in ("pyproject.toml", "xenbus.pyz"):  # the second is there if `make pyz` was run
            if (ROOT / name).exists():
                writer.file(f"xenbus/{name}", (ROOT / name).read_bytes())
        writer.file("init", (image.HERE / "init.sh").read_bytes(), 0o755)
        guest = io.BytesIO()
        with Writer(guest) as its:
            its.file("init", (image.HERE / "guest-init.sh").read_bytes(), 0o755)
        writer.file("guest/init.cpio", guest.getvalue())
        job = {"MODE": mode, "ARGS": shlex.join(arguments), "SECONDS_MOST": str(seconds)}
        writer.file("job", "".join(f"{k}={shlex.quote(v)}\n" for k, v in job.items()).encode())


def command(parts: image.Parts, initrd: Path, disk: Path, serial: str) -> list[str]:
    line = ["qemu-system-x86_64", *MACHINE, "-serial", serial, "-kernel", str(parts.xen), "-append", XEN_LINE]
    line += ["-initrd", f"{parts.kernel} {DOM0_LINE},{initrd}"]
    return [*line, "-drive", f"file={disk},if=virtio,format=raw,cache=unsafe"]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(parts: image.Parts, work: Path, log: Path, seconds: int) -> None:
    """Boots, shows what comes after dom0 is up, writes all of it to `log`. Ends it when its time is over."""
    line = command(parts, work / "dom0.img", work / "results.img", "stdio")
    progress.step("dom0 boots")
    with (
        log.open("wb") as out,
        subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=_die_with_parent
        ) as qemu,
    ):
        assert qemu.stdout is not None
        timer = threading.Timer(seconds, qemu.kill)
        timer.start()
        try:
            shown = False
            for raw in qemu.stdout:
                out.write(raw)
                out.flush()
                text = raw.decode(errors="replace").rstrip("\r\n")
                if not shown and text.startswith("== "):
                    shown = True
                    progress.step("")
                if shown and not text.startswith("(XEN)"):
                    sys.stdout.write(text + "\n")
                    sys.stdout.flush()
        finally:
            timer.cancel()
            qemu.kill()
            progress.step("")


def collect(disk: Path, results: Path) -> int:
    """Unpacks what dom0 wrote to its disk; answers pytest's exit code, LOST if there is none."""
    try:
        with tarfile.open(disk, mode="r:") as archive:
            archive.extractall(results, filter="data")
        return int((results / "exit").read_text())
    except (tarfile.TarError, OSError, ValueError):
        return LOST


def table(junit: Path) -> str:
    """One line a test, the slowest and then those that failed last."""
    rows = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        kinds = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        name = f"{case.get('classname', '').removeprefix('tests.xen.')}::{case.get('name')}"
        kind = (kinds or ["passed"])[0]
        rows.append((kind in ("failure", "error"), float(case.get("time", 0)), kind, name))
    return "\n".join(
        f"{progress.coloured(kind, f'{kind:8}')} {seconds:7.2f} s  {name}"
        for _, seconds, kind, name in sorted(rows)
    )


def results_directory(wanted: Path) -> tuple[Path, int]:
    """An empty one and a lock on it; while another run is at it this one gets the next."""
    for number in range(1, 100):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        for old in path.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        return path, lock
    raise SystemExit(f"{wanted}: a hundred runs at once")


def test(arguments: list[str], seconds: int, wanted: Path, mode: str = "test") -> int:
    """Also benchmarks, with `mode` "bench" and the image of that name."""
    began = time.monotonic()
    results, _ = results_directory(wanted)
    parts = image.parts("bench" if mode == "bench" else "")
    built = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="xenbus-xen-") as name:
        work = Path(name)
        progress.step("dom0's image for this run")
        prepare(parts, work, mode, arguments, seconds)
        run(parts, work, results / "console.log", seconds + END_SECONDS)
        code = collect(work / "results.img", results)
    ended = time.monotonic()
    if (results / "junit.xml").exists():
        sys.stdout.write(table(results / "junit.xml") + "\n")
    if code == LOST:
        tail = (results / "console.log").read_bytes()[-4000:].decode(errors="replace")
        sys.stdout.write(f"{tail}\ndom0 did not come to its end\n")
    sys.stdout.write(
        f"exit code {code}; image {built - began:.0f} s, run {ended - built:.0f} s; results in {results}\n"
    )
    return code


def prepare(parts: image.Parts, work: Path, mode: str, arguments: list[str], seconds: int) -> None:
    shutil.copyfile(parts.dom0, work / "dom0.img")
    write_job(work / "dom0.img", mode, arguments, seconds)
    with (work / "results.img").open("wb") as disk:
        disk.truncate(RESULTS_SIZE)


def shell() -> int:
    """A prompt in dom0 on this terminal; Ctrl-A X ends the machine."""
    parts = image.parts()
    with tempfile.TemporaryDirectory(prefix="xenbus-xen-") as name:
        work = Path(name)
        prepare(parts, work, "shell", [], 0)
        line = command(parts, work / "dom0.img", work / "results.img", "mon:stdio")
        return subprocess.run(line, check=False, preexec_fn=_die_with_parent).returncode


def pytest_arguments(what: str, given: list[str]) -> list[str]:
    """`test` leaves out what is marked `features`, unless files or a marker expression are named."""
    named = [argument for argument in given if argument.startswith("tests/")]
    chosen = given if named else ["tests/xen", *given]
    return chosen if named or what == "all" or "-m" in given else [*chosen, "-m", "not features"]


def _ended(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["test", "all", "bench", "shell", "build"])
    parser.add_argument("--seconds", type=int, help="how long the tests may take in dom0")
    parser.add_argument("--results", type=Path, default=ROOT / "xen-results")
    options, arguments = parser.parse_known_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)  # so that what was begun is undone
    absent = image.missing()
    if absent:
        sys.stderr.write(f"this needs, as root: {absent}\n")
        return 69  # EX_UNAVAILABLE
    if options.what == "build":
        image.parts()
        progress.step("")
        return 0
    if options.what == "shell":
        return shell()
    seconds = options.seconds or SECONDS[options.what]
    if options.what == "bench":
        if os.getloadavg()[0] > 0.5:
            sys.stdout.write(
                f"this machine is busy, load {os.getloadavg()[0]:.1f}: the figures will say little\n"
            )
        return test(arguments, seconds, options.results, "bench")
    return test(pytest_arguments(options.what, arguments), seconds, options.results)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
