"""The first phase: towers and connectors learn to tell items apart, before the decoder asks them anything.

From random weights, the one word of an answer teaches a tower very slowly, as long as the decoder does not look at it.
So linear heads on the connectors' outputs first name what is in an item; afterwards the heads are thrown away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

import unimoe

from .banks import Bank
from .items import CONTENT_TYPES, SPOKEN_QUESTIONS
from .sound_data import EVENTS, MAX_BEEPS, PITCHES
from .speech_data import WORDS
from .training_data import Collator, Sample
from .vision_data import COLOURS, MAX_COUNT, SHAPES

# What can be said of an item of each kind.
CLASSES: dict[str, dict[str, tuple]] = {
    "scene": {"shape": SHAPES, "colour": tuple(COLOURS), "count": tuple(range(1, MAX_COUNT + 1))},
    "digit": {"digit": tuple(range(10))},
    "shape_video": {"shape": SHAPES, "colour": tuple(COLOURS), "moves": (False, True)},
    "digit_video": {"digit": tuple(range(10))},
    "event": {
        "event": tuple(EVENTS),
        "pitch": tuple(pitch for pitch in PITCHES if pitch != "middle"),
        "beeps": tuple(range(2, MAX_BEEPS + 1)),
    },
    "word": {"word": WORDS},
    "spoken_question": {"about": tuple(SPOKEN_QUESTIONS)},
}
# The towers share no weights, so each group is trained by itself. How often a kind is shown: harder ones more often,
# expensive ones less.
GROUPS: dict[str, dict[str, float]] = {
    "vision": {"scene": 0.48, "digit": 0.4, "shape_video": 0.07, "digit_video": 0.05},
    "sound": {"word": 0.55, "spoken_question": 0.13, "event": 0.32},
}
IGNORED = -100


class ItemDataset(Dataset):
    """Item i of a group; speech is changed a little every time, so that few voices stand for many."""

    def __init__(self, banks: dict[str, Bank], group: str, size: int, seed: int):
        self.banks, self.size, self.seed = banks, size, seed
        self.kinds, self.chances = list(GROUPS[group]), list(GROUPS[group].values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any], list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, index])
        kind = str(rng.choice(self.kinds, p=self.chances))
        bank = self.banks[kind]
        item = int(rng.integers(len(bank)))
        parts = bank.parts(item)
        return (
            kind,
            bank.facts[item],
            [vary(part, rng) for part in parts] if CONTENT_TYPES[kind] == "speech" else parts,
        )


def vary(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A log-mel [frames, channels] said a little earlier, higher or lower, and with a band missing."""
    floor = frames[-1, 0]
    frames = np.roll(frames[int(rng.integers(0, 12)) :], int(rng.integers(-2, 3)), axis=1).copy()
    if rng.random() < 0.5:
        start, width = int(rng.integers(0, frames.shape[1] - 10)), int(rng.integers(1, 10))
        frames[:, start : start + width] = floor
    if rng.random() < 0.5:
        start, length = int(rng.integers(0, len(frames))), int(rng.integers(1, 10))
        frames[start : start + length] = floor
    # The last frame stays the sample of what silence is.
    frames[-1] = floor
    return frames


class ItemCollator:
    """Items to the model's inputs and, for every kind and fact, the class that is right (IGNORED where unknown)."""

    def __init__(self, processor: Any):
        self.media = Collator(processor)._media

    def __call__(self, items: list[tuple[str, dict[str, Any], list[np.ndarray]]]) -> dict[str, Any]:
        order = {"image": [], "video": [], "audio": [], "speech": []}
        for kind, facts, parts in items:
            order[CONTENT_TYPES[kind]].append((kind, facts, parts))
        batch = self.media([Sample((CONTENT_TYPES[kind],), "", False, "", [parts]) for kind, _, parts in items])
        targets = {}
        for content_type, rows in order.items():
            for kind in [kind for kind in CLASSES if CONTENT_TYPES[kind] == content_type]:
                for name, classes in CLASSES[kind].items():
                    known = [classes.index(f[name]) if k == kind and name in f else IGNORED for k, f, _ in rows]
                    targets[f"{kind}__{name}"] = torch.tensor(known)
        # A sound of several chunks is judged by its first one.
        counts = {kind: torch.tensor([len(parts) for _, _, parts in rows]) for kind, rows in order.items()}
        return {"media": batch, "targets": targets, "counts": counts}


class TowerClassifier(nn.Module):
    """Connector outputs, pictures averaged over their patches, to classes by linear maps."""

    def __init__(self, model: unimoe.UniMoEModel, group: str):
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        queries = {"audio": model.config.num_audio_tokens, "speech": model.config.num_speech_tokens}
        self.heads = nn.ModuleDict()
        for kind in GROUPS[group]:
            tokens = queries.get(CONTENT_TYPES[kind], 1)
            for name, classes in CLASSES[kind].items():
                self.heads[f"{kind}__{name}"] = nn.Linear(tokens * width, len(classes))

    def logits(self, media: dict[str, torch.Tensor], counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pooled = {}
        for content_type, output in self.model.encode_media(**media).items():
            features = output.pooler_output
            if content_type in ("image", "video"):
                pooled[content_type] = features.mean(dim=1)
            else:
                starts = torch.cumsum(counts[content_type], 0) - counts[content_type]
                pooled[content_type] = features[starts].flatten(1)
        kinds = {name: CONTENT_TYPES[name.split("__")[0]] for name in self.heads}
        return {name: head(pooled[kinds[name]]) for name, head in self.heads.items() if kinds[name] in pooled}

    def forward(self, media: dict, targets: dict, counts: dict) -> dict[str, torch.Tensor]:
        losses = []
        for name, logits in self.logits(media, counts).items():
            known = targets[name] != IGNORED
            if known.any():
                losses.append(nn.functional.cross_entropy(logits[known], targets[name][known], reduction="sum"))
        size = sum(map(len, counts.values()))
        return {"loss": torch.stack(losses).sum() / size}


class Watch(TrainerCallback):
    """Prints now and then how many held-out items the heads name right."""

    def __init__(self, classifier: TowerClassifier, banks: dict[str, Bank], collator: ItemCollator, every: int):
        self.classifier, self.banks, self.collator, self.every = classifier, banks, collator, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.classifier.eval()
            print(state.global_step, self.accuracies(), flush=True)
            self.classifier.train()

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        right: dict[str, list[bool]] = {}
        for kind in {name.split("__")[0] for name in self.classifier.heads}:
            bank = self.banks[kind]
            for start in range(0, len(bank), 50):
                indices = range(start, min(start + 50, len(bank)))
                batch = self.collator([(kind, bank.facts[i], bank.parts(i)) for i in indices])
                for name, logits in self.classifier.logits(batch["media"], batch["counts"]).items():
                    known = batch["targets"][name] != IGNORED
                    right.setdefault(name, []).extend((logits.argmax(-1) == batch["targets"][name])[known].tolist())
        return {name: round(float(np.mean(values)), 3) for name, values in right.items() if values}
