"""What does routing cost, against the router of Transformers' Mixtral?

Linear map, top-k and softmax over H = 1024, as a function and as the module of a block; forward, and forward and backward.
"bare calls" rows say what PyTorch's three operations cost, with nothing around them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import unimoe

from .common import Report, arguments, compare

HIDDEN = 1024
# Times as fast as Mixtral's, by tokens.
GOALS = {1: 3.0, 4096: 1.5}
# Runs that are timed together, by tokens: one alone is too short for the clock.
REPETITIONS = {1: 200, 8: 100, 32: 50, 256: 10}


def repeated(run: Callable[[], Any], tokens: int) -> Callable[[], None]:
    times = REPETITIONS.get(tokens, 2)

    def repeat() -> None:
        for _ in range(times):
            run()

    return repeat


def routers(experts: int, top_k: int, dtype: torch.dtype) -> dict[str, Callable]:
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=top_k)
    mixtral = MixtralTopKRouter(config).to(dtype)
    torch.nn.init.normal_(mixtral.weight, std=0.02)
    module = unimoe.UniMoETopKRouter(HIDDEN, experts, top_k).to(dtype)
    weight = module.weight
    weight.data.copy_(mixtral.weight)

    def three_operations(hidden_states: torch.Tensor):
        logits = F.linear(hidden_states, weight)
        chosen, index = torch.topk(logits, top_k)
        return logits, torch.softmax(chosen, -1), index

    return {
        "ours": lambda x: unimoe.fused_topk_router(x, weight, top_k),
        "ours as a module": module,
        "MixtralTopKRouter": mixtral,
        "linear, topk and softmax alone": three_operations,
    }


def forward(router: Callable, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            router(hidden_states)

    return run


def forward_backward(router: Callable, hidden_states: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        logits, weights, _ = router(hidden_states.detach().requires_grad_())
        (weights.sum() + logits.sum()).backward()

    return run


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens routed at a time")
    parser.add_argument("--num-experts", type=int, nargs="+")
    args = parser.parse_args(argv)
    report = Report("router", "What does routing cost, against Transformers' Mixtral router?", args)
    torch.manual_seed(0)
    passes = {"forward": forward, "forward+backward": forward_backward}
    for dtype in [torch.float32, torch.bfloat16] if args.full else [torch.float32]:
        for experts in args.num_experts or ([4, 8, 64] if args.full else [8, 64]):
            candidates = routers(experts, 2, dtype)
            for tokens in args.tokens or ([1, 8, 32, 256, 4096] if args.full else [1, 32, 4096]):
                hidden_states = torch.randn(tokens, HIDDEN, dtype=dtype)
                for name, make in passes.items():
                    runs = {key: repeated(make(router, hidden_states), tokens) for key, router in candidates.items()}
                    times = compare(runs, args.rounds)
                    case = f"{str(dtype).removeprefix('torch.')}, {experts} experts, {tokens} tokens"
                    goal = GOALS.get(tokens) if name == "forward" and dtype == torch.float32 else None
                    peer = times["MixtralTopKRouter"]
                    report.add(name, case, "MixtralTopKRouter", peer / times["ours"], goal)
                    if name == "forward":
                        report.add(name, f"{case}, module", "MixtralTopKRouter", peer / times["ours as a module"])
                        least = times["linear, topk and softmax alone"]
                        report.add("bare calls", case, "MixtralTopKRouter", peer / least)
    return report.finish(
        ["bare calls: how many times as fast PyTorch's linear, topk and softmax are, with nothing around them"]
    )


if __name__ == "__main__":
    main()
