"""Writes what the benchmarks found into a page: `python -m benchmarks.report FOLDER --page docs/performance.md`.

FOLDER holds the files of `python -m benchmarks --json FOLDER`. In the page, what stands between `<!-- NAME -->` and
`<!-- end NAME -->` is written anew: NAME is a file's, "machine" or "goals"; the words around it stay. With matplotlib,
plots are drawn beside the files.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DENSE, LOOP = "dense FFN", "loop over experts"
# Of the sparse block: what a row compares with, and the column's title.
BLOCK_COLUMNS = {
    DENSE: "time / dense FFN",
    "least": "least time / dense FFN",
    "products": "products alone / dense FFN",
    "best of Transformers": "best of Transformers",
    "eager": "eager",
    "grouped_mm": "grouped_mm",
    "batched_mm": "batched_mm",
    LOOP: LOOP,
}
# What bounds the block from below: the name of the rows, and words for a pass that reaches it.
LIMITS = {
    "least": "took the least time",
    "products": "consisted of its experts' products alone, each in the fastest way that was found,",
}
ROUTER_COLUMNS = {
    "forward": "forward",
    "module": "forward, the module",
    "bare calls": "bare calls",
    "forward+backward": "forward and backward",
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The documents by the names of their files: a benchmark may have several, run with other options.

    Raises:
        FileNotFoundError: the folder has none.
    """
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"{folder} has no JSON files: write some by `python -m benchmarks --json {folder}`")
    return found


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]], words: int = 2) -> str:
    """A Markdown table; the first `words` columns are words, the others numbers."""
    titles = list(titles)
    lines = [titles, ["---" if place < words else "---:" for place in range(len(titles))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(row: Row) -> str:
    """The ratio, and whether it misses its goal."""
    value = f"{row['ratio']:.3g}" if row["ratio"] < 100 else f"{row['ratio']:.0f}"
    return f"**{value}**" if row.get("met") else f"{value} (missed)" if "met" in row else value


def case_of(row: Row) -> tuple[str, int, int]:
    """Dtype, experts and tokens of a case such as "float32, 4 experts, 8 tokens"."""
    dtype, experts, tokens = re.match(r"(\w+), (\d+) experts, (\d+) tokens", row["case"]).groups()
    return dtype, int(experts), int(tokens)


def peer_of(row: Row) -> str:
    """The peer without what is said of it in brackets."""
    return row["against"].split(" (")[0]


def pivot(rows: Iterable[tuple[tuple, str, str]], first: list[str], columns: dict[str, str]) -> str:
    """A table of `(key, column, cell)`: a line a key; columns that no key has are left out."""
    lines: dict[tuple, dict[str, str]] = {}
    for key, column, cell in rows:
        lines.setdefault(key, {})[column] = cell
    used = [column for column in columns if any(column in cells for cells in lines.values())]
    body = ([*key, *(cells.get(column, "") for column in used)] for key, cells in lines.items())
    return table([*first, *(columns[column] for column in used)], body, words=0)


def router_tables(document: dict[str, Any]) -> str:
    return pivot(
        (
            (case_of(row), "module" if row["case"].endswith("module") else row["what"], number(row))
            for row in document["rows"]
        ),
        ["dtype", "experts", "tokens"],
        ROUTER_COLUMNS,
    )


def block_tables(document: dict[str, Any]) -> str:
    """A table for each dtype and pass; means and LoRA by themselves."""
    by_table: dict[tuple[str, str], list[tuple[tuple, str, str]]] = {}
    others = []
    for row in document["rows"]:
        what = row["what"].strip()
        if what in (*LIMITS, "forward", "forward+backward") and "tokens" in row["case"]:
            dtype, experts, tokens = case_of(row)
            column = what if what in LIMITS else peer_of(row)
            peer = re.search(r"\((\w+)\)", row["against"])
            cell = number(row) + (f" {peer[1]}" if peer else "")
            key = (dtype, "forward" if what in LIMITS else what)
            by_table.setdefault(key, []).append(((experts, tokens), column, cell))
        else:
            others.append(row)
    pieces = [
        f"{what.replace('+', ' and ').capitalize()}, {dtype}:\n\n{pivot(rows, ['experts', 'tokens'], BLOCK_COLUMNS)}"
        for (dtype, what), rows in by_table.items()
    ]
    pieces += [long_table(others)] if others else []
    return "\n\n".join([*pieces, *block_limit(document["rows"])])


def block_limit(rows: Iterable[Row]) -> list[str]:
    """How far ahead of the best of Transformers a forward pass at each limit would be, as a sentence, if it is known."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        what = row["what"].strip()
        if row["case"].startswith("float32") and what in ("forward", *LIMITS):
            times.setdefault(row["case"], {})[what if what in LIMITS else peer_of(row)] = row["ratio"]
    sentences = []
    for limit, words in LIMITS.items():
        logs = [
            math.log(ratios["best of Transformers"] * ratios[DENSE] / ratios[limit])
            for ratios in times.values()
            if {DENSE, limit, "best of Transformers"} <= set(ratios)
        ]
        if logs:
            mean = math.exp(sum(logs) / len(logs))
            sentences.append(
                f"A forward pass in float32 that {words} would be {mean:.2f} times as fast as the best of Transformers, in the "
                "geometric mean of these rows."
            )
    return sentences


def long_table(rows: Iterable[Row]) -> str:
    """A line a row."""
    return table(
        ["what", "case", "against", "ratio"],
        ([row["what"], row["case"], row["against"], number(row)] for row in rows),
        words=3,
    )


def command(document: dict[str, Any]) -> str:
    """The command line that was run, with the values of all its options."""
    words = [f"python -m benchmarks.{document['benchmark']}"]
    for name, value in document["options"].items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def results(document: dict[str, Any]) -> str:
    """Command, tables and notes of a benchmark."""
    write = {"router": router_tables, "sparse_block": block_tables}.get(document["benchmark"])
    tables = write(document) if write else long_table(document["rows"])
    notes = "".join(f"\n- {note}" for note in document["notes"])
    return f"`{command(document)}`\n\n{tables}" + (f"\n{notes}" if notes else "")


def machines(documents: dict[str, dict[str, Any]]) -> str:
    """Machines and versions, one line where all ran on the same."""
    names: dict[str, list[str]] = {}
    for name, document in documents.items():
        machine = {"gpu": "none", **{k: v for k, v in document["machine"].items() if v is not None}}
        names.setdefault(", ".join(f"{key} {value}" for key, value in machine.items()), []).append(name)
    return "\n".join(f"- {', '.join(those)}: {machine}" for machine, those in names.items())


def goals(documents: dict[str, dict[str, Any]]) -> str:
    """A line for each benchmark, measure, peer and goal: how far the ratios range, and in how many rows it is met."""
    groups: dict[tuple, list[Row]] = {}
    for name, document in documents.items():
        for row in document["rows"]:
            if "goal" in row:
                sign = "≤" if row["lower_is_better"] else "≥"
                what = row["what"] + (", mean of all rows" if "mean of" in row["case"] else "")
                key = (name, what, peer_of(row), f"{sign} {row['goal']:g}")
                groups.setdefault(key, []).append(row)
    lines = []
    for key, rows in groups.items():
        ratios = sorted(row["ratio"] for row in rows)
        measured = f"{ratios[0]:.3g}" + (f" to {ratios[-1]:.3g}" if len(ratios) > 1 else "")
        met = sum(row["met"] for row in rows)
        verdict = "met" if met == len(rows) else "missed" if not met else f"met in {met} of {len(rows)} rows"
        lines.append([*key, measured, verdict])
    return table(["benchmark", "what", "against", "goal", "measured", ""], lines, words=6)


def fill(page: str, pieces: dict[str, str]) -> str:
    """The page with each piece between its marks.

    Raises:
        ValueError: the page has no place for a piece.
    """
    for name, piece in pieces.items():
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, count = marks.subn(lambda match, piece=piece: f"{match[1]}\n{piece}\n\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"the page needs `<!-- {name} -->` and `<!-- end {name} -->` once, each on a line")
    return page


def plot(document: dict[str, Any], folder: Path) -> list[Path]:
    """The sparse block in float32: every implementation beside the dense FFN, a picture a pass.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("svg")
    # Two runs on the same numbers write the same file, and text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "unimoe", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    files = []
    for what in ("forward", "forward+backward"):
        lines: dict[int, dict[str, dict[int, float]]] = {}
        rows = [row for row in document["rows"] if row["what"] == what and row["case"].startswith("float32, ")]
        rows = [row for row in rows if row["case"].endswith("tokens")]
        ours = {case_of(row): row["ratio"] for row in rows if row["against"] == DENSE}
        for row in rows:
            _, experts, tokens = case = case_of(row)
            at = lines.setdefault(experts, {})
            if row["against"] == DENSE:
                at.setdefault("unimoe", {})[tokens] = row["ratio"]
            elif peer_of(row) == row["against"]:
                at.setdefault(row["against"], {})[tokens] = row["ratio"] * ours[case]
        if not lines:
            continue
        figure, axes = plt.subplots(1, len(lines), figsize=(4 * len(lines), 3.2), sharey=True, squeeze=False)
        for axis, (experts, implementations) in zip(axes[0], lines.items()):
            for name, times in implementations.items():
                style = {"linewidth": 2.5, "color": "black"} if name == "unimoe" else {}
                axis.loglog(list(times), list(times.values()), marker="o", markersize=3, label=name, **style)
            axis.axhline(1, color="grey", linestyle="--", linewidth=1)
            axis.set(title=f"{experts} experts", xlabel="tokens")
        axes[0][0].set_ylabel(f"time / dense FFN, {what}")
        handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines() if h.get_label()[0] != "_"}
        axes[0][-1].legend(handles.values(), handles.keys(), fontsize="small")
        figure.tight_layout()
        files.append(folder / f"sparse_block_{what.replace('+', '_')}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        plt.close(figure)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the JSON files are, and the plots go")
    parser.add_argument("--page", type=Path, help="the page to fill in; by default the tables are printed")
    args = parser.parse_args(argv)
    documents = read(args.folder)
    pieces = {"machine": machines(documents), "goals": goals(documents)}
    pieces |= {name: results(document) for name, document in documents.items()}
    if args.page is None:
        print("\n\n".join(pieces.values()))
    else:
        args.page.write_text(fill(args.page.read_text(), pieces))
    if "sparse_block" in documents:
        try:
            plot(documents["sparse_block"], args.folder)
        except ImportError:
            print("without matplotlib there are no plots")


if __name__ == "__main__":
    main()
