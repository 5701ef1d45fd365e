"""Trains the tiny checkpoint from nothing: `python -m scripts.tiny.train`.

Two phases. First the towers and connectors learn to tell items apart (`towers.py`); then connectors and decoder learn to
answer all questions, with the towers as they are.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

import unimoe

from .architecture import MODALITIES as CONTENT_TYPES
from .architecture import build_config, build_processor
from .banks import load_banks
from .questions import MODALITIES
from .tokenizer import build_tokenizer
from .towers import ItemCollator, ItemDataset, TowerClassifier, Watch
from .training_data import Collator, QuestionDataset

# What the model returns beside loss and logits; the watching need not gather it.
OTHER_OUTPUTS = ["past_key_values", "aux_loss", *(f"{kind}_hidden_states" for kind in CONTENT_TYPES)]
# Items per kind that the training questions are drawn from.
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
WATCHED_QUESTIONS = 96


@dataclass(frozen=True)
class Phase:
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int


TOWERS = {
    "vision": Phase(steps=2900, batch_size=32, learning_rate=1e-3, warmup_steps=150),
    "sound": Phase(steps=1150, batch_size=64, learning_rate=1.5e-3, warmup_steps=100),
}
ANSWERS = Phase(steps=330, batch_size=48, learning_rate=2e-3, warmup_steps=30)


@contextmanager
def without_unread_layers(model: unimoe.UniMoEForConditionalGeneration) -> Iterator[None]:
    """Leaves out the vision layers behind the one whose features the model takes."""
    tower, config = model.model.vision_tower, model.config
    layers, feature_layer = tower.encoder.layers, config.vision_feature_layer
    tower.encoder.layers = layers[: feature_layer + 1]
    config.vision_config.num_hidden_layers, config.vision_feature_layer = len(tower.encoder.layers), -1
    try:
        yield
    finally:
        tower.encoder.layers = layers
        config.vision_config.num_hidden_layers, config.vision_feature_layer = len(layers), feature_layer


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The predicted ids [B, S], each at the position of the label that it is compared with."""
    return nn.functional.pad(logits.argmax(-1)[:, :-1], (1, 0))


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """The share of answers of which every token is right. Greedy generation would write just these."""
    asked = prediction.label_ids != -100
    right = (prediction.predictions == prediction.label_ids) | ~asked
    return {"accuracy": float(right.all(axis=1).mean())}


class StopInTime(TrainerCallback):
    """Ends the training `minutes` after `started`, with what it has learnt by then."""

    def __init__(self, minutes: float, started: float):
        self.end = started + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.time() > self.end


def training_arguments(args: argparse.Namespace, phase: Phase, steps: int, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.cache / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=phase.batch_size,
        learning_rate=phase.learning_rate,
        warmup_steps=phase.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        seed=args.seed,
        use_cpu=True,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **kwargs,
    )


def train_towers(args: argparse.Namespace, group: str, model, processor, banks: dict, watched: dict) -> None:
    """Trains the towers of a group, or takes them from the cache."""
    prefixes = {"vision": ("vision_",), "sound": ("audio_", "speech_")}[group]
    stored = args.cache / f"towers-{group}-{args.seed}-{args.fraction}.pt"
    if stored.exists():
        model.model.load_state_dict(torch.load(stored, weights_only=True), strict=False)
        return
    phase = TOWERS[group]
    steps = max(round(phase.steps * args.fraction), 2)
    with without_unread_layers(model):
        classifier = TowerClassifier(model.model, group)
        collator = ItemCollator(processor)
        trainer = Trainer(
            model=classifier,
            args=training_arguments(args, phase, steps),
            train_dataset=ItemDataset(banks, group, steps * phase.batch_size, seed=args.seed + 100),
            data_collator=collator,
            callbacks=[Watch(classifier, watched, collator, every=400)],
        )
        trainer.train()
    trained = {name: value for name, value in model.model.state_dict().items() if name.startswith(prefixes)}
    torch.save(trained, stored)


def train(args: argparse.Namespace) -> None:
    started = time.time()
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config)
    model = unimoe.UniMoEForConditionalGeneration(config)
    print(f"{model.num_parameters():,} parameters")
    sizes = {kind: max(round(size * args.fraction), 100) for kind, size in BANK_SIZES.items()}
    banks = load_banks(processor, sizes, "train", args.seed, args.cache, args.workers)
    watched = load_banks(
        processor, dict.fromkeys(sizes, WATCHED_BANK_SIZE), "test", args.seed, args.cache, args.workers
    )
    held_out = {name: QuestionDataset(watched, WATCHED_QUESTIONS, args.seed, (name,)) for name in MODALITIES}
    print(f"items ready after {time.time() - started:.0f} s")
    for group in [args.towers] if args.towers else TOWERS:
        train_towers(args, group, model, processor, banks, watched)
        print(f"{group} towers trained after {time.time() - started:.0f} s")
    if args.towers:
        return
    for tower in (model.model.vision_tower, model.model.audio_tower, model.model.speech_tower):
        tower.requires_grad_(False)
    steps = max(round(ANSWERS.steps * args.fraction), 2)
    arguments = training_arguments(
        args,
        ANSWERS,
        steps,
        eval_strategy="steps",
        eval_steps=110,
        per_device_eval_batch_size=ANSWERS.batch_size,
    )
    with without_unread_layers(model):
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=QuestionDataset(banks, steps * ANSWERS.batch_size, seed=args.seed + 1),
            eval_dataset=held_out,
            data_collator=Collator(processor),
            compute_metrics=exact_match,
            preprocess_logits_for_metrics=most_likely,
            callbacks=[StopInTime(args.minutes, started)] if args.minutes else None,
        )
        trainer.train(ignore_keys_for_eval=OTHER_OUTPUTS)
    print(f"answers trained after {time.time() - started:.0f} s")
    shutil.rmtree(args.output, ignore_errors=True)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    for copied in args.output.glob("*.py"):
        # This package is the code of its own checkpoint; a copy of it would only grow old there.
        copied.unlink()
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/tiny/checkpoint"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/tiny/cache"), help="keeps what was made; empty it to make anew"
    )
    parser.add_argument("--towers", choices=TOWERS, help="train these towers only, and keep them in the cache")
    parser.add_argument("--minutes", type=float, help="end after so long at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that make the items")
    parser.add_argument("--fraction", type=float, default=1.0, help="of all items and steps, to try the script out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
