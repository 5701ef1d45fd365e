"""What does the sparse block cost, against a dense FFN of the same activated work?

Prints, for each experts implementation, the median time of a forward and of a forward and backward pass as a ratio to the
dense FFN measured in the same round. Machines differ and are shared: only the ratios mean anything.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import unimoe

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# batched_mm gathers the weights of every token's experts, which beyond a few tokens is more than the memory.
BATCHED_MM_TOKENS = 32


class DenseFfn(nn.Module):
    """A gated FFN with as much work per token as `top_k` experts."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def forward(module: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run():
        with torch.no_grad():
            module(hidden_states)

    return run


def forward_backward(module: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run():
        module.zero_grad()
        module(hidden_states.detach().requires_grad_()).sum().backward()

    return run


def compare(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each; every round runs all, so that a busy moment hits them alike."""
    times = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=2816)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[4])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    dense = DenseFfn(args.hidden_size, args.top_k * args.intermediate_size)
    print(f"times as multiples of a dense FFN of equal activated work; float32, top-{args.top_k}")
    print(f"{'pass':<18}{'experts':>8}{'tokens':>8}" + "".join(f"{name:>14}" for name in IMPLEMENTATIONS))
    for num_experts in args.num_experts:
        block = unimoe.UniMoESparseMoeBlock(args.hidden_size, args.intermediate_size, num_experts, args.top_k)
        for tokens in args.tokens:
            hidden_states = torch.randn(tokens, args.hidden_size)
            for name, make in (("forward", forward), ("forward+backward", forward_backward)):
                row = {}
                for implementation in IMPLEMENTATIONS:
                    if implementation == "batched_mm" and tokens > BATCHED_MM_TOKENS:
                        continue
                    block.experts.config._experts_implementation = implementation
                    times = compare(
                        {"block": make(block, hidden_states), "dense": make(dense, hidden_states)}, args.rounds
                    )
                    row[implementation] = times["block"] / times["dense"]
                cells = "".join(f"{row[i]:>14.2f}" if i in row else f"{'-':>14}" for i in IMPLEMENTATIONS)
                print(f"{name:<18}{num_experts:>8}{tokens:>8}{cells}", flush=True)


if __name__ == "__main__":
    main()
