"""How does the cost grow with tokens, with experts and with layers?

The sparse block (H = 1024, I = 2816, top-2, float32) against itself with one token and four experts, and a decoder of several
layers against one of two. Every round runs all sizes.
"""

import torch

import unimoe

from .common import Report, arguments, compare, compare_measures, read_other_memory
from .generation import measure
from .models import SMALL, Sizes, prompt, unimoe_model
from .sparse_block import forward

HIDDEN, INTERMEDIATE, TOP_K = 1024, 2816, 2


def token_rows(
    report: Report, hidden_size: int, intermediate_size: int, tokens: list[int], experts: list[int]
) -> None:
    blocks = {e: unimoe.UniMoESparseMoeBlock(hidden_size, intermediate_size, e, TOP_K) for e in experts}
    inputs = {t: torch.randn(t, hidden_size) for t in tokens}
    runs = {f"{e} experts, {t} tokens": forward(blocks[e], inputs[t]) for e in experts for t in tokens}
    times = compare(runs, report.args.rounds, before=read_other_memory)
    for e in experts:
        for t in tokens:
            case, time = f"float32, {e} experts, {t} tokens", times[f"{e} experts, {t} tokens"]
            if t > 1:
                report.add("block", case, "1 token", time / times[f"{e} experts, 1 tokens"], lower_is_better=True)
            if e != experts[0]:
                few = f"{experts[0]} experts"
                report.add("block", case, few, time / times[f"{few}, {t} tokens"], lower_is_better=True)


def layer_rows(report: Report, sizes: list[Sizes], num_tokens: int) -> None:
    models = {size.num_layers: (unimoe_model(size), prompt(size)) for size in sizes}
    runs = {layers: lambda model=model: measure(*model, num_tokens) for layers, model in models.items()}
    medians = compare_measures(runs, report.args.rounds)
    least = min(medians)
    for layers, values in medians.items():
        if layers != least:
            for what in ("prefill", "decode"):
                ratio = values[what] / medians[least][what]
                size = next(size for size in sizes if size.num_layers == layers)
                report.add(f"{what} step", str(size), f"{least} layers", ratio, lower_is_better=True)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how it grows")
    args = parser.parse_args(argv)
    report = Report("scaling", "How does the cost grow with tokens, experts and layers?", args)
    torch.manual_seed(0)
    if args.tiny:
        token_rows(report, 64, 96, [1, 8], [4])
        layer_rows(report, [SMALL, Sizes(**{**vars(SMALL), "num_layers": 4})], 4)
    else:
        tokens = [1, 8, 32, 256, 1024] if args.full else [1, 8, 32, 256]
        token_rows(report, HIDDEN, INTERMEDIATE, tokens, [4, 8, 64] if args.full else [4, 16])
        small = {"hidden_size": 512, "intermediate_size": 1408, "num_heads": 8, "num_key_value_heads": 8}
        layers = [2, 4, 8, 16] if args.full else [2, 4, 8]
        layer_rows(report, [Sizes(num_layers=number, image_size=112, **small) for number in layers], 9)
    return report.finish()


if __name__ == "__main__":
    main()
