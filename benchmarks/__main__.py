"""Runs every benchmark: `python -m benchmarks [NAME ...] [--full] [--json FOLDER]`, by default all in their short form."""

import argparse
import importlib.util
from pathlib import Path

# In the order in which one wants to know; those that are not there are left out.
NAMES = (
    "router",
    "sparse_block",
    "products",
    "scaling",
    "generation",
    "preprocessing",
    "loading",
    "conversion",
    "memory",
)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmarks that are asked for; `--json FOLDER` keeps the rows of each in `FOLDER/NAME.json`."""
    present = [name for name in NAMES if importlib.util.find_spec(f"{__package__}.{name}")]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(present)}")
    parser.add_argument("--full", action="store_true", help="all sizes")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="also write the rows there")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(present))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(present)}")
    for name in args.names or present:
        options = ["--full"] if args.full else []
        options += ["--json", str(args.json / f"{name}.json")] if args.json else []
        importlib.import_module(f"{__package__}.{name}").main(options)


if __name__ == "__main__":
    main()
