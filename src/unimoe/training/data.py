"""A data set of conversations that decodes its media lazily, in the workers of the data loader."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..processing.media import MediaError
from ..processing.media_inputs import SOUNDS
from .labels import Sample, check_processor, encode
from .records import DataError, mix_type, read_records

logger = logging.get_logger(__name__)


class ConversationDataset(Dataset):
    """Conversations with their media, as `Trainer` takes them; all records are checked when it is made.

    Args:
        files: one JSON or JSONL file or several, see `read_records`.
        processor: the model's `UniMoEProcessor`.
        media_root: folder that relative paths start from; None for the folder of each data file.
        max_length: the longest row in tokens; None for the processor's own `max_length`. A longer record is cut without
            cutting a medium, and counted.
        on_unreadable: what happens when a file that was there turns out unreadable: "skip" takes the next record of the
            same mix of modalities in its place, reports and counts it; "stop" ends the run.
        check_files: False does not look for the media files beforehand.

    Attributes:
        types: the mix of modalities of each record, see `mix_type`.
        lengths: the length of each record, see `Record`.

    Raises:
        DataError: there are no records, or some cannot be used; names each by index.
        ValueError: `on_unreadable` is unknown, or `max_length` is not positive.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        processor: Any,
        *,
        media_root: str | os.PathLike | None = None,
        max_length: int | None = None,
        on_unreadable: str = "skip",
        check_files: bool = True,
    ):
        if on_unreadable not in ("skip", "stop"):
            raise ValueError(f"on_unreadable={on_unreadable!r} is unknown; it is 'skip' or 'stop'")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, or None for the processor's, got {max_length}")
        check_processor(processor)
        self.processor = processor
        self.max_length = processor.max_length if max_length is None else max_length
        self.on_unreadable = on_unreadable
        self.records = read_records(files, processor, media_root, check_files)
        self.types = [mix_type(record.media, processor.towers) for record in self.records]
        self.lengths = [record.length for record in self.records]
        # Shared with the workers, which are the ones that decode.
        self._marks = {
            name: torch.zeros(len(self.records), dtype=torch.bool).share_memory_()
            for name in ("unreadable", "truncated", "without_answer")
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The record, decoded; see `on_unreadable`.

        Raises:
            DataError: neither it nor any other record of its mix can be used.
            IndexError: there is no such record.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        reasons = []
        for candidate in self._candidates(index):
            record = self.records[candidate]
            try:
                sample = encode(self.processor, record, self.max_length)
            except MediaError as error:
                if self.on_unreadable == "stop":
                    raise DataError(f"{record.name}: {error}") from None
                reasons.append(str(error))
                self._mark("unreadable", candidate, reasons[-1])
                continue
            if sample.truncated:
                self._mark("truncated", candidate, f"cut to {self.max_length} tokens")
            if not sample.num_labels:
                reasons.append(f"no answer within {self.max_length} tokens")
                self._mark("without_answer", candidate, f"{reasons[-1]}, left out")
                continue
            if sample.lost_kind:
                # It is not of its mix any more, and the processes of a step count on that.
                reasons.append(f"a medium is not within {self.max_length} tokens")
                continue
            return sample
        name = self.records[index].name
        raise DataError(f"{name}: neither this record nor any other of its mix can be used: {reasons[0]}")

    def media_kinds(self) -> set[str]:
        """The kinds of media in all records; each sound is of the kind of the tower that it goes through."""
        kinds = {kind for record in self.records for kind in record.media}
        sounds = set(SOUNDS) & set(self.processor.towers)
        return (kinds - set(SOUNDS)) | sounds if len(sounds) == 1 and kinds & set(SOUNDS) else kinds

    def counts(self) -> dict[str, int]:
        """How many records were found `unreadable`, `truncated` or `without_answer` so far, each counted once."""
        return {name: int(marks.sum()) for name, marks in self._marks.items()}

    def share_marks(self, device: torch.device | str = "cpu") -> None:
        """Makes `counts` those of all processes; every process must call it.

        Args:
            device: where tensors that are sent must lie.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for marks in self._marks.values():
                everywhere = marks.to(device=device, dtype=torch.uint8)
                torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
                marks |= everywhere.cpu().bool()

    def _candidates(self, index: int) -> Iterator[int]:
        """The record itself, then those of the same mix that follow it, round to the first."""
        index %= len(self)
        yield index
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.types[other] == self.types[index] and not self._marks["unreadable"][other]:
                yield other

    def _mark(self, name: str, index: int, reason: str) -> None:
        if not self._marks[name][index]:
            self._marks[name][index] = True
            logger.warning(f"{self.records[index].name}: {reason}")
