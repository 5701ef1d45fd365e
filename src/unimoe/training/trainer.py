"""`transformers.Trainer` with the grouped sampler and the monitors; the loop is Trainer's own."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from .callbacks import add_monitors
from .parts import CONNECTORS, TOWERS, part_of
from .sampler import ModalityGroupedSampler


class ModalityTrainer(Trainer):
    """A `Trainer` whose processes work on the same mix of modalities in every step.

    Args:
        sampling: variant of `ModalityGroupedSampler`, "shuffled" or "sorted"; None leaves the order to `Trainer`, as does a
            data set without `types` and `lengths`.
        args, kwargs: as for `Trainer`.
    """

    def __init__(self, *args: Any, sampling: str | None = "shuffled", **kwargs: Any):
        self.sampling = sampling
        super().__init__(*args, **kwargs)
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
