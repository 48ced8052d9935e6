"""`python -m tests.xenstore.fuzz`: the targets under atheris, guided by coverage, for as long as one likes.

Each target runs in a process of its own, from seeds/ and from what earlier runs found worth keeping (--keep).
What fails is written beside it, with how to run it again; it belongs into seeds/ then.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

SEEDS = Path(__file__).with_name("seeds")
# target -> (module, the seeds it begins with)
TARGETS = {
    "wire": ("tests.support.store_fuzz", "wire"),
    "oxenstored": ("tests.support.store_fuzz", "wire"),
    "client": ("tests.support.store_fuzz", "client"),
    "state": ("tests.support.store_fuzz", "state"),
    "recording": ("tests.support.store_fuzz", "recording"),
    "codecs": ("tests.support.store_fuzz", "codecs"),
    "socket": ("tests.support.store_fuzz_live", "wire"),
    "ring": ("tests.support.store_fuzz_live", "ring"),
}
# Bytes: a few messages. Seconds: one case.
LONGEST, TIMEOUT = 8192, 25


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.xenstore.fuzz", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="what is kept between runs")
    parser.add_argument("--run", type=Path, help="run this one input, with a traceback, and end")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all of them if none is named")
    return parser


def fuzz(target: str, seconds: int, keep: Path) -> None:
    """In a process of its own: does not return."""
    import atheris

    module, seeds = TARGETS[target]
    with atheris.instrument_imports(include=["xenbus.xenstore", "xenbus.ring"]):
        function = getattr(importlib.import_module(module), target)
    corpus = keep / target
    corpus.mkdir(parents=True, exist_ok=True)
    # What the engine itself would let pass, a million bytes in one payload, only costs time here.
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={TIMEOUT}"]
    options = [*limits, "-print_final_stats=1", f"-artifact_prefix={keep}/{target}-"]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(SEEDS / seeds)], function)
    atheris.Fuzz()


def main() -> int:
    options = _parser().parse_args()
    targets = options.targets or list(TARGETS)
    if options.run is not None:
        getattr(importlib.import_module(TARGETS[targets[0]][0]), targets[0])(options.run.read_bytes())
        print(f"{options.run}: nothing is wrong with it")
        return 0
    seconds = max(1, round(options.minutes * 60 / len(targets)))
    if options.child:
        fuzz(targets[0], seconds, options.keep)
    failed = []
    for target in targets:
        print(f"== {target}: {seconds} s", flush=True)
        command = [sys.executable, "-m", "tests.xenstore.fuzz", "--child", "--keep", str(options.keep)]
        minutes = f"--minutes={seconds / 60}"
        if subprocess.run([*command, minutes, target], check=False).returncode:
            failed.append(target)
            print(
                f"== {target} failed; see {options.keep}/{target}-*; again: --run FILE {target}", flush=True
            )
    print(f"failed: {' '.join(failed)}" if failed else "nothing was found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
