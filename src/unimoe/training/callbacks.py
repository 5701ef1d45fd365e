"""What is watched during training, for `transformers.Trainer`: what is trained, how tokens are routed, which data was bad."""

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_unimoe.modality_routing import TOKEN_TYPES
from ..routing import PADDING, RoutingCounter
from .parts import training_report

_LAYER = re.compile(r"language_model\.(?:.*\.)?layers\.(\d+)\.")


class RouterMonitor(TrainerCallback):
    """Adds to each log, over the real tokens of the training batches since the last one:

    - `expert_load/<modality>/<e>`: share of the choices of the modality's tokens that went to expert e, mean over layers;
    - `router_entropy/<modality>`: mean entropy of the routers' distributions, as a part of the largest possible one;
    - `expert_load_max/<layer>`: the largest share of one expert among all tokens of a layer (1 / E where balanced);
    - `dropped/<layer>`: share of the choices that an expert at its capacity dropped, where the model has capacities.

    With several processes their counts are summed.

    Attributes:
        load: after a log, for each layer the choices [5 modalities, E] that it is made of.
    """

    def __init__(self):
        self.load: dict[int, torch.Tensor] = {}
        self._counter: RoutingCounter | None = None
        self._handles: list[Any] = []
        self._dropped: dict[int, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        """Puts hooks on the routers of the decoder; a model without any is left alone."""
        self._remove()
        counter = RoutingCounter(model, chosen=_LAYER.search, when=_is_trained)
        if not counter.routers:
            return
        self._counter = counter
        counter.attach()
        limited = {
            int(found[1]): module.experts
            for name, module in model.named_modules()
            if getattr(getattr(module, "capacity", None), "train_factor", None)
            and (found := _LAYER.search(f"{name}."))
        }
        self._limited = sorted(limited)
        for layer, experts in limited.items():
            self._handles.append(
                experts.register_forward_pre_hook(lambda m, inputs, layer=layer: self._see_weights(inputs, layer))
            )

    @torch.no_grad()
    def _see_weights(self, inputs: tuple, layer: int) -> None:
        weights_TK, types_T = inputs[2], self._counter.types_T
        if types_T is None or len(types_T) != len(weights_TK):
            return
        # A dropped choice has no weight left.
        zero_NK = weights_TK[types_T != PADDING] == 0
        count = torch.stack([zero_NK.sum(), torch.tensor(zero_NK.numel(), device=zero_NK.device)]).double()
        self._dropped[layer] = self._dropped[layer] + count if layer in self._dropped else count

    def on_log(self, args, state: TrainerState, control, logs: dict[str, float] | None = None, **kwargs):
        """Adds the numbers to the log and to the history of the run; loggers further down the list see them."""
        if logs is None or "loss" not in logs or self._counter is None:
            return
        metrics = self._metrics()
        self._counter.reset()
        self._dropped = {}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove()

    def _remove(self) -> None:
        if self._counter is not None:
            self._counter.detach()
        for handle in self._handles:
            handle.remove()
        self._counter, self._handles, self._dropped = None, [], {}

    def _metrics(self) -> dict[str, float]:
        shares: dict[str, list[float]] = {}
        self.load = {}
        for name in self._counter.routers:
            counts = self._counter.of(name)
            columns = (counts.choices.double(), counts.entropy[:, None], counts.tokens[:, None].double())
            # A process without any token takes part too.
            table = _sum_over_processes(torch.cat(columns, dim=1)).cpu()
            layer, load = int(_LAYER.search(name)[1]), table[: len(TOKEN_TYPES), :-2]
            entropy, tokens = table[: len(TOKEN_TYPES), -2:].unbind(1)
            self.load[layer] = load
            if not tokens.sum():
                continue
            shares[f"expert_load_max/{layer}"] = [float(load.sum(0).max() / load.sum())]
            for number, modality in enumerate(TOKEN_TYPES):
                if tokens[number]:
                    for expert, share in enumerate((load[number] / load[number].sum()).tolist()):
                        shares.setdefault(f"expert_load/{modality}/{expert}", []).append(share)
                    relative = float(entropy[number] / tokens[number]) / math.log(max(load.shape[1], 2))
                    shares.setdefault(f"router_entropy/{modality}", []).append(relative)
        for layer in self._limited:
            dropped, choices = _sum_over_processes(
                self._dropped.get(layer, torch.zeros(2, dtype=torch.double, device=counts.tokens.device))
            ).tolist()
            if choices:
                shares[f"dropped/{layer}"] = [dropped / choices]
        return {name: sum(values) / len(values) for name, values in shares.items()}


def _is_trained(model: nn.Module) -> bool:
    # Without gradients, a step's choices are only counted for its losses; its training pass follows.
    return model.training and torch.is_grad_enabled()


def _sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


class DataMonitor(TrainerCallback):
    """Adds to each log how many records were found bad so far: `data/unreadable`, `data/truncated`, `data/without_answer`.

    With several processes a record that more than one of them found bad counts once.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_log(self, args, state: TrainerState, control, logs: dict[str, float] | None = None, **kwargs):
        """Adds the counts that are not 0."""
        if logs is None or "loss" not in logs:
            return
        if hasattr(self.dataset, "share_marks"):
            self.dataset.share_marks(args.device)
        counts = {f"data/{name}": count for name, count in self.dataset.counts().items() if count}
        logs.update(counts)
        if state.log_history:
            state.log_history[-1].update(counts)


class ReportCallback(TrainerCallback):
    """Prints, before the first step, what is frozen, what is trained and how much memory that takes."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        if state.is_world_process_zero:
            print(training_report(model), flush=True)


def add_monitors(trainer: Trainer) -> None:
    """Gives a trainer the monitors of this file, in front of its loggers, which thereby log what they add."""
    monitors: list[TrainerCallback] = [ReportCallback(), RouterMonitor()]
    if hasattr(trainer.train_dataset, "counts"):
        monitors.append(DataMonitor(trainer.train_dataset))
    trainer.callback_handler.callbacks[:0] = monitors
