"""Items as the processor sees them, made once and kept small, so that training never waits for Pillow or an FFT.

An item is a list of parts: one picture, the frames of a video, or the chunks of a sound. A part is kept in the least
space that gives back what the processor gave: pictures as the bytes they were resized to, sounds without the padding
behind them (in float16, as noise of one part in two thousand does not matter to training).
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .items import CONTENT_TYPES, make_item

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}
CHUNK_OF_WORK = 250


class Codec:
    """Parts to small arrays [time or colour axis, ...] and back."""

    def __init__(self, processor: Any):
        self.processor = processor
        images, sounds = processor.image_processor, processor.feature_extractor
        self.mean = np.asarray(images.image_mean, np.float32)[:, None, None]
        self.std = np.asarray(images.image_std, np.float32)[:, None, None]
        # What the filterbank of a constant is after normalisation.
        floor = np.log(np.finfo(np.float32).eps)
        self.audio_silence = np.float32((floor - sounds.audio_mean) / (2 * sounds.audio_std))
        self.audio_frames = sounds.audio_num_frames
        self.speech_frames = sounds.speech_num_frames

    def encode(self, content_type: str, media: Any) -> list[np.ndarray]:
        """Through the processor: uint8 [3, R, R], float16 [frames, mel bins] or float16 [frames, mel channels]."""
        sound = {"sampling_rate": self.processor.feature_extractor.sampling_rate}
        options = sound if content_type in ("audio", "speech") else {}
        batch = self.processor(**{ARGUMENTS[content_type]: [media]}, return_tensors="np", **options)
        if content_type in ("image", "video"):
            pixels = batch["pixel_values"] if content_type == "image" else batch["pixel_values_videos"][0]
            return list(np.rint((pixels * self.std + self.mean) * 255).astype(np.uint8))
        if content_type == "audio":
            pairs = zip(batch["input_values"], batch["input_values_mask"])
            return [chunk[: int(mask.sum())].astype(np.float16) for chunk, mask in pairs]
        return [_without_padding(chunk.T).astype(np.float16) for chunk in batch["input_features"]]

    def decode(self, content_type: str, parts: list[np.ndarray], speech_frames: int | None = None) -> np.ndarray:
        """float32 [parts, ...] as the model takes it; `speech_frames` cuts the window of speech short."""
        if content_type in ("image", "video"):
            return (np.stack(parts).astype(np.float32) / 255 - self.mean) / self.std
        if content_type == "audio":
            return np.stack([_padded(part, self.audio_frames, self.audio_silence) for part in parts])
        frames = speech_frames or self.speech_frames
        return np.stack([_padded(part, frames, part[-1, 0]).T for part in parts])


def _without_padding(frames: np.ndarray) -> np.ndarray:
    """Behind a sound all values are one constant; its last frame stays as the sample of it."""
    different = (frames != frames[-1, 0]).any(axis=1)
    return frames[: int(different.nonzero()[0].max()) + 2]


def _padded(part: np.ndarray, frames: int, value: float) -> np.ndarray:
    padded = np.full((frames, part.shape[1]), value, np.float32)
    padded[: len(part)] = part[:frames]
    return padded


class Bank:
    """All items of one kind: `facts[i]` is true of item i, whose parts are `parts(i)`."""

    def __init__(
        self, kind: str, facts: list[dict[str, Any]], values: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ):
        self.kind = kind
        self.facts = facts
        self._values = values
        self._part_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._item_starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.facts)

    def parts(self, index: int) -> list[np.ndarray]:
        starts = self._part_starts[self._item_starts[index] : self._item_starts[index + 1] + 1]
        return [self._values[start:end] for start, end in zip(starts[:-1], starts[1:])]


def _work(
    processor: Any, kind: str, split: str, seed: int, indices: range
) -> tuple[list[dict], list[list[np.ndarray]]]:
    torch.set_num_threads(1)
    codec = Codec(processor)
    items = [make_item(kind, split, index, seed) for index in indices]
    return [item.facts for item in items], [codec.encode(CONTENT_TYPES[kind], item.media) for item in items]


def load_banks(
    processor: Any, sizes: dict[str, int], split: str, seed: int, cache: Path, workers: int
) -> dict[str, Bank]:
    """The first `sizes[kind]` items of each kind, from the cache folder if they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = {kind: cache / f"{kind}-{split}-{size}-{seed}.npz" for kind, size in sizes.items()}
    missing = {kind: sizes[kind] for kind, path in paths.items() if not path.exists()}
    if missing:
        # A forked process could inherit locks that torch's threads hold.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for kind, size in missing.items():
                shares = [range(start, min(start + CHUNK_OF_WORK, size)) for start in range(0, size, CHUNK_OF_WORK)]
                results = list(pool.map(partial(_work, processor, kind, split, seed), shares))
                facts = [fact for share, _ in results for fact in share]
                _save(paths[kind], facts, [parts for _, share in results for parts in share])
    return {kind: _load(kind, path) for kind, path in paths.items()}


def _save(path: Path, facts: list[dict[str, Any]], items: list[list[np.ndarray]]) -> None:
    flat = [part for parts in items for part in parts]
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(
        unfinished,
        facts=np.array(json.dumps(facts)),
        values=np.concatenate(flat),
        lengths=np.array([len(part) for part in flat]),
        counts=np.array([len(parts) for parts in items]),
    )
    unfinished.rename(path)


def _load(kind: str, path: Path) -> Bank:
    with np.load(path, allow_pickle=False) as stored:
        facts = json.loads(str(stored["facts"]))
        return Bank(kind, facts, stored["values"], stored["lengths"], stored["counts"])
