"""How much memory do loading and generating take, against Transformers' Llava-Mixtral of the same sizes?

Every measure is the peak of a process of its own, less that of one which only imports. Ratios below one are ours to win.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlavaForConditionalGeneration

import unimoe

from .common import Report, arguments
from .generation import generate
from .models import SMALL, Sizes, give_weights, peer_model, prompt, unimoe_model

SIZES = Sizes(num_layers=2)
MODELS = {"ours": unimoe.UniMoEForConditionalGeneration, "peer": LlavaForConditionalGeneration}


def child(model: str, folder: str | None, tiny: bool) -> None:
    """What the measured process does: it loads, then generates; without a folder it has only imported."""
    if folder is not None:
        loaded = MODELS[model].from_pretrained(folder).eval()
    print("PEAK", _peak())
    if folder is not None:
        generate(loaded, prompt(SMALL if tiny else SIZES), 8)
    print("PEAK", _peak())


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which a child inherits from its parent.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(model: str, folder: Path | None, tiny: bool) -> dict[str, int]:
    """Peak bytes of a process that loads, and when it has generated, too."""
    code = f"from benchmarks.memory import child; child({model!r}, {folder and str(folder)!r}, {tiny})"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    if run.returncode:
        raise RuntimeError(run.stderr)
    loading, generating = map(int, re.findall(r"PEAK (\d+)", run.stdout))
    return {"loading": loading, "generating": generating}


def rows(report: Report, sizes: Sizes, tiny: bool, folder: Path, rounds: int) -> None:
    peer, ours = peer_model(sizes), unimoe_model(sizes)
    give_weights(peer, ours)
    ours.save_pretrained(folder / "ours")
    # In one form with the stacked experts that it has in memory, in one as it is published.
    peer.save_pretrained(folder / "stacked", save_original_format=False)
    peer.save_pretrained(folder / "apart")
    weights = sum(tensor.nbytes for tensor in ours.state_dict().values())
    del peer, ours
    nothing = measure("ours", None, tiny)["loading"]
    case = f"{sizes}, {weights / 1e9:.2f} GB"
    found: dict[str, list[dict[str, int]]] = {"ours": [], "stacked": [], "apart": []}
    for _ in range(rounds):
        for name, peaks in found.items():
            peaks.append(measure("ours" if name == "ours" else "peer", folder / name, tiny))
    for task in ("loading", "generating"):
        peak = {name: statistics.median(p[task] for p in peaks) - nothing for name, peaks in found.items()}
        what = f"memory of {task}"
        report.add(what, case, "the weights' bytes", peak["ours"] / weights, lower_is_better=True)
        for name, label in (("stacked", "stacked experts"), ("apart", "an expert a tensor")):
            report.add(what, case, f"Llava-Mixtral, {label}", peak["ours"] / peak[name], lower_is_better=True)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how much it takes")
    args = parser.parse_args(argv)
    report = Report("memory", "How much memory does a model take?", args)
    with tempfile.TemporaryDirectory() as folder:
        rows(report, SMALL if args.tiny else SIZES, args.tiny, Path(folder), 3 if args.full else args.rounds)
    return report.finish()


if __name__ == "__main__":
    main()
