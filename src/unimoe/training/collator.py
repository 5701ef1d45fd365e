"""Samples with any media to one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .labels import IGNORED, Sample

_TEXT = ("input_ids", "attention_mask", "labels")


class MultimodalCollator:
    """Pads texts on the right and puts the media of all samples one after the other, as the model reads them.

    Args:
        processor: the model's `UniMoEProcessor`, for its pad token.
        pad_to_multiple_of: widths are rounded up to a multiple of this, for kernels that like it.
    """

    def __init__(self, processor: Any, pad_to_multiple_of: int | None = None):
        # Padding is masked out everywhere, so a tokenizer without a pad token is no obstacle.
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Samples to `input_ids`, `attention_mask`, `labels` [B, S] (-100: not predicted) and the inputs of the towers.

        `pixel_values_videos` [N, F, 3, R, R] is padded to the longest video, with a `video_frame_mask` [N, F] where lengths
        differ.
        """
        rows = [sample.inputs for sample in samples]
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fills[name])
            for name in _TEXT
        }
        missing = -batch["input_ids"].shape[1] % (self.pad_to_multiple_of or 1)
        if missing:
            batch = {name: torch.nn.functional.pad(batch[name], (0, missing), value=fills[name]) for name in _TEXT}
        for name in ("pixel_values", "input_values", "input_values_mask", "input_features"):
            parts = [row[name] for row in rows if name in row]
            if parts:
                batch[name] = torch.cat(parts)
        batch.update(_videos(rows))
        return batch


def _videos(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    videos, masks = [], []
    for row in rows:
        pixels = row.get("pixel_values_videos")
        if pixels is not None:
            videos += list(pixels)
            masks += list(row.get("video_frame_mask", torch.ones(pixels.shape[:2], dtype=torch.long)))
    if not videos:
        return {}
    batch = {"pixel_values_videos": pad_sequence(videos, batch_first=True)}
    mask = pad_sequence(masks, batch_first=True)
    return batch if mask.all() else {**batch, "video_frame_mask": mask}
