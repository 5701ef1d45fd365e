"""What all phases of training share: their settings, the banks of items, and Trainer's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

import unimoe

from .architecture import INITIALIZER_RANGE, build_config, build_processor
from .banks import Bank, load_banks
from .tokenizer import build_tokenizer
from .towers import prepare_vision_tower

# Items per kind that the training draws from.
BANK_SIZES = {
    "scene": 6000,
    "digit": 6000,
    "shape_video": 1600,
    "digit_video": 600,
    "event": 5000,
    "word": 8000,
    "spoken_question": 1600,
}
# Held-out items to watch the training with.
WATCHED_BANK_SIZE = 150


@dataclass(frozen=True)
class Phase:
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50
    schedule: str = "cosine"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--work", type=Path, default=Path("build/tiny"), help="keeps what was made; empty it to make all anew"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that make the items")
    parser.add_argument("--fraction", type=float, default=1.0, help="of all items and steps, to try the script out")
    return parser


def steps_of(phase: Phase, fraction: float) -> int:
    return max(round(phase.steps * fraction), 2)


def build(seed: int) -> tuple[unimoe.UniMoEForConditionalGeneration, unimoe.UniMoEProcessor]:
    """The dense model from nothing, and its processor."""
    set_seed(seed)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = unimoe.UniMoEForConditionalGeneration(config)
    prepare_vision_tower(model.model, INITIALIZER_RANGE)
    return model, build_processor(tokenizer, config)


def load_items(args: argparse.Namespace, processor: Any) -> tuple[dict[str, Bank], dict[str, Bank]]:
    """Items to train on and held-out items to watch."""
    sizes = {kind: max(round(size * args.fraction), 100) for kind, size in BANK_SIZES.items()}
    cache = args.work / "cache"
    return (
        load_banks(processor, sizes, "train", args.seed, cache, args.workers),
        load_banks(processor, dict.fromkeys(sizes, WATCHED_BANK_SIZE), "test", args.seed, cache, args.workers),
    )


def training_arguments(args: argparse.Namespace, phase: Phase, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.work / "trainer"),
        max_steps=steps_of(phase, args.fraction),
        per_device_train_batch_size=phase.batch_size,
        learning_rate=phase.learning_rate,
        warmup_steps=phase.warmup_steps,
        lr_scheduler_type=phase.schedule,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        seed=args.seed,
        use_cpu=True,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **kwargs,
    )


@contextmanager
def without_unread_layers(model: unimoe.UniMoEModel) -> Iterator[None]:
    """Leaves out the vision layers behind the one whose features the model takes."""
    tower, config = model.vision_tower, model.config
    layers, feature_layer = tower.encoder.layers, config.vision_feature_layer
    tower.encoder.layers = layers[: feature_layer + 1]
    config.vision_config.num_hidden_layers, config.vision_feature_layer = len(tower.encoder.layers), -1
    try:
        yield
    finally:
        tower.encoder.layers = layers
        config.vision_config.num_hidden_layers, config.vision_feature_layer = len(layers), feature_layer


def load_tower(model: unimoe.UniMoEModel, path: Path) -> None:
    """Towers and connectors that `train_towers` has trained, without its heads."""
    stored = torch.load(path, weights_only=True)
    prefix = "model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}, strict=False
    )
