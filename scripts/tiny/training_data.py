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
from .questions import TASKS, Task, messages, word_question


@dataclass
class Sample:
    content_types: tuple[str, ...]
    phrasing: str
    text_first: bool
    answer: str
    parts: list[list[np.ndarray]]


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
        if rng.random() < 0.3:
            content_types, parts = content_types[::-1], parts[::-1]
        return Sample(content_types, phrasing, text_first, task.answer(facts), parts)


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
        rows = [
            self._row(s.content_types, s.phrasing, s.text_first, s.answer, tuple(map(len, s.parts))) for s in samples
        ]
        width = max(len(row["input_ids"]) for row in rows)
        pad = self.processor.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
            ),
            "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        }
        return batch | self._media(samples)

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
        ids = expand_segments(segments, lengths, token_ids)["input_ids"]
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
