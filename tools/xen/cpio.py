"""Writes the "newc" cpio archives that Linux unpacks as its initial root. Needs no root and no cpio(1).

The format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux. Archives may follow
each other in one file, each padded to 4 bytes; of a path that comes twice the later one wins.
"""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TYPES = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Writer:
    """A context manager; the trailer is written at its end."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._parents: set[str] = set()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._entry("TRAILER!!!", 0)

    def _entry(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        owner: tuple[int, int] = (0, 0),
        device: tuple[int, int] = (0, 0),
        mtime: int = 0,
    ) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, *owner, 1, mtime, len(data), 0, 0, *device, len(raw), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        self._out.write(head + bytes(-len(head) % 4))
        self._out.write(data + bytes(-len(data) % 4))

    def _make_parents(self, name: str) -> None:
        """A file whose directory is not there yet would be left out."""
        for parent in reversed(Path(name).parents):
            path = str(parent)
            if path != "." and path not in self._parents:
                self._parents.add(path)
                self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644, *, mtime: int = 0) -> None:
        self._make_parents(name)
        self._entry(name, stat.S_IFREG | mode, data, mtime=mtime)

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._make_parents(name)
        self._parents.add(name)
        self._entry(name, stat.S_IFDIR | mode)

    def symlink(self, name: str, target: str) -> None:
        self._make_parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def node(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self._make_parents(name)
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def tar(self, source: Path, keep: Callable[[str], bool]) -> None:
        """What `keep` says yes to of a tar archive. A hard link becomes a copy."""
        with tarfile.open(source) as archive:
            for member in archive:
                name = member.name.removeprefix("./").strip("/")
                if name in ("", ".") or not keep(name):
                    continue
                if member.isdir():
                    self._parents.add(name)
                owner = (member.uid, member.gid)
                if member.isfile() or member.islnk():
                    content = archive.extractfile(member)
                    data = content.read() if content else b""
                    self._entry(name, stat.S_IFREG | member.mode, data, owner, mtime=int(member.mtime))
                else:
                    data = member.linkname.encode() if member.issym() else b""
                    device = (member.devmajor, member.devminor)
                    self._entry(name, _TYPES[member.type] | member.mode, data, owner, device)
