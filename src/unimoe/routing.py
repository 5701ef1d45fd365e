"""Which experts a model sends its tokens to: counted while it runs, for each router and each kind of token.

Works on every model whose routers are of Transformers' form: modules named `...TopKRouter`, or derived from this package's,
that return logits, weights and expert ids. UniMoE models, models made sparse by [`sparsify`], Mixtral and Transformers' other
sparse models are among them.

Shape letters: B batch, S length of a text, T tokens of a call, K experts chosen for each, E experts, M kinds of tokens.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_unimoe.modality_routing import TOKEN_TYPES
from .modeling_unimoe.router import UniMoETopKRouter

# The last kind: tokens of which the model does not tell what they are, as those of a tower or of a model of texts alone.
KINDS = (*TOKEN_TYPES, "all")
PADDING = -1
_PEFT_NAMES = re.compile(r"^base_model\.model\.|\.original_module$|\.modules_to_save\.[^.]+$")


class RouterCounts(NamedTuple):
    """What one router did.

    Attributes:
        choices: int64 [M, E], how often tokens of each of `KINDS` were sent to each expert.
        entropy: float64 [M], the sum over tokens of the entropy of their distribution over the experts, in nats.
        tokens: int64 [M], how many tokens there were.
    """

    choices: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


class RoutingCounter:
    """Counts the choices of a model's routers while it is attached. Padding is left out where a text's mask tells it.

    Args:
        model: may be wrapped, by PEFT for example.
        chosen: which routers to count, by their names in the model; default: all.
        when: asked at each call of the model; calls for which it says no are not counted. Default: all are.

    Attributes:
        routers: the routers that are counted, by their names in the model as it was before PEFT wrapped it.
        types_T: the kind of each token of the model's current text, a place in `KINDS`, or `PADDING`; None where it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Callable[[str], bool] = lambda name: True,
        when: Callable[[nn.Module], bool] = lambda model: True,
    ):
        modules = [
            (_PEFT_NAMES.sub("", name), module)
            for name, module in model.named_modules()
            if isinstance(module, UniMoETopKRouter) or type(module).__name__.endswith("TopKRouter")
        ]
        # PEFT keeps the original beside a router that it trains; only one of them runs.
        self._modules = [(name, module) for name, module in modules if chosen(name)]
        self.routers = dict(self._modules)
        self.types_T: torch.Tensor | None = None
        self._when, self._counts_now = when, False
        self._readers = _readers_of_texts(model, list(self.routers.values()))
        self._handles: list[Any] = []
        self.reset()

    def attach(self) -> None:
        """Counts from now on."""
        self.detach()
        for reader in self._readers:
            self._handles.append(reader.register_forward_pre_hook(self._see_inputs, with_kwargs=True))
        for name, router in self._modules:
            self._handles.append(router.register_forward_hook(lambda m, i, out, name=name: self._see(name, out)))

    def detach(self) -> None:
        """Stops counting; what was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.types_T, self._counts_now = [], None, False

    def reset(self) -> None:
        """Starts again from nothing."""
        self._counts: dict[str, RouterCounts] = {}

    def of(self, name: str) -> RouterCounts:
        """The counts of one router, zeros where it had no token yet."""
        return self._counts[name] if name in self._counts else self._nothing(self.routers[name].weight)

    def _nothing(self, weight_EH: torch.Tensor) -> RouterCounts:
        choices = torch.zeros(len(KINDS), len(weight_EH), dtype=torch.int64, device=weight_EH.device)
        return RouterCounts(choices, choices.new_zeros(len(KINDS), dtype=torch.float64), choices[:, 0].clone())

    def _see_inputs(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.types_T, self._counts_now = None, self._when(model)
        input_ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if not self._counts_now or not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
            return
        if hasattr(model, "token_types"):
            types_BS = model.token_types(input_ids)
        else:
            types_BS = torch.full_like(input_ids, KINDS.index("all"))
        # With a cache, the mask also has what came before.
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= types_BS.shape[1]:
            types_BS = types_BS.masked_fill(mask[:, -types_BS.shape[1] :].to(types_BS.device) == 0, PADDING)
        self.types_T = types_BS.flatten()

    @torch.no_grad()
    def _see(self, name: str, output: tuple) -> None:
        if not self._counts_now:
            return
        logits_TE, _, index_TK = output
        index_TK = index_TK.reshape(-1, index_TK.shape[-1])
        before = self.of(name)
        num_experts, device = before.choices.shape[1], index_TK.device
        types_T = self.types_T
        if types_T is None or len(types_T) != len(index_TK):
            types_T = torch.full((len(index_TK),), KINDS.index("all"), device=device)
        types_T = types_T.to(device)
        entropy_T = torch.zeros(len(index_TK), dtype=torch.float64, device=device)
        if logits_TE is not None:
            log_TE = logits_TE.reshape(-1, num_experts).float().log_softmax(dim=-1)
            entropy_T = -(log_TE.exp() * log_TE).sum(dim=-1).double()
        real_T = types_T != PADDING
        types_T, index_TK, entropy_T = types_T[real_T], index_TK[real_T], entropy_T[real_T]
        cells_TK = types_T[:, None] * num_experts + index_TK
        # Ids beyond the last mark experts held elsewhere.
        choices = torch.bincount(cells_TK[index_TK < num_experts], minlength=len(KINDS) * num_experts)
        entropy = entropy_T.new_zeros(len(KINDS)).index_add_(0, types_T.long(), entropy_T)
        found = RouterCounts(choices.view(-1, num_experts), entropy, torch.bincount(types_T, minlength=len(KINDS)))
        self._counts[name] = RouterCounts(*(old.to(device) + new for old, new in zip(before, found)))


class RoutingRecord:
    """What [`record_routing`] has counted, so far or in the end; `print` shows it as a table.

    Tokens are those of every call, generated ones included (the last one of a text is not put in again, so it is not counted).
    """

    def __init__(self, counter: RoutingCounter):
        self._counter = counter

    @property
    def counts(self) -> dict[str, dict[str, torch.Tensor]]:
        """For each router by its name in the model, and each kind of token that it had ("text", "image", "video", "audio",
        "speech"; "all" where the model does not tell): int64 [E], how often each expert was chosen."""
        return {
            name: {kind: counts.choices[number].cpu() for number, kind in _kinds_of(counts)}
            for name, counts in self._each()
        }

    @property
    def shares(self) -> dict[str, dict[str, torch.Tensor]]:
        """`counts` as parts of one: float64 [E]."""
        return {
            name: {kind: count.double() / count.sum() for kind, count in kinds.items()}
            for name, kinds in self.counts.items()
        }

    @property
    def entropy(self) -> dict[str, dict[str, float]]:
        """The mean entropy of the tokens' distributions over the experts, as a part of the largest possible: 1 is undecided."""
        return {
            name: {
                kind: float(counts.entropy[number] / counts.tokens[number]) / math.log(max(counts.choices.shape[1], 2))
                for number, kind in _kinds_of(counts)
            }
            for name, counts in self._each()
        }

    def _each(self) -> Iterator[tuple[str, RouterCounts]]:
        return ((name, self._counter.of(name)) for name in self._counter.routers)

    def __str__(self) -> str:
        rows = [
            (name, kind, str(int(counts.tokens[number])), *_percentages(counts.choices[number]))
            for name, counts in self._each()
            for number, kind in _kinds_of(counts)
        ]
        if not rows:
            return "no token has been routed yet"
        experts = range(max(len(row) for row in rows) - 3)
        header = ("router", "tokens of", "number", *(f"expert {number}" for number in experts))
        rows = [header, *(row + ("",) * (len(header) - len(row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = (
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells)
            )
            for cells in (zip(row, widths) for row in rows)
        )
        return "\n".join(line.rstrip() for line in lines)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Counts, inside the `with`, which experts each router of a model chooses, for each kind of token.

    Args:
        model: any model with routers of Transformers' form, or one wrapped by PEFT.

    Returns:
        The record, which can be read at any time, afterwards too.

    Raises:
        ValueError: the model has no such router.
    """
    counter = RoutingCounter(model)
    if not counter.routers:
        raise ValueError(
            f"{type(model).__name__} has no router: none of its modules is a TopKRouter; see unimoe.sparsify"
        )
    counter.attach()
    try:
        yield RoutingRecord(counter)
    finally:
        counter.detach()


def _readers_of_texts(model: nn.Module, routers: list[nn.Module]) -> list[nn.Module]:
    """The innermost modules that are given the ids of the texts for these routers: what is outside may be passed by."""
    modules = list(model.modules())
    readers = [module for module in modules if hasattr(type(module), "token_types")]
    if readers:
        return readers[-1:]
    inside = {module: set(module.modules()) for module in modules if isinstance(module, PreTrainedModel)}
    whole = [module for module, parts in inside.items() if set(routers) <= parts] or [model]
    if not getattr(getattr(whole[-1], "config", None), "is_encoder_decoder", False):
        return whole[-1:]
    # Encoder and decoder read different texts, and `generate` calls the encoder by itself.
    return list({[module for module, parts in inside.items() if router in parts][-1]: None for router in routers})


def _kinds_of(counts: RouterCounts) -> list[tuple[int, str]]:
    return [(number, kind) for number, kind in enumerate(KINDS) if counts.tokens[number]]


def _percentages(choices_E: torch.Tensor) -> list[str]:
    return [f"{share:.0%}" for share in (choices_E.double() / choices_E.sum()).tolist()]
