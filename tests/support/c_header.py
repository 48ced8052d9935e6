"""What a C compiler makes of Xen's headers, as Debian installs them (libxen-dev). No test here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

INCLUDES = Path("/usr/include/xen")


def values(folder: Path, header: str, expressions: Iterable[str]) -> dict[str, int]:
    """Each expression of `xen/io/<header>`, by its text. Skips where that is not installed."""
    if not (INCLUDES / "io" / header).exists():
        pytest.skip("libxen-dev is not installed")
    wanted = list(expressions)
    prints = "\n".join(f'  printf("%ld\\n", (long)({expression}));' for expression in wanted)
    (folder / "it.c").write_text(f"""
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
typedef uint32_t grant_ref_t;
typedef unsigned int RING_IDX;
#define xen_mb()
#define xen_wmb()
#define xen_rmb()
#include <xen/xen.h>
#include <xen/io/{header}>
int main(void) {{
{prints}
  return 0;
}}
""")
    built = subprocess.run(["cc", "-o", "it", "it.c"], cwd=folder, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    said = subprocess.run([folder / "it"], capture_output=True, text=True, check=True).stdout
    return dict(zip(wanted, map(int, said.split()), strict=True))
