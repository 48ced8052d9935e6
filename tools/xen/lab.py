"""A real Xen and dom0 under QEMU's software emulation, the working tree in it: `make xen-test` and others.

    python tools/xen/lab.py test [--seconds N] [--results DIR] [pytest's arguments]
    python tools/xen/lab.py bench [--seconds N] [--results DIR] [bench.xen's arguments]
    python tools/xen/lab.py shell
    python tools/xen/lab.py build

Needs no root, no hardware support, and changes nothing on the machine: what it keeps is in $XENBUS_CACHE
(~/.cache/xenbus-xen), what a run says in the results' directory. The exit code of `test` is pytest's, 70 if
dom0 did not come to its end.
"""

from __future__ import annotations

import argparse
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
from cpio import Writer

ROOT = Path(__file__).parents[2]
TREES = ("src", "tests", "bench")
RESULTS_SIZE = 256 << 20  # of the disk by which dom0 hands out its results; sparse
LOST = 70  # sysexits.h, EX_SOFTWARE
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
        writer.file("xenbus/pyproject.toml", (ROOT / "pyproject.toml").read_bytes())
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


def run(parts: image.Parts, work: Path, log: Path, seconds: int) -> None:
    """Boots, shows what comes after dom0 is up, writes all of it to `log`. Ends it when its time is over."""
    line = command(parts, work / "dom0.img", work / "results.img", "stdio")
    with (
        log.open("wb") as out,
        subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu,
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
                shown = shown or text.startswith("== ")
                if shown and not text.startswith("(XEN)"):
                    sys.stdout.write(text + "\n")
                    sys.stdout.flush()
        except KeyboardInterrupt:
            qemu.send_signal(signal.SIGTERM)
        finally:
            timer.cancel()


def collect(disk: Path, results: Path) -> int:
    """Unpacks what dom0 wrote to its disk; answers pytest's exit code, LOST if there is none."""
    try:
        with tarfile.open(disk, mode="r:") as archive:
            archive.extractall(results, filter="data")
        return int((results / "exit").read_text())
    except (tarfile.TarError, OSError, ValueError):
        return LOST


def table(junit: Path) -> str:
    """One line a test, slowest last."""
    rows = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        kinds = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        name = f"{case.get('classname', '').removeprefix('tests.xen.')}::{case.get('name')}"
        rows.append((float(case.get("time", 0)), (kinds or ["passed"])[0], name))
    return "\n".join(f"{kind:8} {seconds:7.2f} s  {name}" for seconds, kind, name in sorted(rows))


def test(arguments: list[str], seconds: int, results: Path, mode: str = "test") -> int:
    """Also benchmarks, with `mode` "bench" and the image of that name."""
    began = time.monotonic()
    parts = image.parts("bench" if mode == "bench" else "")
    built = time.monotonic()
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="xenbus-xen-") as name:
        work = Path(name)
        prepare(parts, work, mode, arguments, seconds)
        run(parts, work, results / "console.log", seconds + 120)
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
        return subprocess.run(line, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["test", "bench", "shell", "build"])
    parser.add_argument("--seconds", type=int, default=480, help="how long the tests may take in dom0")
    parser.add_argument("--results", type=Path, default=ROOT / "xen-results")
    options, arguments = parser.parse_known_args()
    absent = image.missing()
    if absent:
        sys.stderr.write(f"apt-get install --no-install-recommends {' '.join(absent)}\n")
        return 69  # EX_UNAVAILABLE
    if options.what == "build":
        image.parts()
        return 0
    if options.what == "shell":
        return shell()
    if options.what == "bench":
        if os.getloadavg()[0] > 0.5:
            sys.stdout.write(
                f"this machine is busy, load {os.getloadavg()[0]:.1f}: the figures will say little\n"
            )
        return test(arguments, options.seconds, options.results, "bench")
    return test(arguments or ["tests/xen"], options.seconds, options.results)


if __name__ == "__main__":
    sys.exit(main())
