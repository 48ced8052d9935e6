"""The parts of the lab, built once and kept: Xen, a Linux kernel, dom0's root with a guest's in it.

Everything comes from Debian 12's archive by mmdebstrap; nothing is installed on the machine that builds.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpio import Writer

HERE = Path(__file__).parent
NEEDS = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "dpkg-deb": "dpkg"}

PACKAGES = (
    "python3,python3-pytest,python3-pytest-timeout,python3-click,python3-rich,"
    "xen-utils-4.17,xenstore-utils,kmod,iproute2,e2fsprogs,busybox-static"
)
# Images with more in them, by name; what is there besides is the same.
VARIANTS = {"": (), "bench": ("qemu-system-xen", "fio")}
DOM0_MODULES = (
    "xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs xen-blkback xen-netback xen-blkfront "
    "loop tun nbd bridge virtio_pci virtio_blk ext4 crc32c_generic"
).split()
GUEST_MODULES = "crc32c_generic ext4 xen-blkfront".split()
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
    """Where the cached files are."""

    home: Path

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


def missing() -> list[str]:
    """Debian packages that this machine lacks."""
    return [package for program, package in NEEDS.items() if shutil.which(program) is None]


def parts(variant: str = "") -> Parts:
    """The parts for this recipe, or for one of VARIANTS; built if it has changed since the last time."""
    recipe = hashlib.sha256()
    for name in ("image.py", "cpio.py", "fetch.sh"):
        recipe.update((HERE / name).read_bytes())
    home = cache() / (recipe.hexdigest()[:12] + (f"-{variant}" if variant else ""))
    if not home.exists():
        with _making(home) as work:
            _build(work, (*PACKAGES.split(","), *VARIANTS[variant]))
    return Parts(home)


@contextmanager
def _making(home: Path) -> Iterator[Path]:
    """A directory that becomes `home` when all of it is there; what older recipes made goes."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=home.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        yield made
        for old in home.parent.glob("[0-9a-f]" * 12 + home.name[12:]):
            shutil.rmtree(old)
        made.rename(home)


def _build(home: Path, packages: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=home) as name:
        work = Path(name)
        root = work / "root.tar"
        _say("dom0's root, by mmdebstrap")
        _mmdebstrap(root, work, packages)
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


def _mmdebstrap(root: Path, work: Path, packages: Iterable[str]) -> None:
    fetch = f'sh "{HERE / "fetch.sh"}" "$1" "{work}"'
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--customize-hook={fetch}", "bookworm", str(root)]
    subprocess.run(command, check=True)


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
    """The guest's root but for its init: busybox, a few modules and the order to load them in."""
    out = io.BytesIO()
    with Writer(out) as writer, tarfile.open(root) as archive:
        busybox = archive.extractfile("./usr/bin/busybox")
        assert busybox is not None
        for name in ("proc", "sys", "dev", "mnt", "tmp"):
            writer.directory(name)
        writer.node("dev/console", 5, 1)
        writer.file("bin/busybox", busybox.read(), 0o755)
        writer.symlink("bin/sh", "busybox")
        order = []
        for path, data in kernel.with_needed(GUEST_MODULES):
            order.append(path.rpartition("/")[2])
            writer.file(f"modules/{order[-1]}", data)
        writer.file("modules/order", ("\n".join(order) + "\n").encode())
    return out.getvalue()


def _say(what: str) -> None:
    sys.stdout.write(f"building: {what}\n")
    sys.stdout.flush()
