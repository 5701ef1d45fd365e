"""What the benchmarks share: times taken side by side, tables, JSON.

Machines differ and are shared, so no benchmark reports a time of its own: every number is a ratio of two medians that were
taken in the same rounds of the same process.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

import unimoe


def compare(
    runs: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] | None = None, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each run. Every round runs all of them, so that a busy moment hits them alike.

    With `warm_up` one round goes ahead that is not counted. `before` is called, uncounted, ahead of every run.
    """

    medians = compare_measures({name: timed(run, before) for name, run in runs.items()}, rounds, warm_up)
    return {name: values["seconds"] for name, values in medians.items()}


def timed(run: Callable[[], Any], before: Callable[[], Any] | None = None) -> Callable[[], dict[str, float]]:
    """The run as a measure of its seconds, for `compare_measures`."""

    def measure() -> dict[str, float]:
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - start}

    return measure


def compare_measures(
    runs: dict[str, Callable[[], dict[str, float]]], rounds: int, warm_up: bool = True
) -> dict[str, dict[str, float]]:
    """As `compare`, for runs that take several measures themselves: the median of each."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for round_number in range(rounds + warm_up):
        for name, run in runs.items():
            measures = run()
            if round_number >= warm_up:
                found[name].append(measures)
    return {
        name: {key: statistics.median(values[key] for values in rows) for key in rows[0]}
        for name, rows in found.items()
    }


def read_other_memory() -> None:
    """What the other layers of a model do: push these weights out of the caches, so that no run finds those of the last."""
    _other_memory().sum()


@functools.cache
def _other_memory() -> torch.Tensor:
    return torch.ones(1 << 26)


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all sizes; by default a short form")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds; medians are taken over them")
    return parser


class Report:
    """Rows of ratios, printed as they come.

    Args:
        name: of the benchmark, as in `python -m benchmarks.NAME`.
        question: what it answers, one line.
        args: its parsed options.
    """

    WIDTHS = {"what": 36, "case": 66, "against": 48}

    def __init__(self, name: str, question: str, args: argparse.Namespace):
        self.name, self.question, self.args = name, question, args
        self.rows: list[dict[str, Any]] = []
        logging.disable_progress_bar()
        print(f"\n{question}")
        print("".join(f"{title:<{width}}" for title, width in self.WIDTHS.items()) + f"{'ratio':>7}  goal")

    def add(
        self,
        what: str,
        case: str,
        against: str,
        ratio: float,
        goal: float | None = None,
        lower_is_better: bool = False,
    ) -> None:
        """One comparison.

        Args:
            what: what was measured, as "decode tokens/s": for speeds `ratio` says how many times as fast we are.
            case: sizes and inputs.
            against: the peer.
            ratio: ours to the peer's.
            goal: the least ratio wanted (`lower_is_better`: the largest), where there is one.
            lower_is_better: for memory and for times.
        """
        row = {"what": what, "case": case, "against": against, "ratio": round(ratio, 4)}
        row["lower_is_better"] = lower_is_better
        verdict = ""
        if goal is not None:
            met = ratio <= goal if lower_is_better else ratio >= goal
            row |= {"goal": goal, "met": met}
            verdict = f"  {'<=' if lower_is_better else '>='} {goal:g}: {'met' if met else 'MISSED'}"
        self.rows.append(row)
        cells = "".join(f"{row[title]:<{width}}" for title, width in self.WIDTHS.items())
        print(f"{cells}{ratio:>7.2f}{verdict}", flush=True)

    def finish(self, notes: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Writes the JSON file where one is asked for, and returns the rows."""
        notes = list(notes)
        for note in notes:
            print(f"  {note}")
        if self.args.json is not None:
            options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items() if k != "json"}
            write_json(self.args.json, self.name, self.question, self.rows, options=options, notes=notes)
        return self.rows


def write_json(file: Path, name: str, question: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Rows with what one must know to judge them: machine, versions, options."""
    document = {"benchmark": name, "question": question, **more, "machine": machine(), "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unimoe": unimoe.__version__,
    }


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
