"""The disk that ships is the one its module describes; e2fsprogs are the judges where they are installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

import pytest

from xenbus.drivers.block import image
from xenbus.errors import XenbusError

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} (e2fsprogs) is not installed")
    return found


def debugfs(disk, request: str) -> bytes:
    done = subprocess.run([tool("debugfs"), "-R", request, str(disk)], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_image_has_its_size_and_its_sum():
    data = image.load()
    assert len(data) == image.SIZE
    assert hashlib.sha256(data).hexdigest() == image.SHA256
    assert data[1024 + 56 : 1024 + 58] == b"\x53\xef"  # ext4's magic in its superblock


def test_the_written_file_is_the_image(tmp_path):
    path = image.write_to(tmp_path / "disk.img")
    assert path.read_bytes() == image.load()
    assert path.stat().st_blocks * 512 < image.SIZE  # holes stay holes


def test_a_damaged_package_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(image, "SHA256", "0" * 64)
    with pytest.raises(XenbusError, match=r"disk\.ext4\.xz: SHA-256 .* expected 0000"):
        image.load()


def test_e2fsck_finds_nothing_wrong(tmp_path):
    disk = image.write_to(tmp_path / "disk.img")
    done = subprocess.run([tool("e2fsck"), "-fn", str(disk)], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", image.FILES)
def test_debugfs_reads_each_file(tmp_path, name):
    disk = image.write_to(tmp_path / "disk.img")
    assert debugfs(disk, f'cat "/{name}"') == image.FILES[name]


def test_debugfs_shows_the_label_and_the_link(tmp_path):
    disk = image.write_to(tmp_path / "disk.img")
    assert image.LABEL.encode() in debugfs(disk, "show_super_stats -h")
    for name, to in image.SYMLINKS.items():
        assert to.encode() in debugfs(disk, f'stat "/{name}"')
