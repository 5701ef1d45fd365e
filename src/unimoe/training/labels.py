"""From a record to what the model is trained on: ids, labels on the assistant's words alone, features of the media."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from ..processing.call_options import CallOptions
from ..processing.media_inputs import ARGUMENTS, PerText
from ..processing.prompting import expand_segments, split_prompt, tokenize_pieces
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
    """

    inputs: dict[str, torch.Tensor]
    truncated: bool

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted; the first of a row never is."""
        return int((self.inputs["labels"][1:] != IGNORED).sum())


def check_processor(processor: Any) -> None:
    """Refuses a processor that cannot tell answers from questions.

    Raises:
        DataError: its template has no `{% generation %}`, or its tokenizer does not tell where a token stands.
    """
    template = processor._resolve_chat_template(None)
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
    texts, spans = render_jinja_template(
        conversations=[record.messages],
        chat_template=processor._resolve_chat_template(None),
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    pieces = split_prompt(texts[0], processor.placeholders)
    media = {kind: [PerText(record.media[kind])] if record.media.get(kind) else None for kind in ARGUMENTS}
    slots = processor._assign([pieces], media)
    options = CallOptions.read({}, {})
    segments = tokenize_pieces(processor.tokenizer, pieces)
    features, repeats = processor._prepare_media(slots, options)
    towers = [processor._tower(slot.kind) for slot in slots[0]]
    lengths = [processor.num_tokens(tower) * count for tower, count in zip(towers, repeats[0])]
    token_ids = [getattr(processor, f"{tower}_token_id") for tower in towers]
    row = expand_segments(segments, lengths, token_ids, spans[0])
    end = _cut(row["mm_token_type_ids"], segments, lengths, max_length)
    truncated = end < len(row["input_ids"])
    ids = torch.tensor(row["input_ids"][:end])
    answers = torch.tensor(row["assistant_masks"][:end], dtype=torch.bool)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(answers, ids, torch.full_like(ids, IGNORED)),
    }
    for tower in dict.fromkeys(towers):
        rows = int((ids == getattr(processor, f"{tower}_token_id")).sum()) // processor.num_tokens(tower)
        for name in TOWER_INPUTS[tower]:
            if rows and name in features:
                inputs[name] = torch.as_tensor(features[name][:rows])
    return Sample(inputs, truncated)


def _cut(types: list[int], segments: list, lengths: list[int], max_length: int | None) -> int:
    """Where a row ends: at `max_length`, or at the beginning of the medium that stands there."""
    if max_length is None or len(types) <= max_length:
        return len(types)
    start, media = 0, iter(lengths)
    for segment in segments:
        end = start + (next(media) if segment.kind is not None else len(segment.ids))
        if segment.kind is not None and start < max_length < end:
            return start
        start = end
    return max_length
