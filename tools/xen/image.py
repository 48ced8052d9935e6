"""The parts of the lab, built once and kept: Xen, a Linux kernel, dom0's root with a guest's in it.

Everything comes from Debian 12's archive by mmdebstrap; nothing is installed on the machine that builds.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import pwd
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import progress
from cpio import Writer

HERE = Path(__file__).parent
NEEDS = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "dpkg-deb": "dpkg"}
KEPT = 3  # images in the cache
BUILD_SECONDS = 900

PACKAGES = (
    "python3,python3-pytest,python3-pytest-timeout,python3-click,python3-rich,"
    "xen-utils-4.17,xenstore-utils,kmod,iproute2,e2fsprogs,busybox-static,mount,nbdkit"
)
# What a named image has in dom0 besides; each is an image of its own.
VARIANTS: dict[str, str] = {"": "", "bench": "qemu-system-xen,fio,iperf3"}
DOM0_MODULES = (
    "xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs xen-blkback xen-netback xen-blkfront "
    "loop tun nbd bridge virtio_pci virtio_blk ext4 crc32c_generic"
).split()
# The Linux guest's: those of "boot" are there from the start, the others when a test says `load NAME`.
GUEST_MODULES = {"boot": "crc32c_generic ext4 xen-blkfront".split(), "network": ["xen-netfront"]}
# Big, and nothing in dom0 reads it: the image is unpacked by an emulated CPU at every boot.
LEFT_OUT = re.compile(
    r"usr/share/(doc|man|locale|zoneinfo|perl|perl5|lintian|bash-completion|info)/"
    r"|usr/bin/perl|usr/lib/x86_64-linux-gnu/(perl|libperl|gconv/|libapt)|usr/lib/udev/hwdb"
    r"|var/(lib/apt|lib/dpkg|cache|log)/|usr/lib/xen-4.17/boot/"
    r"|usr/share/(qemu|seabios|ipxe|icons|mime)/|usr/lib/ipxe/"
    r"|dev/.|proc/.|sys/.|boot/."
)


@dataclass(frozen=True)
class Parts:
    """Where the cached files are. `lock` is held open: nobody removes them while this process lives."""

    home: Path
    lock: int

    @property
    def xen(self) -> Path:
        return self.home / "xen"

    @property
    def kernel(self) -> Path:
        return self.home / "vmlinuz"

    @property
    def dom0(self) -> Path:
        return self.home / "dom0.cpio"


def cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("XENBUS_CACHE") or home / "xenbus-xen")


def missing() -> str:
    """What this machine lacks, as commands; "" if nothing."""
    root = os.geteuid() == 0
    needs = NEEDS if root else NEEDS | {"newuidmap": "uidmap"}
    packages = [package for program, package in needs.items() if shutil.which(program) is None]
    if packages:
        return f"apt-get install --no-install-recommends {' '.join(packages)}"
    name = pwd.getpwuid(os.geteuid()).pw_name
    ranges = Path("/etc/subuid")
    if root or (ranges.exists() and re.search(rf"^{re.escape(name)}:", ranges.read_text(), re.MULTILINE)):
        return ""
    return f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"


def parts(variant: str = "") -> Parts:
    """The parts for this recipe and variant; built if either has changed since the last time.

    Several may ask at once: one builds, the others wait for it. The newest KEPT images stay.
    """
    recipe = hashlib.sha256(VARIANTS[variant].encode())
    for name in ("image.py", "cpio.py", "fetch.sh"):
        recipe.update((HERE / name).read_bytes())
    home = cache() / recipe.hexdigest()[:12]
    home.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _locked(home.with_suffix(".lock")):
            if not home.exists():
                _make(home, VARIANTS[variant])
            with suppress(OSError):  # somebody else's cache: then its owner says what is old
                os.utime(home)
        lock = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if home.exists() and home.stat().st_ino == os.fstat(lock).st_ino:
            return Parts(home, lock)
        os.close(lock)  # removed between the two locks


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process builds it: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(home: Path, packages: str) -> None:
    """`home`, when all of it is there; then what is too old and in nobody's use goes."""
    with tempfile.TemporaryDirectory(prefix="making-", dir=home.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        _build(made, packages)
        made.rename(home)
    images = sorted(home.parent.glob("[0-9a-f]" * 12), key=lambda path: path.stat().st_mtime)
    for old in images[:-KEPT]:
        _remove(old)


def _remove(home: Path) -> None:
    lock = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = home.with_name(f"making-{home.name}-{os.getpid()}")
        home.rename(gone)
        shutil.rmtree(gone)
    except OSError:
        pass  # in use, or not ours
    finally:
        os.close(lock)


def _build(home: Path, packages: str) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=home) as name:
        work = Path(name)
        root = work / "root.tar"
        _say("dom0's root, by mmdebstrap")
        _mmdebstrap(root, packages)
        _packages(root, work)
        _say("hypervisor and kernel")
        (home / "xen").write_bytes(_xen(next(work.glob("xen-hypervisor-*.deb"))))
        kernel = Kernel(next(work.glob("linux-image-*.deb")))
        (home / "vmlinuz").write_bytes(kernel.image)
        _say("dom0's image")
        with (home / "dom0.cpio").open("wb") as out, Writer(out) as writer:
            writer.tar(root, lambda name: not LEFT_OUT.match(name + "/"))
            kernel.add(writer, DOM0_MODULES, f"usr/lib/modules/{kernel.version}")
            writer.file("guest/vmlinuz", kernel.image)
            writer.file("guest/base.cpio", _guest(root, kernel))


