"""The plots of `docs/claims.md`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from .comparisons import SINGLE, Run  # noqa: E402
from .conditions import CONDITIONS, FOUR, Settings  # noqa: E402

MODALITIES = (*SINGLE, "mixed")
SMOOTHING = 15
DPI = 100
ROUTED = ("tuned", "tuned_aux", "copies", "fresh")


def plot_accuracies(runs: list[Run], path: Path) -> None:
    """A panel for each modality: a dot for each seed and a line at their mean."""
    names = [name for name in CONDITIONS if any(run["condition"] == name for run in runs)]
    figure, panels = plt.subplots(1, len(MODALITIES), figsize=(11, 0.36 * len(names) + 1.1), sharey=True)
    for panel, modality in zip(panels, MODALITIES):
        for row, name in enumerate(reversed(names)):
            values = [100 * run["accuracy"][modality] for run in runs if run["condition"] == name]
            panel.plot(values, [row] * len(values), "o", markersize=4, alpha=0.6, color=f"C{names.index(name)}")
            panel.plot([np.mean(values)] * 2, [row - 0.35, row + 0.35], color="black", linewidth=1.2)
        panel.set_title(modality, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(names)), [CONDITIONS[name].title for name in reversed(names)])
    figure.supxlabel("held-out answers that are right, %", fontsize=9)
    _save(figure, path)


def plot_losses(runs: list[Run], settings: Settings, path: Path) -> None:
    """Training losses against the questions seen, those of stage 2 included; thin lines are seeds, thick ones their mean."""
    shown = {
        "same questions": ("tuned", "copies", "wide", "fresh"),
        "stage 3 only": ("tuned", "tuned_aux", "two", "copies_short"),
    }
    figure, panels = plt.subplots(1, len(shown), figsize=(11, 3.6), sharey=True)
    for panel, (title, names) in zip(panels, shown.items()):
        for name in names:
            curves = [np.asarray(run["curve"]) for run in runs if run["condition"] == name]
            if not curves:
                continue
            seen_before = len(FOUR) * settings.expert_steps if CONDITIONS[name].start == "tuned" else 0
            window = min(SMOOTHING, len(curves[0]))
            smooth = [np.convolve(curve, np.ones(window) / window, mode="valid") for curve in curves]
            x = (seen_before + window // 2 + np.arange(len(smooth[0]))) * settings.batch_size
            colour = f"C{list(CONDITIONS).index(name)}"
            for curve in smooth:
                panel.plot(x, curve, linewidth=0.5, alpha=0.4, color=colour)
            panel.plot(x, np.mean(smooth, axis=0), linewidth=1.6, color=colour, label=CONDITIONS[name].title)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("questions seen in stages 2 and 3", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_yscale("log")
        panel.grid(linewidth=0.3, which="both")
        panel.legend(fontsize=8)
    panels[0].set_ylabel(f"training loss, mean of {SMOOTHING} steps", fontsize=9)
    _save(figure, path)


def plot_routing(runs: list[Run], path: Path) -> None:
    """Shares of the experts in the choices of each kind of token, mean over layers, for the first seed of some conditions."""
    chosen = [next((run for run in runs if run["condition"] == name), None) for name in ROUTED]
    chosen = [run for run in chosen if run is not None and run["expert_load"]]
    figure, panels = plt.subplots(1, max(len(chosen), 1), figsize=(11, 2.4), squeeze=False)
    for panel, run in zip(panels[0], chosen):
        kinds = list(run["expert_load"])
        table = 100 * np.array([run["expert_load"][kind] for kind in kinds])
        panel.imshow(table, cmap="Blues", vmin=0, vmax=50, aspect="auto")
        for row, column in np.ndindex(table.shape):
            panel.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=7)
        condition = CONDITIONS[run["condition"]]
        experts = [group[0] for group in condition.experts] if condition.start == "tuned" else range(table.shape[1])
        panel.set_xticks(range(table.shape[1]), experts, fontsize=7)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        panel.set_title(condition.title, fontsize=8)
    _save(figure, path)


def all_plots(runs: list[Run], settings: Settings, folder: Path) -> None:
    plot_accuracies(runs, folder / "accuracy.png")
    plot_losses(runs, settings, folder / "loss.png")
    plot_routing(runs, folder / "routing.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
