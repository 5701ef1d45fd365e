"""Before the stages: towers and connectors learn to tell items apart, as the towers that real models start from have.

Linear heads on the connectors' outputs name what is in an item; afterwards the heads are thrown away. The towers share no
weights, so each is trained by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
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
# As they stand in the model: each is trained by itself, with its connector.
TOWERS = ("vision", "audio", "speech")
TOWER_OF = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}
# Frames that a video is shown with while the tower learns: every frame costs as much as a picture.
MOST_FRAMES = 4
POSITION_SCALE = 0.5
PATCH_STD = 0.05
HEAD_WIDTH = 64
# How often a sound is drawn from those of which this can be said.
RARE_FACTS = {"beeps": 0.35, "pitch": 0.25}
IGNORED = -100


@torch.no_grad()
def prepare_vision_tower(model: unimoe.UniMoEModel, std: float) -> None:
    """Starts the vision tower where so short a training gets far: it sees from the first step where a patch lies (sines and
    cosines in both directions in place of tiny random positions), and its narrow layers have weights of `std`."""
    tower = model.vision_tower
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.normal_(0, PATCH_STD)
    for layer in tower.encoder.layers:
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, std)
    table = embeddings.position_embedding.weight
    side, width = math.isqrt(len(table) - 1), table.shape[1]
    rates = 0.15 * torch.exp(torch.linspace(0, math.log(20), width // 4))
    down, right = (
        axis.flatten()[:, None] * rates for axis in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")
    )
    table[1:] = POSITION_SCALE * torch.cat([right.sin(), right.cos(), down.sin(), down.cos()], dim=1)


@contextmanager
def speech_window(model: unimoe.UniMoEModel, frames: int | None) -> Iterator[None]:
    """Lets the speech tower take `frames` instead of 3000, most of which would be silence that costs the most."""
    if frames is None:
        yield
        return
    tower = model.speech_tower
    table, positions = tower.embed_positions, tower.config.max_source_positions
    tower.embed_positions = nn.Embedding.from_pretrained(table.weight[: frames // 2].detach())
    tower.config.max_source_positions = frames // 2
    try:
        yield
    finally:
        tower.embed_positions, tower.config.max_source_positions = table, positions


class ItemDataset(Dataset):
    """Item i of a tower; speech and pictures are changed a little every time, so that few stand for many.

    Args:
        chances: How often each kind is shown.
    """

    def __init__(self, banks: dict[str, Bank], chances: dict[str, float], size: int, seed: int):
        self.banks, self.size, self.seed = banks, size, seed
        self.kinds = list(chances)
        self.chances = np.array(list(chances.values())) / sum(chances.values())
        # Every seventh sound would have beeps to count, every tenth a pitch to tell.
        self.rare = {fact: [i for i, facts in enumerate(banks["event"].facts) if fact in facts] for fact in RARE_FACTS}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any], list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, index])
        kind = str(rng.choice(self.kinds, p=self.chances))
        bank = self.banks[kind]
        rare = str(rng.choice([*RARE_FACTS, ""], p=[*RARE_FACTS.values(), 1 - sum(RARE_FACTS.values())]))
        item = int(rng.choice(self.rare[rare]) if kind == "event" and rare else rng.integers(len(bank)))
        parts = bank.parts(item)
        content_type = CONTENT_TYPES[kind]
        if content_type == "speech":
            parts = [vary_speech(part, rng) for part in parts]
        elif content_type == "video":
            parts = [
                parts[i] for i in np.linspace(0, len(parts) - 1, min(len(parts), MOST_FRAMES)).round().astype(int)
            ]
        elif content_type == "audio":
            parts = vary_sound(parts, rng)
        elif kind == "digit":
            parts = [vary_writing(part, rng) for part in parts]
        elif kind == "scene":
            parts = [part[:, :, ::-1] if rng.random() < 0.5 else part for part in parts]
        return kind, bank.facts[item], parts


def vary_speech(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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


def vary_sound(chunks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The filterbanks [frames, mel bins] of a sound, a little higher or lower and louder or quieter, its first chunk begun a
    little later."""
    bins, level, late = int(rng.integers(-3, 4)), rng.uniform(-0.1, 0.1), int(rng.integers(0, 8))
    chunks = [np.roll(chunk, bins, axis=1) + np.float16(level) for chunk in chunks]
    if len(chunks) == 1 and len(chunks[0]) > 60:
        chunks[0] = chunks[0][late:]
    return chunks


