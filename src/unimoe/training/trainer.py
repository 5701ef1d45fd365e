"""`transformers.Trainer` with the grouped sampler and the monitors; the loop is Trainer's own."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from ..modeling_unimoe.configuration_unimoe import UniMoEConfig
from ..modeling_unimoe.step_statistics import (
    has_batch_statistics,
    needs_statistics,
    over_processes,
    piece_statistics,
    step_weights,
    sum_of_pieces,
)
from .callbacks import add_monitors
from .parts import CONNECTORS, TOWERS, part_of
from .sampler import ModalityGroupedSampler


class ModalityTrainer(Trainer):
    """A `Trainer` whose processes work on the same mix of modalities in every step; its router losses are those of a whole step,
    however many micro-batches that has.

    A balancing loss over whole batches (`router_loss_scope="batch"`) needs the choices of the whole step before its first
    gradient. With `gradient_accumulation_steps` above 1 they are counted in a forward pass without gradients, with the same
    random numbers, over the step's micro-batches; this costs about a quarter to a third of the step. Other losses need no such
    pass.

    Args:
        sampling: variant of `ModalityGroupedSampler`, "shuffled" or "sorted"; None leaves the order to `Trainer`, as does a
            data set without `types` and `lengths`.
        args, kwargs: as for `Trainer`.

    Raises:
        ValueError: `label_smoothing_factor` is set and the model is one of this package's.
    """

    def __init__(self, *args: Any, sampling: str | None = "shuffled", **kwargs: Any):
        self.sampling = sampling
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None and self._is_unimoe(self.model):
            # Trainer computes that loss itself: without shifting the labels, for classes that it does not know.
            raise ValueError("label_smoothing_factor must be 0: the smoothed loss would leave the router losses out")
        self.model.register_forward_hook(_keep_differentiable)
        add_monitors(self)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, but DDP looks for unused parameters with gradient checkpointing too: whatever a step has no input for,
        towers and connectors that no record needs, gets no gradient."""
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's, but waits for all processes: what is written next marks the checkpoint as whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, but a run that is resumed behind its last step takes no further one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @staticmethod
    def _is_unimoe(model: nn.Module) -> bool:
        return getattr(getattr(model, "config", None), "model_type", None) == UniMoEConfig.model_type

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As Trainer's; remembers the micro-batches of the step."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Counted in the first `training_step`: a run that is resumed here has not its random numbers back yet.
        self._uncounted = batches if len(batches) > 1 and num_items_in_batch is not None else None
        self._step_statistics = None
        return batches, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As Trainer's, with the statistics of the whole step for the router losses."""
        if self._uncounted is not None:
            self._step_statistics = self._count(model, self._uncounted, num_items_in_batch)
            self._uncounted = None
        if self._step_statistics is not None:
            inputs = {**inputs, "step_statistics": self._step_statistics}
        return super().training_step(model, inputs, num_items_in_batch)

    def _count(
        self, model: nn.Module, batches: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int
    ) -> dict[str, torch.Tensor] | None:
        """The statistics of a step that all processes compute in these micro-batches; None where no loss needs any."""
        unwrapped = self.accelerator.unwrap_model(model)
        if not self._is_unimoe(unwrapped) or not needs_statistics(unwrapped.config):
            return None
        config = unwrapped.config
        pieces = []
        runs = has_batch_statistics(config)
        model.train()
        with torch.no_grad(), _same_random_numbers(self.args.device):
            for batch in batches:
                batch = self._prepare_inputs(batch)
                weight = step_weights(batch["labels"], num_items_in_batch).sum()
                outputs = None
                if runs:
                    inputs = {name: value for name, value in batch.items() if name != "labels"}
                    with self.compute_loss_context_manager():
                        outputs = model(**inputs, output_router_logits=True, logits_to_keep=1, use_cache=False)
                pieces.append(piece_statistics(config, batch, weight, outputs))
        return over_processes(sum_of_pieces(pieces))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.sampling is None or not hasattr(dataset, "types"):
            return super()._get_train_sampler(train_dataset)
        sampler = ModalityGroupedSampler(
            dataset.types,
            dataset.lengths,
            self.args.train_batch_size,
            num_processes=max(self.args.world_size // self.get_tp_size(), 1),
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            variant=self.sampling,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.remove_callback(_Epochs)
        self.add_callback(_Epochs(sampler))
        return sampler


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is computed here draws the random numbers that will be drawn after it."""
    numbers, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(numbers)
    numpy.random.set_state(arrays)


def _keep_differentiable(model: nn.Module, inputs: tuple, outputs: Any) -> None:
    """Lets a step go on in which none of the trained weights takes part: a text where only a connector is trained.

    Its loss has no gradient, which would stop the run. DDP moreover waits, on the other processes, for at least one
    parameter of this one, and looks for it in what the forward pass returns. So one takes part, with a gradient of zero.
    """
    loss = getattr(outputs, "loss", None)
    if loss is None or not (model.training and torch.is_grad_enabled()):
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(part_of(name) not in (*TOWERS, *CONNECTORS) for name in trained):
        # The decoder takes part in every step.
        return
    smallest = min(trained.values(), key=torch.numel)
    is_sharded = isinstance(smallest, DTensor)
    # With gradient checkpointing a loss may have a gradient, but for the embeddings of tokens alone.
    if not (is_sharded and loss.requires_grad):
        zero = 0.0 * smallest.sum()
        outputs.loss = loss + (zero.full_tensor() if is_sharded else zero)


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it where several processes resume in mid-epoch."""

    def __init__(self, sampler: ModalityGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))
