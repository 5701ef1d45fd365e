"""What the trained towers make of every item, computed once: the three stages never change a tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

import unimoe

from .banks import Bank
from .items import CONTENT_TYPES
from .training_data import Collator, Sample

PARTS_AT_ONCE = 32
# Items per kind whose features are kept; whole windows of speech take the most space and time.
FEATURE_ITEMS = {"word": 5000}


class FeatureBank:
    """The items of a bank; `parts(i)` are the tower's features of item i, float16 [tokens, width] each."""

    def __init__(self, bank: Bank, features: np.ndarray, size: int):
        self.facts = bank.facts[:size]
        counts = [len(bank.parts(index)) for index in range(size)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._features = features

    def __len__(self) -> int:
        return len(self.facts)

    def parts(self, index: int) -> list[np.ndarray]:
        return list(self._features[self._starts[index] : self._starts[index + 1]])


@torch.inference_mode()
def feature_bank(model: unimoe.UniMoEModel, processor: Any, bank: Bank, path: Path) -> FeatureBank:
    """From the file if it is there, else computed and written."""
    size = min(len(bank), FEATURE_ITEMS.get(bank.kind, len(bank)))
    if not path.exists():
        content_type = CONTENT_TYPES[bank.kind]
        parts = [part for index in range(size) for part in bank.parts(index)]
        collator = Collator(processor)
        found = []
        for start in tqdm(range(0, len(parts), PARTS_AT_ONCE), desc=path.stem):
            chunk = parts[start : start + PARTS_AT_ONCE]
            # Frames are pictures to the tower.
            shown = "image" if content_type == "video" else content_type
            media = collator._media([Sample((shown,), "", False, "", [[part]]) for part in chunk])
            encoded = model.encode_media(**media)[shown]
            found.append(encoded.last_hidden_state.to(torch.float16).numpy())
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, np.concatenate(found))
        unfinished.rename(path)
    return FeatureBank(bank, np.load(path, mmap_mode="r"), size)


class FromTowerFeatures(nn.Module):
    """The model behind its towers: connectors and decoder."""

    def __init__(self, model: unimoe.UniMoEForConditionalGeneration):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, features: dict[str, torch.Tensor], counts: dict[str, torch.Tensor], **inputs):
        inner = self.model.model
        connectors = {"audio": inner.audio_connector, "speech": inner.speech_connector}
        encoded = {}
        for content_type, values in features.items():
            embeddings = connectors.get(content_type, inner.vision_connector)(values)
            if content_type == "video":
                count = counts["video"]
                video = torch.arange(len(count)).repeat_interleave(count)
                total = embeddings.new_zeros((len(count), *embeddings.shape[1:])).index_add(0, video, embeddings)
                embeddings = total / count.view(-1, 1, 1)
            encoded[content_type] = BaseModelOutputWithPooling(pooler_output=embeddings)
        return self.model(mm_encoder_outputs=encoded, **inputs)
