"""`transformers.Trainer` with the grouped sampler and the monitors; the loop is Trainer's own."""

from typing import Any

from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from .callbacks import add_monitors
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
        add_monitors(self)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """As Trainer's; a batch that none of the trained weights takes part in (a text where a connector is trained) counts as
        one without gradient, instead of stopping the run."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and not loss.requires_grad:
            loss = loss + 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
        return (loss, outputs) if return_outputs else loss

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


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it where several processes resume in mid-epoch."""

    def __init__(self, sampler: ModalityGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))
