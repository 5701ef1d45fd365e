"""Puts the tables into `docs/claims.md` and draws its plots from the results: `python -m scripts.experiments.report`.

A table stands between `<!-- results -->` and `<!-- end of results -->`. The plots need matplotlib
(`pip install 'unimoe[experiments]'`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from .conditions import RESULTS, Settings
from .tables import all_tables

PAGE = Path("docs/claims.md")


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with all its marked tables replaced.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    for name, table in tables.items():
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, count = marks.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"the page needs '<!-- {name} -->' and '<!-- end of {name} -->' once each")
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    tables = all_tables(results["runs"])
    for name, table in tables.items():
        print(f"## {name}\n\n{table}\n")
    # Here, so that the tables are printed without matplotlib too.
    from .plots import all_plots

    all_plots(results["runs"], Settings(**results["settings"]), args.results.parent)
    args.page.write_text(with_tables(args.page.read_text(), tables))


if __name__ == "__main__":
    main()
