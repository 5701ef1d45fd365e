"""How fast does a whole model read and write, against Transformers' Llava with a Mixtral decoder of the same sizes and
weights, and against the way in which the original systems generate?

The original way: no cache of keys and values, and the towers run again for every token.
"""

import statistics
import time

import torch
from transformers import PreTrainedModel

from .common import Report, arguments, compare, compare_measures
from .models import SMALL, Sizes, give_weights, peer_model, prompt, set_experts, unimoe_model

# Llava's default comes first; the full form has the others, which are as fast or slower.
PEER_EXPERTS = ("grouped_mm", "eager", "batched_mm")
# batched_mm is several times slower, so fewer of its steps are taken.
BATCHED_TOKENS = 4
DECODE_GOAL, ORIGINAL_WAY_GOAL = 1.2, 10.0


class TokenClock:
    """A streamer that notes when each token comes; the prompt is the first thing that it gets."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        return self.times[2] - self.times[0]

    @property
    def step(self) -> float:
        return statistics.median(after - before for before, after in zip(self.times[2:-1], self.times[3:]))


def generate(model: PreTrainedModel, inputs: dict, num_tokens: int, **kwargs) -> torch.Tensor:
    """Greedy ids of exactly `num_tokens` new tokens."""
    output = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: dict, num_tokens: int) -> dict[str, float]:
    """Seconds of a prefill, until the first token, and of a decode step."""
    start = time.perf_counter()
    model(**inputs, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    clock = TokenClock()
    generate(model, inputs, num_tokens, streamer=clock)
    return {"prefill": prefill, "first token": clock.first, "decode": clock.step}


def peer_rows(report: Report, sizes: Sizes, num_tokens: int, rounds: int, peers: tuple[str, ...]) -> None:
    """UniMoE and Llava read one image and text; only Llava's experts implementation varies."""
    peer, ours = peer_model(sizes), unimoe_model(sizes)
    give_weights(peer, ours)
    inputs = prompt(sizes)
    same = torch.equal(generate(peer, inputs, 4), generate(ours, inputs, 4))
    assert same, "the models generate different tokens"
    batched_limit = 64 * sizes.top_k

    def run_peer(experts: str):
        def run() -> dict[str, float]:
            set_experts(peer, experts)
            return measure(peer, inputs, num_tokens)

        return run

    def run_batched() -> dict[str, float]:
        # For a whole prompt it would gather gigabytes of weights.
        set_experts(peer, "grouped_mm")
        with torch.no_grad():
            cache = peer(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        set_experts(peer, "batched_mm")
        return {"decode": _decode(peer, cache, inputs, min(num_tokens, BATCHED_TOKENS))}

    num_prompt = inputs["input_ids"].shape[1]
    runs = {"ours": lambda: measure(ours, inputs, num_tokens)}
    for experts in peers:
        gathers = experts == "batched_mm" and num_prompt > batched_limit
        runs[experts] = run_batched if gathers else run_peer(experts)
    medians = compare_measures(runs, rounds)
    for key, what in (
        ("prefill", "prefill tokens/s"),
        ("first token", "time to first token"),
        ("decode", "decode tokens/s"),
    ):
        theirs = {name: values[key] for name, values in medians.items() if name != "ours" and key in values}
        best = min(theirs, key=theirs.get)
        for name in dict.fromkeys((PEER_EXPERTS[0], best)):
            label = f"Llava-Mixtral, {name}" + (" (default)" if name == PEER_EXPERTS[0] else " (its best)")
            case = f"{sizes}; {num_prompt} + {num_tokens} tokens"
            goal = DECODE_GOAL if key == "decode" else None
            report.add(what, case, label, theirs[name] / medians["ours"][key], goal)


@torch.no_grad()
def _decode(model: PreTrainedModel, cache, inputs: dict, num_tokens: int) -> float:
    """Seconds of a step, the steps written out."""
    token, mask = inputs["input_ids"][:, -1:], inputs["attention_mask"]
    times = []
    for _ in range(num_tokens):
        start = time.perf_counter()
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        output = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def original_way(model: PreTrainedModel, inputs: dict, num_tokens: int) -> torch.Tensor:
    """Greedy ids, every step a pass over everything. (Kinder than the originals: logits of the last position alone.)"""
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    ids = inputs["input_ids"]
    for _ in range(num_tokens):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1, **media)
        ids = torch.cat([ids, output.logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, inputs["input_ids"].shape[1] :]


def original_way_row(report: Report, sizes: Sizes, num_tokens: int, rounds: int) -> None:
    model = unimoe_model(sizes, sound=True)
    inputs = prompt(sizes, sound=True)
    found = {}
    runs = {
        "ours": lambda: found.update(ours=generate(model, inputs, num_tokens)),
        "original": lambda: found.update(original=original_way(model, inputs, num_tokens)),
    }
    # What is run once at first is small beside the rest.
    generate(model, inputs, 2)
    times = compare(runs, rounds, warm_up=False)
    assert torch.equal(found["ours"], found["original"]), "the two ways generate different tokens"
    case = f"{num_tokens} tokens from image and sound; {sizes}"
    goal = ORIGINAL_WAY_GOAL if num_tokens >= 64 else None
    report.add("generation", case, "no cache, towers at each step", times["original"] / times["ours"], goal)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--tokens", type=int, default=17, help="tokens to generate beside the peer")
    parser.add_argument("--original-tokens", type=int, default=64, help="tokens to generate in the original way")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how fast")
    args = parser.parse_args(argv)
    report = Report("generation", "How fast does a whole model generate?", args)
    small = Sizes(hidden_size=512, intermediate_size=1408, num_heads=8, num_key_value_heads=8, image_size=168)
    all_sizes = [Sizes()]
    if args.tiny:
        small, all_sizes = SMALL, [SMALL]
    elif args.full:
        all_sizes += [small, Sizes(num_layers=8), Sizes(num_experts=8), Sizes(dtype=torch.bfloat16)]
    for sizes in all_sizes:
        peer_rows(report, sizes, args.tokens, args.rounds, PEER_EXPERTS if args.full else PEER_EXPERTS[:1])
    for sizes in [small, Sizes()] if args.full else [small]:
        original_way_row(report, sizes, args.original_tokens, 3 if args.full else 1)
    return report.finish()


if __name__ == "__main__":
    main()
