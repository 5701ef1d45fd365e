"""What is watched during training, for `transformers.Trainer`: what is trained, how tokens are routed, which data was bad."""

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .parts import training_report

MODALITIES = ("text", "image", "video", "audio", "speech")
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
        self._handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self._counts: dict[int, torch.Tensor] = {}
        self._entropies: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, torch.Tensor] = {}
        self._dropped: dict[int, torch.Tensor] = {}
        self._modality_T: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        """Puts hooks on the routers of the decoder; a model without any is left alone."""
        self._remove()
        routers = [
            (int(found[1]), module)
            for name, module in model.named_modules()
            if type(module).__name__.endswith("TopKRouter") and (found := _LAYER.search(name))
        ]
        whole = next((module for module in model.modules() if hasattr(module, "encode_media")), None)
        if not routers or whole is None:
            return
        self._layers = {layer: router.weight.shape[0] for layer, router in routers}
        self._device = routers[0][1].weight.device
        limited = {
            int(found[1]): module.experts
            for name, module in model.named_modules()
            if getattr(getattr(module, "capacity", None), "train_factor", None)
            and (found := _LAYER.search(f"{name}."))
        }
        self._limited = sorted(limited)
        self._handles = [whole.register_forward_pre_hook(self._see_inputs, with_kwargs=True)]
        for layer, router in routers:
            self._handles.append(router.register_forward_hook(lambda m, i, out, layer=layer: self._see(m, out, layer)))

        for layer, experts in limited.items():
            self._handles.append(
                experts.register_forward_pre_hook(lambda m, inputs, layer=layer: self._see_weights(inputs, layer))
            )

    def _see_inputs(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        self._modality_T = None
        # Without gradients, a step's choices are only counted for its losses; its training pass follows.
        if not model.training or not torch.is_grad_enabled() or input_ids is None:
            return
        modality = torch.zeros_like(input_ids)
        for number, name in enumerate(MODALITIES[1:], 1):
            modality[input_ids == getattr(model.config, f"{name}_token_id")] = number
        if mask is not None and mask.shape == input_ids.shape:
            modality = modality.masked_fill(mask == 0, -1)
        self._modality_T = modality.flatten()

    @torch.no_grad()
    def _see(self, router: nn.Module, output: tuple, layer: int) -> None:
        modality_T = self._modality_T
        logits_TE, _, index_TK = output
        if modality_T is None or logits_TE is None or len(modality_T) != len(logits_TE):
            return
        num_experts = logits_TE.shape[-1]
        real_T = modality_T >= 0
        modality_T, index_TK = modality_T[real_T], index_TK[real_T]
        cells = modality_T[:, None] * num_experts + index_TK
        counts = torch.bincount(cells.flatten(), minlength=len(MODALITIES) * num_experts)
        log_TE = logits_TE[real_T].float().log_softmax(dim=-1)
        entropy_T = -(log_TE.exp() * log_TE).sum(dim=-1).double()
        entropy = torch.zeros(len(MODALITIES), dtype=torch.double, device=modality_T.device)
        entropy.index_add_(0, modality_T, entropy_T)
        for store, value in (
            (self._counts, counts.view(len(MODALITIES), num_experts).double()),
            (self._entropies, entropy),
            (self._tokens, torch.bincount(modality_T, minlength=len(MODALITIES)).double()),
        ):
            store[layer] = store[layer] + value if layer in store else value

    @torch.no_grad()
    def _see_weights(self, inputs: tuple, layer: int) -> None:
        weights_TK = inputs[2]
        if self._modality_T is None or len(self._modality_T) != len(weights_TK):
            return
        # A dropped choice has no weight left.
        zero_NK = weights_TK[self._modality_T >= 0] == 0
        count = torch.stack([zero_NK.sum(), torch.tensor(zero_NK.numel(), device=zero_NK.device)]).double()
        self._dropped[layer] = self._dropped[layer] + count if layer in self._dropped else count

    def on_log(self, args, state: TrainerState, control, logs: dict[str, float] | None = None, **kwargs):
        """Adds the numbers to the log and to the history of the run; loggers further down the list see them."""
        if logs is None or "loss" not in logs or not self._handles:
            return
        metrics = self._metrics()
        self._reset()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._reset()

    def _metrics(self) -> dict[str, float]:
        shares: dict[str, list[float]] = {}
        self.load = {}
        for layer, num_experts in sorted(self._layers.items()):
            empty = torch.zeros(len(MODALITIES), num_experts + 2, dtype=torch.double, device=self._device)
            if layer in self._counts:
                columns = (self._counts[layer], self._entropies[layer][:, None], self._tokens[layer][:, None])
                empty = torch.cat(columns, dim=1)
            # A process without any token takes part too.
            table = _sum_over_processes(empty).cpu()
            load, entropy, tokens = table[:, :num_experts], table[:, -2], table[:, -1]
            self.load[layer] = load
            if not tokens.sum():
                continue
            shares[f"expert_load_max/{layer}"] = [float(load.sum(0).max() / load.sum())]
            for number, name in enumerate(MODALITIES):
                if tokens[number]:
                    for expert, share in enumerate((load[number] / load[number].sum()).tolist()):
                        shares.setdefault(f"expert_load/{name}/{expert}", []).append(share)
                    relative = float(entropy[number] / tokens[number]) / math.log(max(num_experts, 2))
                    shares.setdefault(f"router_entropy/{name}", []).append(relative)
        for layer in self._limited:
            dropped, choices = _sum_over_processes(
                self._dropped.get(layer, torch.zeros(2, dtype=torch.double, device=self._device))
            ).tolist()
            if choices:
                shares[f"dropped/{layer}"] = [dropped / choices]
        return {name: sum(values) / len(values) for name, values in shares.items()}


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
