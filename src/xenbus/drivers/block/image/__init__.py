"""The test disk that ships: a real ext4 filesystem of 8 MiB with a few files, a few KB when compressed.

Knows its own contents and SHA-256. Knows nothing of storage or drivers. Made by tools/make_image.py.
"""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from xenbus.errors import XenbusError

SIZE = 8 << 20  # bytes
SHA256 = "4dfeb05232be84592bd90ff5131258b2d453507a69158a4d79ac08bbb6d72959"
LABEL = "xenbus"
UUID = "58656e42-7573-4ead-8d69-736b00000001"
_PACKED = "disk.ext4.xz"

# Path in the filesystem -> contents.
FILES: MappingProxyType[str, bytes] = MappingProxyType(
    {
        "README": b"This disk came through a shared ring: grants, an event channel and blkif requests.\n",
        "etc/hostname": b"guest\n",
        "etc/fstab": b"LABEL=xenbus / ext4 defaults 0 1\n",
        "numbers.txt": b"".join(b"%d\n" % n for n in range(2000)),
        "deep/er/and/deeper/leaf": b"found\n",
        "empty": b"",
        "pattern.bin": bytes((n * n >> 4) & 0xFF for n in range(1024)) * 1024,
    }
)
SYMLINKS: MappingProxyType[str, str] = MappingProxyType({"link": "deep/er/and/deeper/leaf"})


def load() -> bytes:
    """The whole image, `SIZE` bytes. Raises XenbusError if it is not the one that was shipped."""
    packed = resources.files(__name__).joinpath(_PACKED).read_bytes()
    try:
        image = lzma.decompress(packed)
    except lzma.LZMAError as error:
        raise XenbusError(f"{_PACKED}: {error}") from None
    found = hashlib.sha256(image).hexdigest()
    if found != SHA256:
        raise XenbusError(f"{_PACKED}: SHA-256 {found}, expected {SHA256}")
    return image


def write_to(path: Path | str) -> Path:
    """Write the image to a new or existing file, with holes where it is zero."""
    image = memoryview(load())
    path = Path(path)
    zero = bytes(4096)
    with path.open("wb") as out:
        out.truncate(SIZE)
        for at in range(0, SIZE, 4096):
            if image[at : at + 4096] != zero:
                out.seek(at)
                out.write(image[at : at + 4096])
    return path