def vary_writing(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit uint8 [3, R, R] in another hand: turned, slanted, stretched and shifted; other writers differ so."""
    side = pixels.shape[-1]
    middle = (side - 1) / 2
    turn, slant = rng.uniform(-0.1, 0.1), rng.uniform(-0.15, 0.15)
    stretch = np.diag(rng.uniform(0.94, 1.06, 2))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = rotation @ np.array([[1, slant], [0, 1]]) @ stretch
    offset = middle - matrix @ np.array([middle, middle]) + rng.uniform(-2, 2, 2)
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    paper = tuple(int(value) for value in np.median(pixels.reshape(3, -1), axis=1))
    varied = image.transform(
        image.size,
        Image.Transform.AFFINE,
        (*matrix[0], offset[0], *matrix[1], offset[1]),
        Image.Resampling.BILINEAR,
        fillcolor=paper,
    )
    return np.asarray(varied).transpose(2, 0, 1)


class ItemCollator:
    """Items to the model's inputs and, for every kind and fact, the class that is right (IGNORED where unknown)."""

    def __init__(self, processor: Any, speech_frames: int | None = None):
        self.media = Collator(processor, speech_frames)._media

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
    """Connector outputs to classes.

    The queries of a sound stand side by side; patches are averaged. For motion they are looked at one by one before: it shows
    only in how much of the picture a shape has touched.
    """

    def __init__(self, model: unimoe.UniMoEModel, tower: str):
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        queries = {"audio": model.config.num_audio_tokens, "speech": model.config.num_speech_tokens}
        self.heads = nn.ModuleDict()
        for kind, facts in CLASSES.items():
            content_type = CONTENT_TYPES[kind]
            if TOWER_OF[content_type] != tower:
                continue
            for name, classes in facts.items():
                if content_type in queries:
                    head = nn.Linear(queries[content_type] * width, len(classes))
                elif name == "moves":
                    head = nn.Sequential(nn.Linear(width, HEAD_WIDTH), nn.GELU(), MeanOverPatches())
                    head.append(nn.Linear(HEAD_WIDTH, len(classes)))
                else:
                    head = nn.Sequential(MeanOverPatches(), nn.Linear(width, len(classes)))
                self.heads[f"{kind}__{name}"] = head

    def logits(self, media: dict[str, torch.Tensor], counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {}
        for content_type, output in self.model.encode_media(**media).items():
            inputs[content_type] = output.pooler_output
            if content_type in ("audio", "speech"):
                starts = torch.cumsum(counts[content_type], 0) - counts[content_type]
                inputs[content_type] = output.pooler_output[starts].flatten(1)
        kinds = {name: CONTENT_TYPES[name.split("__")[0]] for name in self.heads}
        return {name: head(inputs[kinds[name]]) for name, head in self.heads.items() if kinds[name] in inputs}

    def forward(self, media: dict, targets: dict, counts: dict) -> dict[str, torch.Tensor]:
        losses = []
        for name, logits in self.logits(media, counts).items():
            known = targets[name] != IGNORED
            if known.any():
                losses.append(nn.functional.cross_entropy(logits[known], targets[name][known], reduction="sum"))
        size = sum(map(len, counts.values()))
        return {"loss": torch.stack(losses).sum() / size}


class MeanOverPatches(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, H] to [N, H]."""
        return features.mean(dim=1)


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
        for kind in sorted({name.split("__")[0] for name in self.classifier.heads}):
            bank = self.banks[kind]
            for start in range(0, len(bank), 50):
                indices = range(start, min(start + 50, len(bank)))
                batch = self.collator([(kind, bank.facts[i], bank.parts(i)) for i in indices])
                for name, logits in self.classifier.logits(batch["media"], batch["counts"]).items():
                    known = batch["targets"][name] != IGNORED
                    right.setdefault(name, []).extend((logits.argmax(-1) == batch["targets"][name])[known].tolist())
        return {name: round(float(np.mean(values)), 3) for name, values in right.items() if values}
