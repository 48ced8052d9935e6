"""`python -m bench [--json] [--quick] [NAME ...]`: run all benchmarks, or those named."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.rows import Row, show

# name -> module with `run(quick: bool) -> list[Row]`
BENCHES = {
    "block": "bench.block",
    "devices": "bench.devices",
    "net": "bench.net",
    "startup": "bench.startup",
    "store": "bench.store",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHES)} (all)")
    parser.add_argument("--json", action="store_true", help="print data")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: to see that it runs")
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    rows: list[Row] = []
    for name in options.names or BENCHES:
        print(f"measuring: {name}", file=sys.stderr)
        rows += importlib.import_module(BENCHES[name]).run(options.quick)
    show(rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
