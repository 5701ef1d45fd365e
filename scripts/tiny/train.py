"""Trains the tiny checkpoint from nothing: `python -m scripts.tiny.train`.

Before the stages stand in for what Uni-MoE downloads: towers that tell items apart (`train_towers`), and a decoder that
answers the questions about items that are told in words. Then its three stages, which leave the towers alone:

1. Alignment: the connectors learn to say items in the decoder's language.
2. Experts: for each modality, the decoder's FFNs and the modality's connector learn from questions about it alone.
3. The four tuned FFNs become the experts of every other layer; with new routers, the decoder and the connectors learn from all
   questions, the mixed ones among them.

Every step writes its result into the work folder, and is passed over where the result is there already.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel

import unimoe
from unimoe.training.parts import train_only
from unimoe.training.trainer import ModalityTrainer
from unimoe.training.upcycling import assemble_experts

from .architecture import MODALITIES as CONTENT_TYPES
from .questions import MODALITIES
from .tower_features import FromTowerFeatures, feature_bank
from .towers import TOWERS
from .train_towers import stored_tower
from .training import Phase, arguments, build, load_items, load_tower, steps_of, training_arguments
from .training_data import FeatureCollator, QuestionDataset, TextCollator

# What the model returns beside loss and logits; the watching need not gather it.
OTHER_OUTPUTS = ["past_key_values", "aux_loss", *(f"{kind}_hidden_states" for kind in CONTENT_TYPES)]
WATCHED_QUESTIONS = 96
READING = Phase(steps=400, batch_size=64, learning_rate=2e-3)
ALIGNMENT = Phase(steps=450, batch_size=48, learning_rate=2e-3)
EXPERT = Phase(steps=200, batch_size=48, learning_rate=1e-3, warmup_steps=20)
MIXED = Phase(steps=1500, batch_size=48, learning_rate=1.5e-3)
# The connector that stage 2 trains together with the FFNs of a modality.
CONNECTORS = {
    "image": "vision_connector",
    "video": "vision_connector",
    "audio": "audio_connector",
    "speech": "speech_connector",
}
TOP_K = 2


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The predicted ids [B, S], each at the position of the label that it is compared with."""
    return nn.functional.pad(logits.argmax(-1)[:, :-1], (1, 0))


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """The share of answers of which every token is right. Greedy generation would write just these."""
    asked = prediction.label_ids != -100
    right = (prediction.predictions == prediction.label_ids) | ~asked
    return {"accuracy": float(right.all(axis=1).mean())}


