"""From a record to what the model is trained on: ids, labels on the assistant's words alone, features of the media."""

from dataclasses import dataclass
from typing import Any

import torch

from .records import DataError, Record

IGNORED = -100
# The model's inputs that come from each tower, one row an item (for sounds: a chunk).
TOWER_INPUTS = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos", "video_frame_mask"),
    "audio": ("input_values", "input_values_mask"),
    "speech": ("input_features",),
}


@dataclass(frozen=True)
class Sample:
    """One record, ready to be collated.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels` int64 [S], and the features of its media.
        truncated: whether it was longer than the context.
        lost_kind: whether that cut away all of its images, all of its videos, and so on.
    """

    inputs: dict[str, torch.Tensor]
    truncated: bool
    lost_kind: bool = False

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted; the first of a row never is."""
        return int((self.inputs["labels"][1:] != IGNORED).sum())


def check_processor(processor: Any) -> None:
    """Refuses a processor that cannot tell answers from questions.

    Raises:
        DataError: its template has no `{% generation %}`, or its tokenizer does not tell where a token stands.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    if "generation" not in template or "endgeneration" not in template:
        raise DataError("the processor's chat template marks no answers: put them inside {% generation %}")
    if not getattr(processor.tokenizer, "is_fast", False):
        name = type(processor.tokenizer).__name__
        raise DataError(f"{name} does not tell which characters a token covers; use the fast tokenizer of its kind")


def encode(processor: Any, record: Record, max_length: int | None = None) -> Sample:
    """Renders the official prompt, decodes the media and marks the answers.

    An answer's tokens are labelled from the first behind "ASSISTANT:" to its `</s>`, as the originals do. Two faults
    of theirs are not imitated: all labels of a sample ignored where the counted tokens of its rounds differ from those of the
    whole (several turns and a tokenizer with `legacy=False`), and the placeholder of a video left as plain text where it is the
    only medium.

    Args:
        processor: a `UniMoEProcessor`.
        record: as `read_records` gives it.
        max_length: a longer row is cut there, or before the medium that would be cut; what follows is left out.

    Raises:
        MediaError: an item cannot be decoded.
        ValueError: items and placeholders do not match.
    """
    encoded = processor.encode_conversation(record.messages, record.media)
    row = encoded.row
    end = _cut(len(row["input_ids"]), encoded.media, max_length)
    truncated = end < len(row["input_ids"])
    ids = torch.tensor(row["input_ids"][:end])
    answers = torch.tensor(row["assistant_masks"][:end], dtype=torch.bool)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(answers, ids, torch.full_like(ids, IGNORED)),
    }
    lost_kind = False
    for tower in dict.fromkeys(tower for tower, _, _ in encoded.media):
        rows = sum(stop - start for other, start, stop in encoded.media if other == tower and stop <= end)
        rows //= processor.num_tokens(tower)
        lost_kind |= rows == 0
        for name in TOWER_INPUTS[tower]:
            if rows and name in encoded.features:
                inputs[name] = torch.as_tensor(encoded.features[name][:rows])
    return Sample(inputs, truncated, lost_kind)


def _cut(length: int, media: list[tuple[str, int, int]], max_length: int | None) -> int:
    """Where a row ends: at `max_length`, or at the beginning of the medium that stands there."""
    if max_length is None or length <= max_length:
        return length
    return next((start for _, start, end in media if start < max_length < end), max_length)
