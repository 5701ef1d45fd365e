"""Modality-level data parallelism (Uni-MoE, section 3.3): all processes of a step work on the same mix of modalities.

A step costs what its slowest process takes, and an idle tower has no gradients to average. So samples are grouped by their
mix, and a group is handed out in megabatches of `batch_size * num_batches`, one batch for each process and accumulation.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

VARIANTS = ("shuffled", "sorted")


class ModalityGroupedSampler(Sampler[int]):
    """Indices in an order in which consecutive batches, one a process, hold one mix of modalities.

    Every record comes at least once an epoch. What is left of a group behind its last whole megabatch fills whole steps,
    the last of them with records of the same group a second time; these steps come last.

    Args:
        types: mix of modalities of each record, see `mix_type`.
        lengths: length of each record; long ones come together.
        batch_size: samples in one process's batch.
        num_processes: processes that share a step.
        gradient_accumulation_steps: batches that one process adds up for a step.
        variant: "shuffled" shuffles a group and sorts each megabatch by length (Uni-MoE v1.5); "sorted" sorts the whole
            group (Uni-MoE 8e), which wastes less padding and sees the same records together in every epoch.
        drop_last: leave out the last megabatch of every group, even a whole one, as the originals do.
        seed: of the order. The order depends on it and on the epoch alone, so a run can be resumed anywhere.

    Raises:
        ValueError: there are no records, an argument is out of range, or with `drop_last` nothing is left.
    """

    def __init__(
        self,
        types: Sequence[int],
        lengths: Sequence[int],
        batch_size: int,
        *,
        num_processes: int = 1,
        gradient_accumulation_steps: int = 1,
        variant: str = "shuffled",
        drop_last: bool = False,
        seed: int = 0,
    ):
        if len(types) != len(lengths) or not types:
            raise ValueError(
                f"types ({len(types)}) and lengths ({len(lengths)}) must be of the same records, at least one"
            )
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown; it is one of {VARIANTS}")
        for name, value in (
            ("batch_size", batch_size),
            ("num_processes", num_processes),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.types, self.lengths, self.batch_size = list(types), list(lengths), batch_size
        self.num_processes, self.num_batches = num_processes, num_processes * gradient_accumulation_steps
        self.variant, self.drop_last, self.seed, self.epoch = variant, drop_last, seed, 0
        self._length = len(self.order())
        if not self._length:
            raise ValueError("drop_last leaves no records: no group has more than one megabatch")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; `Trainer` calls this at the beginning of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def order(self) -> list[int]:
        """All indices of the epoch. Epoch 0 of seed s is drawn as the originals draw after `torch.manual_seed(s)`."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        megabatch, step = self.batch_size * self.num_batches, self.batch_size * self.num_processes
        whole: list[list[int]] = []
        steps: list[list[int]] = []
        for kind in sorted(set(self.types)):
            group = self._grouped([i for i, other in enumerate(self.types) if other == kind], generator)
            cuts = [group[start : start + megabatch] for start in range(0, len(group), megabatch)]
            last = cuts.pop()
            whole += cuts
            if self.drop_last:
                continue
            if len(last) == megabatch:
                whole.append(last)
            else:
                missing = -len(last) % step
                last = last + (group * (missing // len(group) + 1))[:missing]
                steps += [last[start : start + step] for start in range(0, len(last), step)]
        order = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        if steps:
            order += [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        return [index for batch in order for index in batch]

    def _grouped(self, group: list[int], generator: torch.Generator) -> list[int]:
        def by_length(indices: list[int]) -> list[int]:
            return sorted(indices, key=lambda i: self.lengths[i], reverse=True)

        shuffled = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        if self.variant == "sorted":
            # Equal lengths stay shuffled.
            return by_length(shuffled)
        size = self.batch_size * self.num_batches
        result = []
        for start in range(0, len(shuffled), size):
            for chunk in self._even_chunks(by_length(shuffled[start : start + size])):
                result += chunk
        return result

    def _even_chunks(self, indices: list[int]) -> list[list[int]]:
        """A megabatch, sorted by length, as one batch for each process and accumulation, of nearly equal total lengths."""
        if len(indices) % self.num_batches:
            return [indices[i :: self.num_batches] for i in range(self.num_batches)]
        chunks: list[list[int]] = [[] for _ in range(self.num_batches)]
        totals = [0.0] * self.num_batches
        for index in indices:
            shortest = totals.index(min(totals))
            chunks[shortest].append(index)
            totals[shortest] += self.lengths[index]
            if len(chunks[shortest]) == len(indices) // self.num_batches:
                totals[shortest] = float("inf")
        return chunks