class Stages:
    """The steps of the training, each from the folder of the one before to a folder of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.work = args.work
        self.base, self.processor = build(args.seed)
        self.items, self.watched = load_items(args, self.processor)

    def run(self) -> Path:
        self.towers()
        reading = self.step("reading", self.read)
        self.features()
        aligned = self.step("stage-1", self.align, reading)
        experts = {name: self.step(f"stage-2-{name}", self.tune, aligned, name) for name in CONNECTORS}
        return self.step("stage-3", self.mix, aligned, experts)

    def step(self, name: str, make: Callable[..., PreTrainedModel], *inputs: Any) -> Path:
        folder, started = self.work / name, time.time()
        if not (folder / "config.json").is_file():
            print(f"-- {name}", flush=True)
            model = make(*inputs)
            model.save_pretrained(folder)
            print(f"-- {name}: {time.time() - started:.0f} s", flush=True)
        return folder

    def towers(self) -> None:
        """All three at once, one process each."""
        missing = [tower for tower in TOWERS if not stored_tower(self.work, tower).exists()]
        command = [sys.executable, "-m", "scripts.tiny.train_towers", "--work", str(self.work)]
        command += ["--seed", str(self.args.seed), "--fraction", str(self.args.fraction), "--threads", "1"]
        processes = [subprocess.Popen([*command, tower]) for tower in missing]
        if any([process.wait() for process in processes]):
            raise RuntimeError("the training of the towers failed")
        for tower in TOWERS:
            load_tower(self.base.model, stored_tower(self.work, tower))

    def features(self) -> None:
        """Replaces the banks of items by what the towers make of them."""
        inner = self.base.model.eval()
        for split, banks in (("train", self.items), ("test", self.watched)):
            for kind, bank in banks.items():
                path = self.work / "cache" / f"{kind}-{split}-features.npy"
                banks[kind] = feature_bank(inner, self.processor, bank, path)

    def read(self) -> PreTrainedModel:
        train_only(self.base, ["language_model"])
        data = QuestionDataset(self.items, self.size(READING), seed=self.args.seed + 1)
        self.train(self.base, self.base, READING, data, TextCollator(self.processor), MODALITIES)
        return self.base

    def align(self, reading: Path) -> PreTrainedModel:
        return self.tuned(self.load(reading), ["connectors"], ALIGNMENT, CONNECTORS, seed=2)

    def tune(self, aligned: Path, modality: str) -> PreTrainedModel:
        return self.tuned(self.load(aligned), ["ffn", CONNECTORS[modality]], EXPERT, (modality,), seed=3)

    def mix(self, aligned: Path, experts: dict[str, Path]) -> PreTrainedModel:
        connectors = {CONNECTORS[name]: folder for name, folder in experts.items() if name != "video"}
        model = assemble_experts(
            aligned, list(experts.values()), layers="even", top_k=TOP_K, connectors=connectors, seed=self.args.seed
        )
        return self.tuned(model, ["language_model", "connectors"], MIXED, MODALITIES, seed=4)

    def tuned(
        self, model: PreTrainedModel, parts: list[str], phase: Phase, modalities: tuple[str, ...], seed: int
    ) -> PreTrainedModel:
        """The model with some parts trained on questions of some modalities."""
        train_only(model, parts)
        data = QuestionDataset(self.items, self.size(phase), self.args.seed + seed, tuple(modalities))
        self.train(FromTowerFeatures(model), model, phase, data, FeatureCollator(self.processor), tuple(modalities))
        return model.requires_grad_(True)

    def size(self, phase: Phase) -> int:
        return steps_of(phase, self.args.fraction) * phase.batch_size

    def load(self, folder: Path) -> unimoe.UniMoEForConditionalGeneration:
        return unimoe.UniMoEForConditionalGeneration.from_pretrained(folder)

    def train(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        phase: Phase,
        data: Dataset,
        collator: Any,
        modalities: tuple[str, ...],
    ) -> None:
        watched = {
            name: QuestionDataset(self.watched, WATCHED_QUESTIONS, self.args.seed, (name,)) for name in modalities
        }
        steps = steps_of(phase, self.args.fraction)
        trainer = ModalityTrainer(
            model=module,
            args=training_arguments(
                self.args,
                phase,
                eval_strategy="steps",
                eval_steps=max(steps // 5, 1),
                per_device_eval_batch_size=phase.batch_size,
                label_names=["labels"],
            ),
            train_dataset=data,
            eval_dataset=watched,
            data_collator=collator,
            compute_metrics=exact_match,
            preprocess_logits_for_metrics=most_likely,
            sampling=None,
        )
        trainer.train(ignore_keys_for_eval=OTHER_OUTPUTS)


def publish(source: Path, processor: unimoe.UniMoEProcessor, output: Path) -> None:
    """The trained model with its processor as a folder to load from."""
    model = unimoe.UniMoEForConditionalGeneration.from_pretrained(source)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    for copied in output.glob("*.py"):
        # This package is the code of its own checkpoint; a copy of it would only grow old there.
        copied.unlink()
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {model.num_parameters():,} parameters, {size / 1e6:.2f} MB")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/tiny/checkpoint"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.time()
    stages = Stages(args)
    publish(stages.run(), stages.processor, args.output)
    print(f"trained in {(time.time() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
