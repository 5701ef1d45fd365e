"""Which numbers decide on which claim, fixed before anything was trained, and the rule by which they decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

Run = dict[str, Any]
SINGLE = ("image", "video", "audio", "speech")
# A training loss is read behind the first half of a run, where the learning rate no longer rises and the loss falls slowly.
SETTLED = 0.5
TREND_WINDOW = 21


def accuracy(run: Run) -> float:
    """Mean over the modalities and the mixed questions, in percent."""
    return 100 * mean(run["accuracy"].values())


def spread(run: Run) -> float:
    """Standard deviation between the accuracies of the four modalities, in percentage points."""
    return 100 * float(np.std([run["accuracy"][name] for name in SINGLE]))


def accuracy_range(run: Run) -> float:
    """The best modality's accuracy less the worst one's, in percentage points."""
    values = [run["accuracy"][name] for name in SINGLE]
    return 100 * (max(values) - min(values))


def held_out_loss(run: Run) -> float:
    return mean(run["loss"].values())


def final_loss(run: Run) -> float:
    """Training loss, mean of the last tenth of the steps."""
    curve = run["curve"]
    return mean(curve[-max(len(curve) // 10, 1) :])


def fluctuation(run: Run) -> float:
    """Standard deviation of the training loss around its own trend, a moving mean, over the second half of the run."""
    curve = np.asarray(run["curve"])
    window = min(TREND_WINDOW, len(curve) // 2 * 2 - 1)
    trend = np.convolve(curve, np.ones(window) / window, mode="valid")
    middle = window // 2
    rest = curve[middle : middle + len(trend)] - trend
    return float(rest[int(len(rest) * SETTLED) :].std())


@dataclass(frozen=True)
class Comparison:
    """`measure` of condition `first` less that of `second`; the claim expects the sign of `expected`."""

    claim: str
    first: str
    second: str
    measure: Callable[[Run], float]
    expected: int


MEASURES = {
    accuracy: "accuracy",
    spread: "spread",
    held_out_loss: "held-out loss",
    final_loss: "training loss at the end",
    fluctuation: "fluctuation of the training loss",
}
COMPARISONS = (
    Comparison("a", "copies", "wide", accuracy, +1),
    Comparison("a", "copies", "wide", spread, -1),
    Comparison("a", "tuned", "wide", accuracy, +1),
    Comparison("a", "tuned", "wide", spread, -1),
    Comparison("b", "tuned", "copies_short", accuracy, +1),
    Comparison("b", "tuned", "copies_short", held_out_loss, -1),
    Comparison("b", "tuned", "copies", accuracy, +1),
    Comparison("b", "tuned", "copies", held_out_loss, -1),
    Comparison("c", "tuned", "two", fluctuation, -1),
    Comparison("c", "tuned", "two", final_loss, -1),
    Comparison("c", "tuned", "two", accuracy, +1),
    Comparison("d", "tuned_aux", "tuned", accuracy, -1),
    Comparison("d", "tuned_aux", "tuned", fluctuation, +1),
    Comparison("d", "copies_short_aux", "copies_short", accuracy, +1),
    Comparison("e", "copies", "fresh", accuracy, +1),
    Comparison("e", "copies", "fresh", held_out_loss, -1),
)


def differences(comparison: Comparison, runs: list[Run]) -> list[float]:
    """One for each seed that both conditions were trained with; they saw the same questions in it."""
    by_seed = {(run["condition"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    return [
        comparison.measure(by_seed[comparison.first, seed]) - comparison.measure(by_seed[comparison.second, seed])
        for seed in seeds
        if (comparison.first, seed) in by_seed and (comparison.second, seed) in by_seed
    ]


def verdict(values: list[float], expected: int) -> str:
    """A sign is found where all seeds have it and their mean is more than twice its standard error."""
    if len(values) < 2:
        return "cannot be told"
    average, error = mean(values), stdev(values) / len(values) ** 0.5
    same_sign = all(value > 0 for value in values) or all(value < 0 for value in values)
    if not same_sign or abs(average) <= 2 * error:
        return "cannot be told"
    return "holds" if average * expected > 0 else "does not hold"
