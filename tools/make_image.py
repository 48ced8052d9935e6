"""Make src/xenbus/drivers/block/image/disk.ext4.xz and its SHA-256. Needs e2fsprogs.

Run as root, so that the files belong to root: `python tools/make_image.py`. The same e2fsprogs makes the
same bytes: UUIDs, times and owners are fixed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from xenbus.drivers.block import image

CONFIG = """[defaults]
base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
[fs_types]
small = {
}
ext4 = {
features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
}
"""
TIME = 1_600_000_000
HOME = Path(image.__file__).parent


def fill(root: Path) -> list[str]:
    """The tree to be copied; returns its paths, as debugfs names them."""
    for name, data in image.FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o644)
    for name, to in image.SYMLINKS.items():
        (root / name).symlink_to(to)
    paths = sorted(root.rglob("*"), reverse=True)
    for path in [*paths, root]:
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (TIME, TIME), follow_symlinks=False)
    return ["/" + str(path.relative_to(root)) for path in paths] + ["/", "/lost+found"]


def make(work: Path) -> bytes:
    root, disk = work / "root", work / "disk.ext4"
    root.mkdir()
    names = fill(root)
    config = work / "mke2fs.conf"  # not the machine's own
    config.write_text(CONFIG)
    env = os.environ | {"E2FSPROGS_FAKE_TIME": str(TIME), "MKE2FS_CONFIG": str(config)}
    options = f"hash_seed={image.UUID},root_owner=0:0,lazy_itable_init=0,nodiscard"
    mke2fs = ["mke2fs", "-q", "-t", "ext4", "-b", "1024", "-I", "256", "-N", "64", "-J", "size=1", "-m", "0"]
    more = ["-L", image.LABEL, "-U", image.UUID, "-E", options, "-d", str(root), str(disk), "8M"]
    subprocess.run([*mke2fs, *more], check=True, env=env, stdout=subprocess.DEVNULL)
    script = work / "script"
    times = ("atime", "ctime", "mtime", "crtime")
    nsec = [f"sif {name} {field}_extra 0\n" for name in names for field in times]
    sec = [f"sif {name} {field} @{TIME}\n" for name in names for field in times]
    script.write_text("".join(sec + nsec))
    subprocess.run(["debugfs", "-w", "-f", str(script), str(disk)], check=True, env=env, capture_output=True)
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, env=env, capture_output=True)
    return disk.read_bytes()


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        data = make(Path(work))
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    (HOME / "disk.ext4.xz").write_bytes(packed)
    source = HOME / "__init__.py"
    sha = hashlib.sha256(data).hexdigest()
    source.write_text(re.sub(r'SHA256 = ".*"', f'SHA256 = "{sha}"', source.read_text()))
    sys.stdout.write(f"{len(data)} bytes, {len(packed)} packed, SHA-256 {sha}\n")


if __name__ == "__main__":
    main()
