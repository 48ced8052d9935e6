"""Programs that nobody here wrote, where they are installed: what they make of our store and our export."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from xenbus.errors import XenbusError

DEADLINE = 60.0
# Programs that copy an export to a file, with what stands before the URI.
_COPIES = {"nbdcopy": (), "qemu-img": ("convert", "-f", "raw", "-O", "raw")}


async def _run(*command: str, environment: dict[str, str] | None = None) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    try:
        async with asyncio.timeout(DEADLINE):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise XenbusError(f"{command[0]} did not end within {DEADLINE:g} s") from None
    if process.returncode:
        raise XenbusError(f"{command[0]} failed: {err.decode(errors='replace').strip()}")
    return out


async def xenstore_ls(root: Path) -> int:
    """The nodes that Debian's xenstore-ls lists; 0 if it is not installed."""
    if shutil.which("xenstore-ls") is None:
        return 0
    out = await _run("xenstore-ls", "-f", environment={"XENSTORED_RUNDIR": str(root / "xenstored")})
    return len(out.splitlines())


async def nbd_programs(socket: Path, folder: Path) -> dict[str, str | None]:
    """Each installed program's name, with the SHA-256 of what it read (None: it reads no data)."""
    uri = f"nbd+unix:///?socket={socket}"
    found: dict[str, str | None] = {}
    if shutil.which("nbdinfo"):
        await _run("nbdinfo", uri)
        found["nbdinfo"] = None
    for name, before_uri in _COPIES.items():
        if shutil.which(name):
            out = folder / f"{name}.copy"
            await _run(name, *before_uri, uri, str(out))
            found[name] = hashlib.sha256(out.read_bytes()).hexdigest()
            out.unlink()
    return found
