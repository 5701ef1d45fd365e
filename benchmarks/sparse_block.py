"""What does the sparse block cost, against a dense FFN of the same activated work and against Transformers' implementations?

Every round runs them all. "least" rows divide the least time for the chosen experts by the time of the dense FFN: the longer of
reading their weights, at the speed of the fastest matrix-vector product over all of them, and of the arithmetic, at the speed of
a large product. Where that is above 1, no implementation can be as fast as the dense FFN: it has fewer weights to read.

In full, "products" rows have the chosen experts' two products alone, one after the other on rows that lie ready, with no routing,
gathering, activation or sum: by PyTorch's linear map, by the product of W with rows that are transposed already, or by the
block's own kernels, whichever is fastest in that row.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

import unimoe
from unimoe.modeling_unimoe.sorted_experts import _linear

from .common import Report, arguments, compare, read_other_memory

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
# batched_mm copies the weights of every token's experts, which beyond a few tokens is more than the memory.
BATCHED_MM_TOKENS = 8
# The backward pass of the eager loop fills a gradient of the size of all experts for every expert.
EAGER_BACKWARD_EXPERTS = 8
# Rows and columns of the product whose speed arithmetic is measured by.
LARGE = 1024
# Goals are for float32.
FORWARD_OF_DENSE = {1: 1.05}
# Of a row, and of the geometric mean over the rows of a pass.
GOAL_OF_BEST = 1.0
MEAN_GOALS_OF_BEST = {"forward": 2.0, "forward+backward": 1.5}


class DenseFfn(nn.Module):
    """A gated FFN with as much work per token as `top_k` experts."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LoopOverExperts(nn.Module):
    """The block as the originals run it: experts as modules of their own, one after another, each on its tokens."""

    def __init__(self, block: nn.Module):
        super().__init__()
        experts = block.experts
        self.gate = block.gate
        self.weights = nn.ParameterList(
            nn.Parameter(weight[e].detach())
            for e in range(experts.num_experts)
            for weight in (experts.gate_up_proj, experts.down_proj)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(hidden_states)
        output = torch.zeros_like(hidden_states)
        for expert in range(len(self.weights) // 2):
            token, choice = torch.where(index == expert)
            gate, up = F.linear(hidden_states[token], self.weights[2 * expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.weights[2 * expert + 1])
            output.index_add_(0, token, y * weights[token, choice, None])
        return output


def forward(module: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            module(hidden_states)

    return run


def forward_backward(module: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        module(hidden_states.detach().requires_grad_()).sum().backward()

    return run


def with_implementation(block: nn.Module, name: str, run: Callable[[], None]) -> Callable[[], None]:
    def switched() -> None:
        block.experts.config._experts_implementation = name
        run()

    return switched


def bytes_per_second(block: nn.Module) -> float:
    """The speed of the fastest matrix-vector product over the weights of all experts, the best of some."""
    weight = block.experts.gate_up_proj.detach().flatten(0, 1)
    vector = torch.randn(1, weight.shape[1], dtype=weight.dtype)
    times = []
    for _ in range(4):
        for product in (lambda: torch.mv(weight, vector[0]), lambda: _linear(vector, weight, None)):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return weight.numel() * weight.itemsize / min(times[2:])


def operations_per_second(dtype: torch.dtype) -> float:
    """The speed of a product of large matrices, by the faster of two ways."""
    matrix = torch.randn(LARGE, LARGE, dtype=dtype)
    times = compare({"matmul": lambda: matrix @ matrix, "linear": lambda: F.linear(matrix, matrix)}, 7)
    return 2 * LARGE**3 / min(times.values())


def bytes_of_chosen(block: nn.Module, hidden_states: torch.Tensor) -> int:
    """What must be read: the weights of every expert that has a token."""
    with torch.no_grad():
        chosen = len(block.gate(hidden_states)[2].unique())
    return chosen * sum(p[0].numel() * p.itemsize for p in (block.experts.gate_up_proj, block.experts.down_proj))


def products_alone(block: nn.Module, hidden_states: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Each expert's products with its number of rows, in several ways."""
    experts = block.experts
    with torch.no_grad():
        rows = torch.bincount(block.gate(hidden_states)[2].flatten(), minlength=experts.num_experts).tolist()
    pairs = [
        (weight[expert], torch.randn(count, weight.shape[2], dtype=weight.dtype))
        for expert, count in enumerate(rows)
        if count
        for weight in (experts.gate_up_proj.detach(), experts.down_proj.detach())
    ]
    transposed = [(weight, x.t().contiguous()) for weight, x in pairs]
    return {
        "products: linear": lambda: [F.linear(x, weight) for weight, x in pairs],
        "products: W @ x.T": lambda: [weight @ x for weight, x in transposed],
        "products: own": lambda: [_linear(x, weight, None) for weight, x in pairs],
    }


def rows_of(
    report: Report,
    what: str,
    block: nn.Module,
    dense: nn.Module,
    hidden_states: torch.Tensor,
    case: str,
    speed: float,
) -> None:
    """One pass at one size, against everything that can be compared with it. `speed`: see `operations_per_second`."""
    tokens, experts = len(hidden_states), block.experts.num_experts
    training = what != "forward"
    make = forward_backward if training else forward
    names = [
        name
        for name in TRANSFORMERS
        if not (name == "batched_mm" and tokens > BATCHED_MM_TOKENS)
        and not (name == "eager" and training and experts > EAGER_BACKWARD_EXPERTS)
    ]
    runs = {name: with_implementation(block, name, make(block, hidden_states)) for name in ("unimoe", *names)}
    runs["loop over experts"] = make(LoopOverExperts(block), hidden_states)
    runs["dense FFN"] = make(dense, hidden_states)
    products = products_alone(block, hidden_states) if report.args.full and not training else {}
    runs.update(products)
    times = compare(runs, report.args.rounds, before=read_other_memory)
    block.zero_grad()
    dense.zero_grad()
    report.add(
        what,
        case,
        "dense FFN",
        times["unimoe"] / times["dense FFN"],
        None if training or hidden_states.dtype != torch.float32 else FORWARD_OF_DENSE.get(tokens, 1.0),
        lower_is_better=True,
    )
    if not training:
        top_k = block.gate.top_k
        operations = 2 * tokens * top_k * sum(p[0].numel() for p in block.experts.parameters())
        least = max(bytes_of_chosen(block, hidden_states) / bytes_per_second(block), operations / speed)
        report.add("  least", case, "dense FFN", least / times["dense FFN"], lower_is_better=True)
    if products:
        alone = min(times[name] for name in products)
        report.add("  products", case, "dense FFN", alone / times["dense FFN"], lower_is_better=True)
    best = min(names, key=times.__getitem__)
    goal = GOAL_OF_BEST if hidden_states.dtype == torch.float32 else None
    report.add(what, case, f"best of Transformers ({best})", times[best] / times["unimoe"], goal)
    for name in (*names, "loop over experts"):
        report.add(what, case, name, times[name] / times["unimoe"])


def lora_rows(report: Report, block: nn.Module, hidden_states: torch.Tensor, case: str) -> None:
    """A training step with LoRA (rank 8) on all experts."""
    holder = nn.Module()
    holder.mlp = block
    config = LoraConfig(r=8, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], lora_dropout=0.0)
    adapted = get_peft_model(holder, config).base_model.model.mlp
    run = forward_backward(adapted, hidden_states)
    settings = next(m for m in adapted.modules() if hasattr(m, "has_gate")).config

    def with_setting(name: str) -> Callable[[], None]:
        def switched() -> None:
            settings._experts_implementation = name
            run()

        return switched

    # The eager loop of Transformers' own models merges the adapter anew for every expert; ours reads it once.
    times = compare({name: with_setting(name) for name in ("unimoe", "eager", "grouped_mm")}, report.args.rounds)
    for name in ("eager", "grouped_mm"):
        report.add("LoRA training", case, name, times[name] / times["unimoe"], 1.0)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=2816)
    parser.add_argument("--num-experts", type=int, nargs="+", help="by default 4 and 8, in full also 64")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", help="by default 1, 8, 32 and 256, in full also 1024")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", choices=["forward", "backward", "lora"])
    args = parser.parse_args(argv)
    report = Report("sparse_block", "What does the sparse block cost?", args)
    torch.manual_seed(0)
    speeds: dict[str, float] = {}
    passes = args.passes or ["forward", "backward", "lora"]
    for dtype_name in args.dtypes or (["float32", "bfloat16"] if args.full else ["float32"]):
        dtype = getattr(torch, dtype_name)
        speed = speeds[dtype_name] = operations_per_second(dtype)
        dense = DenseFfn(args.hidden_size, args.top_k * args.intermediate_size).to(dtype)
        for experts in args.num_experts or ([4, 8, 64] if args.full else [4, 8]):
            block = unimoe.UniMoESparseMoeBlock(args.hidden_size, args.intermediate_size, experts, args.top_k).to(
                dtype
            )
            for tokens in args.tokens or ([1, 8, 32, 256, 1024] if args.full else [1, 8, 32, 256]):
                hidden_states = torch.randn(tokens, args.hidden_size, dtype=dtype)
                case = f"{dtype_name}, {experts} experts, {tokens} tokens"
                if "forward" in passes:
                    rows_of(report, "forward", block, dense, hidden_states, case, speed)
                if "backward" in passes and (args.full or args.tokens or tokens in (1, 32)):
                    rows_of(report, "forward+backward", block, dense, hidden_states, case, speed)
            if "lora" in passes and experts <= EAGER_BACKWARD_EXPERTS and (args.full or experts == 4):
                tokens = 32
                hidden_states = torch.randn(tokens, args.hidden_size, dtype=dtype)
                lora_rows(report, block, hidden_states, f"{dtype_name}, {experts} experts, {tokens} tokens")
            del block
    add_means(report)
    return report.finish(
        f"a product of {LARGE} x {LARGE} matrices in {name} reaches {speed / 1e9:.0f} GFLOP/s in this run"
        for name, speed in speeds.items()
    )


def add_means(report: Report) -> None:
    """The geometric mean over all rows against the best of Transformers, for each dtype and pass."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in report.rows:
        if row["against"].startswith("best of Transformers"):
            ratios.setdefault((row["case"].split(",")[0], row["what"]), []).append(row["ratio"])
    for (dtype, what), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        goal = MEAN_GOALS_OF_BEST[what] if dtype == "float32" else None
        report.add(what, f"{dtype}, mean of {len(values)} rows", "best of Transformers", mean, goal)


if __name__ == "__main__":
    main()
