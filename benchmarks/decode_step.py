"""Where does a decode step go, and what could another way to run experts gain?

All parts of a step of one token, beside the bare products of the weights that it needs, called one after the other with
nothing between them: a model without its sparse blocks, and whole models, UniMoE and Transformers' Llava with a Mixtral decoder
of the same weights. The least step is a model without sparse blocks and the bare products of the experts, each in the fastest
way that the package has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from unimoe.modeling_unimoe.sorted_experts import _linear

from .common import Report, arguments, compare_measures, timed
from .generation import TokenClock, generate
from .models import SMALL, Sizes, give_weights, peer_model, prompt, set_experts, unimoe_model


class Nothing(nn.Module):
    """In the place of a sparse block."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@contextmanager
def without_sparse_blocks(model: PreTrainedModel) -> Iterator[None]:
    layers = model.model.language_model.layers
    blocks = [layer.mlp for layer in layers]
    for layer in layers:
        layer.mlp = Nothing()
    yield
    for layer, block in zip(layers, blocks):
        layer.mlp = block


def weights_of(model: PreTrainedModel, top_k: int) -> dict[str, list[torch.Tensor]]:
    """The matrices that a token is multiplied with, by part; experts in turn, since tokens choose differently."""
    found: dict[str, list[torch.Tensor]] = {"attention": [], "experts": [], "head": [model.lm_head.weight]}
    for number, layer in enumerate(model.model.language_model.layers):
        attention = layer.self_attn
        found["attention"] += [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
        experts = layer.mlp.experts
        for choice in range(top_k):
            expert = (number + choice) % experts.num_experts
            found["experts"] += [experts.gate_up_proj[expert], experts.down_proj[expert]]
    return found


def products(weights: list[torch.Tensor]) -> Callable[[], None]:
    pairs = [(torch.randn(1, weight.shape[1], dtype=weight.dtype), weight.detach()) for weight in weights]

    def run() -> None:
        for vector, weight in pairs:
            _linear(vector, weight, None)

    return run


def step_of(model: PreTrainedModel, inputs: dict, num_tokens: int) -> dict[str, float]:
    clock = TokenClock()
    generate(model, inputs, num_tokens, streamer=clock)
    return {"seconds": clock.step}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=9, help="tokens that a round generates")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how fast")
    args = parser.parse_args(argv)
    report = Report("decode_step", "Where does a decode step go?", args)
    torch.manual_seed(0)
    sizes = SMALL if args.tiny else Sizes()
    peer, ours = peer_model(sizes), unimoe_model(sizes)
    give_weights(peer, ours)
    set_experts(peer, "grouped_mm")
    inputs = prompt(sizes)
    parts = {name: products(weights) for name, weights in weights_of(ours, sizes.top_k).items()}

    def bare(model: PreTrainedModel) -> dict[str, float]:
        with without_sparse_blocks(model):
            return step_of(model, inputs, args.tokens)

    runs = {f"products of the {name}": timed(run) for name, run in parts.items()}
    runs["UniMoE without sparse blocks"] = lambda: bare(ours)
    runs["Llava-Mixtral without sparse blocks"] = lambda: bare(peer)
    runs["UniMoE"] = lambda: step_of(ours, inputs, args.tokens)
    runs["Llava-Mixtral"] = lambda: step_of(peer, inputs, args.tokens)
    times = {name: values["seconds"] for name, values in compare_measures(runs, args.rounds).items()}
    whole = sum(seconds for name, seconds in times.items() if name.startswith("products"))
    times["least step"] = times["UniMoE without sparse blocks"] + times["products of the experts"]
    for name, seconds in times.items():
        report.add(name, str(sizes), "bare products, all", seconds / whole, lower_is_better=True)
    gain = times["Llava-Mixtral"] / times["least step"]
    report.add("most that can be gained", str(sizes), "Llava-Mixtral", gain)
    return report.finish()


if __name__ == "__main__":
    main()
