"""Random questions about the items of the banks, and their batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from unimoe.processing.prompting import expand_segments, split_prompt, tokenize_pieces

from .banks import Bank, Codec
from .questions import DESCRIPTIONS, TASKS, Task, messages, word_question


@dataclass
class Sample:
    content_types: tuple[str, ...]
    phrasing: str
    text_first: bool
    answer: str
    parts: list[list[np.ndarray]]
    descriptions: tuple[str, ...] = ()


class QuestionDataset(Dataset):
    """`size` questions; question i is the same whenever it is asked for."""

    def __init__(self, banks: dict[str, Bank], size: int, seed: int, modalities: tuple[str, ...] | None = None):
        self.banks = banks
        self.size = size
        self.seed = seed
        self.tasks = [task for task in TASKS.values() if modalities is None or task.modality in modalities]
        weights = np.array([task.weight for task in self.tasks])
        self.chances = weights / weights.sum()
        self.candidates = [[_candidates(task, banks[kind]) for kind in task.items] for task in self.tasks]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        choice = int(rng.choice(len(self.tasks), p=self.chances))
        task = self.tasks[choice]
        chosen = [int(rng.choice(candidates)) for candidates in self.candidates[choice]]
        facts = {}
        for kind, item in zip(task.items, chosen):
            facts |= self.banks[kind].facts[item]
        phrasing, text_first = word_question(rng, task, facts), bool(rng.random() < 0.15)
        parts = [self.banks[kind].parts(item) for kind, item in zip(task.items, chosen)]
        content_types = task.content_types
        descriptions = tuple(
            DESCRIPTIONS[kind](self.banks[kind].facts[item]) for kind, item in zip(task.items, chosen)
        )
        if rng.random() < 0.3:
            content_types, parts, descriptions = content_types[::-1], parts[::-1], descriptions[::-1]
        return Sample(content_types, phrasing, text_first, task.answer(facts), parts, descriptions)


def _candidates(task: Task, bank: Bank) -> np.ndarray:
    """The items of the bank that the question makes sense for."""
    names = {name for facts in bank.facts for name in facts}
    if task.needs is None or task.needs[0] not in names:
        return np.arange(len(bank))
    return np.array([index for index, facts in enumerate(bank.facts) if task.makes_sense(facts)])


class Collator:
    """Samples to the model's inputs and labels, padded on the right.

    Args:
        processor: Gives the prompt, the tokenizer and the number of placeholders per part.
        speech_frames: Length of the window of speech, where it shall be shorter than the processor's.
    """

    def __init__(self, processor: Any, speech_frames: int | None = None):
        self.processor = processor
        self.codec = Codec(processor)
        self.speech_frames = speech_frames
        # The same prompts come again and again.
        self._row = cache(self._make_row)

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        return self.prompts(samples) | self._media(samples)

    def prompts(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`."""
        rows = [
            self._row(s.content_types, s.phrasing, s.text_first, s.answer, tuple(map(len, s.parts))) for s in samples
        ]
        return self._padded(rows)

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
            ),
            "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        }

    def _make_row(
        self, content_types: tuple[str, ...], phrasing: str, text_first: bool, answer: str, num_parts: tuple[int, ...]
    ) -> dict[str, list[int]]:
        """Ids of prompt and answer; only the answer and its end are labels."""
        processor = self.processor
        turn = messages(content_types, [None] * len(content_types), phrasing, text_first)
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        segments = tokenize_pieces(processor.tokenizer, split_prompt(prompt, processor.placeholders))
        lengths = [
            # A video costs as much as a picture, whatever its number of frames.
            processor.num_tokens(kind) * (1 if kind == "video" else parts)
            for kind, parts in zip(content_types, num_parts)
        ]
        token_ids = [getattr(processor, f"{kind}_token_id") for kind in content_types]
        return self._with_answer(expand_segments(segments, lengths, token_ids)["input_ids"], answer)

    def _with_answer(self, ids: list[int], answer: str) -> dict[str, list[int]]:
        processor = self.processor
        eos = processor.tokenizer.eos_token
        answer_ids = processor.tokenizer(f" {answer}{eos}", add_special_tokens=False)["input_ids"]
        return {"input_ids": ids + answer_ids, "labels": [-100] * len(ids) + answer_ids}

    def _media(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        found: dict[str, list[list[np.ndarray]]] = {"image": [], "video": [], "audio": [], "speech": []}
        for sample in samples:
            for kind, parts in zip(sample.content_types, sample.parts):
                found[kind].append(parts)
        batch = {}
        if found["image"]:
            batch["pixel_values"] = self._decoded("image", found["image"])
        if found["video"]:
            batch |= self._videos(found["video"])
        if found["audio"]:
            batch["input_values"] = self._decoded("audio", found["audio"])
            real = torch.tensor([len(part) for parts in found["audio"] for part in parts])
            batch["input_values_mask"] = (torch.arange(self.codec.audio_frames) < real[:, None]).long()
        if found["speech"]:
            batch["input_features"] = self._decoded("speech", found["speech"])
        return batch

    def _decoded(self, kind: str, items: list[list[np.ndarray]]) -> torch.Tensor:
        parts = [part for item in items for part in item]
        return torch.from_numpy(self.codec.decode(kind, parts, self.speech_frames))

    def _videos(self, videos: list[list[np.ndarray]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, videos))
        pixels = torch.zeros(len(videos), longest, *videos[0][0].shape)
        mask = torch.zeros(len(videos), longest, dtype=torch.long)
        for row, frames in enumerate(videos):
            pixels[row, : len(frames)] = torch.from_numpy(self.codec.decode("video", frames))
            mask[row, : len(frames)] = 1
        return {"pixel_values_videos": pixels} | ({} if mask.all() else {"video_frame_mask": mask})


class TextCollator(Collator):
    """The same questions about items that are told in words."""

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        return self._padded([self._row(s.descriptions, s.phrasing, s.text_first, s.answer, ()) for s in samples])

    def _make_row(
        self, descriptions: tuple[str, ...], phrasing: str, text_first: bool, answer: str, num_parts: tuple[int, ...]
    ) -> dict[str, list[int]]:
        processor = self.processor
        told = [{"type": "text", "text": f"{text}\n"} for text in descriptions]
        asked = [{"type": "text", "text": phrasing}] if phrasing else []
        turn = [{"role": "user", "content": asked + told if text_first else told + asked}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        return self._with_answer(processor.tokenizer(prompt)["input_ids"], answer)


class FeatureCollator(Collator):
    """Questions about items of which the towers' features are known: float32 [parts, tokens, width] by content type."""

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        features: dict[str, list[np.ndarray]] = {}
        counts: dict[str, list[int]] = {}
        for sample in samples:
            for kind, parts in zip(sample.content_types, sample.parts):
                features.setdefault(kind, []).extend(parts)
                counts.setdefault(kind, []).append(len(parts))
        return self.prompts(samples) | {
            "features": {kind: torch.from_numpy(np.stack(parts)).float() for kind, parts in features.items()},
            "counts": {kind: torch.tensor(values) for kind, values in counts.items()},
        }