def _mmdebstrap(root: Path, packages: str) -> None:
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES},{packages}".rstrip(",")]
    fetch = (HERE / "fetch.sh").read_text().strip()
    command += [f"--customize-hook={fetch}", "bookworm", str(root)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(BUILD_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGTERM)  # it removes what it made
            if isinstance(error, subprocess.TimeoutExpired):
                raise SystemExit(f"mmdebstrap did not end within {BUILD_SECONDS} s") from None
            raise
    if code:
        raise SystemExit(f"mmdebstrap failed: {code}")


def _packages(root: Path, work: Path) -> None:
    """Takes out the packages that fetch.sh put there."""
    with tarfile.open(root) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".deb") else None
            if content is not None:
                (work / Path(member.name).name).write_bytes(content.read())


def _deb(path: Path, names: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The files of a package whose names match."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and names.match(name):
                    content = archive.extractfile(member)
                    yield name, content.read() if content else b""


def _xen(package: Path) -> bytes:
    for _, data in _deb(package, re.compile(r"boot/xen-[\d.]+-amd64\.gz$")):
        return gzip.decompress(data)
    raise SystemExit(f"no hypervisor in {package.name}")


class Kernel:
    """A kernel's image and its modules, by name."""

    def __init__(self, package: Path) -> None:
        self.image = b""
        self.version = ""
        self._modules: dict[str, tuple[str, bytes]] = {}
        wanted = re.compile(
            r"boot/vmlinuz-|(usr/)?lib/modules/[^/]+/(kernel/.*\.ko$|modules\.(order|builtin))"
        )
        for name, data in _deb(package, wanted):
            if "/vmlinuz-" in "/" + name:
                self.image = data
                self.version = name.partition("vmlinuz-")[2]
            else:
                path = name.partition("/modules/")[2].partition("/")[2]
                self._modules[_module_name(path)] = (path, data)

    def with_needed(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """These modules and what they need, (path, data), the needed ones first."""
        found: dict[str, tuple[str, bytes]] = {}

        def add(name: str) -> None:
            if name not in found:
                path, data = self._modules[name]
                depends = re.search(rb"\0depends=([^\0]*)\0", data)
                for needed in (depends[1].decode() if depends else "").split(","):
                    if needed:
                        add(_module_name(needed))
                found[name] = (path, data)

        for name in names:
            add(_module_name(name))
        return list(found.values())

    def add(self, writer: Writer, names: Iterable[str], home: str) -> None:
        for path, data in self.with_needed(names):
            writer.file(f"{home}/{path}", data)
        for name in ("modules.order", "modules.builtin"):
            if name in self._modules:
                writer.file(f"{home}/{name}", self._modules[name][1])


def _module_name(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.removesuffix(".ko").replace("-", "_") if not name.startswith("modules.") else name


def _guest(root: Path, kernel: Kernel) -> bytes:
    """The guest's root but for its init: busybox, modules and the orders to load them in."""
    out = io.BytesIO()
    with Writer(out) as writer, tarfile.open(root) as archive:
        busybox = archive.extractfile("./usr/bin/busybox")
        assert busybox is not None
        for name in ("proc", "sys", "dev", "mnt", "tmp"):
            writer.directory(name)
        writer.node("dev/console", 5, 1)
        writer.file("bin/busybox", busybox.read(), 0o755)
        writer.symlink("bin/sh", "busybox")
        for name, modules in GUEST_MODULES.items():
            needed = {path.rpartition("/")[2]: data for path, data in kernel.with_needed(modules)}
            for file, data in needed.items():
                writer.file(f"modules/{file}", data)
            writer.file(f"modules/{name}", ("\n".join(needed) + "\n").encode())
    return out.getvalue()


def _say(what: str) -> None:
    progress.step(f"building: {what}")
