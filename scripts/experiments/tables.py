"""The Markdown tables of `docs/claims.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev

from .comparisons import (
    COMPARISONS,
    MEASURES,
    SINGLE,
    Run,
    accuracy,
    accuracy_range,
    differences,
    final_loss,
    fluctuation,
    held_out_loss,
    spread,
    verdict,
)
from .conditions import CONDITIONS

MODALITIES = (*SINGLE, "mixed")


def results_table(runs: list[Run]) -> str:
    """Accuracies and held-out loss of every condition."""
    columns: dict[str, Callable[[Run], float]] = {
        name: lambda run, name=name: 100 * run["accuracy"][name] for name in MODALITIES
    }
    head = ["trained model", *MODALITIES, "mean", "held-out loss"]
    rows = []
    for name, group in _by_condition(runs):
        cells = [_mean_and_spread(group, column, 1) for column in (*columns.values(), accuracy)]
        rows.append([CONDITIONS[name].title, *cells, _mean_and_spread(group, held_out_loss, 3)])
    return _table(head, rows)


def spread_table(runs: list[Run]) -> str:
    """How far the modalities lie apart, and how the training loss behaves."""
    head = ["trained model", "spread", "best less worst", "training loss at the end", "its fluctuation"]
    rows = []
    for name, group in _by_condition(runs):
        cells = [_mean_and_spread(group, measure, 1) for measure in (spread, accuracy_range)]
        cells += [_mean_and_spread(group, measure, 3) for measure in (final_loss, fluctuation)]
        rows.append([CONDITIONS[name].title, *cells])
    return _table(head, rows)


def parameters_table(runs: list[Run]) -> str:
    """Parameters of FFNs, experts and routers."""
    rows = []
    for name, group in _by_condition(runs):
        rows.append(
            [CONDITIONS[name].title, *(f"{group[0][key]:,}" for key in ("activated_parameters", "parameters"))]
        )
    return _table(["trained model", "activated for a token", "all"], rows)


def comparisons_table(runs: list[Run], claim: str) -> str:
    """The comparisons that decide on a claim."""
    head = ["model", "against", "measure", "claimed to be", "difference", "by seed", "the claim"]
    rows = []
    for comparison in COMPARISONS:
        values = differences(comparison, runs)
        if comparison.claim != claim or not values:
            continue
        digits = 1 if comparison.measure in (accuracy, spread) else 3
        by_seed = ", ".join(f"{value:+.{digits}f}" for value in values)
        rows.append(
            [
                CONDITIONS[comparison.first].title,
                CONDITIONS[comparison.second].title,
                MEASURES[comparison.measure],
                "larger" if comparison.expected > 0 else "smaller",
                f"{mean(values):+.{digits}f}",
                by_seed,
                verdict(values, comparison.expected),
            ]
        )
    return _table(head, rows)


def routing_table(runs: list[Run]) -> str:
    """The largest share that one expert has of the choices of a kind of token, and the routers' entropy."""
    kinds = ("text", *SINGLE)
    rows = []
    for name, group in _by_condition(runs):
        if not group[0]["expert_load"]:
            continue
        cells = []
        for kind in kinds:
            seen = [run for run in group if kind in run["expert_load"]]
            if not seen:
                cells.append("")
                continue
            share = mean(100 * max(run["expert_load"][kind]) for run in seen)
            entropy = mean(run["router_entropy"][kind] for run in seen)
            cells.append(f"{share:.0f} % / {entropy:.2f}")
        rows.append([CONDITIONS[name].title, *cells])
    return _table(["trained model", *kinds], rows)


def all_tables(runs: list[Run]) -> dict[str, str]:
    """By the name that stands in the page's marks."""
    claims = {f"claim {claim}": comparisons_table(runs, claim) for claim in sorted({c.claim for c in COMPARISONS})}
    return claims | {
        "results": results_table(runs),
        "spread": spread_table(runs),
        "parameters": parameters_table(runs),
        "routing": routing_table(runs),
    }


def _by_condition(runs: list[Run]) -> Iterable[tuple[str, list[Run]]]:
    for name in CONDITIONS:
        group = [run for run in runs if run["condition"] == name]
        if group:
            yield name, group


def _mean_and_spread(runs: list[Run], measure: Callable[[Run], float], digits: int) -> str:
    values = [measure(run) for run in runs]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---" if index == 0 else "---:" for index in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
