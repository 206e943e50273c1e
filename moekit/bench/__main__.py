"""``python -m moekit.bench data`` or ``routing``: a table of figures, each beside what it is compared with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from moekit.bench import data, routing
from moekit.report import versions

BENCHES = {"data": data, "routing": routing}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moekit.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        bench.add_arguments(benches.add_parser(name, help=bench.__doc__.splitlines()[0]))
    args = parser.parse_args()
    rows = BENCHES[args.bench].run(args)
    print(pd.DataFrame(rows).to_string(index=False))
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
