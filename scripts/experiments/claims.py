"""Trains all conditions of `docs/claims.md` and writes what was measured: `python -m scripts.experiments.claims`.

Needs the checkpoint from before stage 1 that `python -m scripts.tiny.train` writes (towers that tell items apart, a decoder that
answers about items told in words), and uses the features of its towers. Whatever is finished is passed over, so a run that was
cut off goes on where it was. For several processes give each its own seeds; the last one gathers all that is finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, set_seed

import unimoe
from scripts.tiny.questions import MODALITIES
from scripts.tiny.tower_features import FromTowerFeatures, feature_bank
from scripts.tiny.training import build, load_items
from scripts.tiny.training_data import FeatureCollator, QuestionDataset
from unimoe.training.callbacks import ReportCallback
from unimoe.training.parts import train_only
from unimoe.training.trainer import ModalityTrainer

from .conditions import CONDITIONS, CONNECTORS, FOUR, RESULTS, Condition, Settings
from .measure import LossCurve, held_out, routing
from .starts import decoder_parameters, starting_model

Banks = dict[str, Any]
SINGLE = tuple(modality for (modality,) in FOUR)
# Before stage 1.
BASE = "reading"


class Experiment:
    """Conditions on the same questions.

    Args:
        base: Folder of the dense checkpoint from before stage 1.
        train_banks, test_banks: Features of the items to train on and of the held-out ones, by kind of item.
        folder: Keeps the experts of stage 2 and a JSON for each finished run.

    Raises:
        ValueError: `folder` holds runs with other settings.
    """

    def __init__(
        self, settings: Settings, base: Path, processor: Any, train_banks: Banks, test_banks: Banks, folder: Path
    ):
        self.settings, self.base, self.folder = settings, base, folder
        self.train_banks, self.test_banks = train_banks, test_banks
        self.collator = FeatureCollator(processor)
        claim_folder(folder, settings)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """What was measured of a condition, which is trained unless that was done before."""
        file = run_file(self.folder, name, seed)
        if not file.exists():
            result = {"condition": name, "seed": seed, **self._measured(CONDITIONS[name], seed)}
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(result))
            unfinished.rename(file)
        return json.loads(file.read_text())

    def _measured(self, condition: Condition, seed: int) -> dict[str, Any]:
        tuned = [self._expert(group, seed) for group in condition.experts] if condition.start == "tuned" else []
        model = starting_model(condition, self.settings.layers, self._aligned(seed), tuned, seed)
        activated, total = decoder_parameters(model)
        data = self._mixed_questions(seed)
        if condition.all_questions:
            data = ConcatDataset([*(self._questions(modality, seed) for modality in SINGLE), data])
        steps = self.settings.steps(condition)
        curve, history = self._train(model, ["language_model", "connectors"], data, steps, seed)
        return {
            **held_out(model, self.test_banks, self.collator, self.settings.questions),
            **routing(history),
            "activated_parameters": activated,
            "parameters": total,
            "curve": [round(value, 4) for value in curve],
        }

    def _expert(self, group: tuple[str, ...], seed: int) -> Path:
        """Stage 2: the folder of the dense model whose FFNs and connectors were tuned on some modalities."""
        data = ConcatDataset([self._questions(modality, seed) for modality in group])
        parts = ["ffn", *sorted({CONNECTORS[modality] for modality in group})]
        steps = self.settings.group_steps(group)
        return self._stage(f"expert-{'-'.join(group)}-{seed}", self._aligned(seed), parts, data, steps, seed)

    def _aligned(self, seed: int) -> Path:
        """Stage 1: the folder of the dense model whose connectors have learned a little of each modality."""
        steps = self.settings.align_steps
        data = QuestionDataset(self.train_banks, steps * self.settings.batch_size, 900 + seed, SINGLE)
        return self._stage(f"aligned-{seed}", self.base, ["connectors"], data, steps, seed, self.settings.align_rate)

    def _stage(
        self, name: str, start: Path, parts: list[str], data: Dataset, steps: int, seed: int, rate: float | None = None
    ) -> Path:
        """The folder of a dense model with some parts trained, unless that was done before."""
        folder = self.folder / name
        if not (folder / "config.json").is_file():
            model = unimoe.UniMoEForConditionalGeneration.from_pretrained(start)
            self._train(model, parts, data, steps, seed, rate)
            unfinished = Path(mkdtemp(dir=self.folder))
            model.save_pretrained(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                # Another process was faster, with the same result.
                shutil.rmtree(unfinished)
        return folder

    def _questions(self, modality: str, seed: int) -> Dataset:
        """Those of stage 2: the same in every condition that sees them."""
        size = self.settings.expert_steps * self.settings.batch_size
        return QuestionDataset(self.train_banks, size, 1000 + 10 * seed + MODALITIES.index(modality), (modality,))

    def _mixed_questions(self, seed: int) -> Dataset:
        size = self.settings.mixed_steps * self.settings.batch_size
        return QuestionDataset(self.train_banks, size, 5000 + seed, MODALITIES)

    def _train(
        self,
        model: PreTrainedModel,
        parts: list[str],
        data: Dataset,
        steps: int,
        seed: int,
        rate: float | None = None,
    ) -> tuple[list[float], list[dict[str, float]]]:
        """The loss of every step, and Trainer's logs."""
        set_seed(seed)
        train_only(model, parts)
        curve = LossCurve(model)
        trainer = ModalityTrainer(
            model=FromTowerFeatures(model),
            args=TrainingArguments(
                output_dir=str(self.folder / "trainer"),
                max_steps=steps,
                per_device_train_batch_size=self.settings.batch_size,
                learning_rate=rate or self.settings.learning_rate,
                warmup_steps=min(self.settings.warmup_steps, steps // 2),
                lr_scheduler_type="cosine",
                weight_decay=0.05,
                adam_beta2=0.98,
                max_grad_norm=1.0,
                # Orders the questions, alike in all conditions that have the same.
                seed=seed,
                use_cpu=True,
                logging_steps=max(steps // 20, 1),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
            ),
            train_dataset=data,
            data_collator=self.collator,
            callbacks=[curve],
            sampling=None,
        )
        for chatty in (PrinterCallback, ReportCallback):
            trainer.remove_callback(chatty)
        trainer.train()
        return curve.values, trainer.state.log_history


def claim_folder(folder: Path, settings: Settings) -> None:
    """Makes a folder that of some settings, or raises ValueError where it is that of others."""
    file = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text()) != settings.as_json():
        raise ValueError(f"{folder} holds runs with other settings; give another folder as --runs")
    file.write_text(json.dumps(settings.as_json()))


def run_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"run-{name}-{seed}.json"


def gather(folder: Path, settings: Settings, output: Path) -> None:
    """Writes all finished runs into one file, a line a run."""
    files = sorted(folder.glob("run-*.json"))
    runs = [json.loads(file.read_text()) for file in files if file.stem.split("-")[1] in CONDITIONS]
    runs.sort(key=lambda run: (list(CONDITIONS).index(run["condition"]), run["seed"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    output.write_text(f'{{"settings": {json.dumps(settings.as_json())},\n"runs": [\n{lines}\n]}}\n')


def load_banks(work: Path, model: unimoe.UniMoEForConditionalGeneration, processor: Any, workers: int) -> list[Banks]:
    """Features of the items to train on and of the held-out ones, as the training of the tiny checkpoint keeps them."""
    items = load_items(argparse.Namespace(work=work, seed=0, fraction=1.0, workers=workers), processor)
    found = []
    for split, banks in zip(("train", "test"), items):
        paths = {kind: work / "cache" / f"{kind}-{split}-features.npy" for kind in banks}
        found.append({kind: feature_bank(model.model.eval(), processor, banks[kind], paths[kind]) for kind in paths})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="work folder of scripts.tiny.train")
    parser.add_argument("--runs", type=Path, default=Path("build/claims"), help="keeps what is finished")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that make items which are not there yet")
    defaults = Settings()
    parser.add_argument("--align-steps", type=int, default=defaults.align_steps)
    parser.add_argument("--expert-steps", type=int, default=defaults.expert_steps)
    parser.add_argument("--mixed-steps", type=int, default=defaults.mixed_steps)
    args = parser.parse_args()
    base = args.work / BASE
    if not (base / "config.json").is_file():
        parser.error(f"no {base}: run `python -m scripts.tiny.train --work {args.work}` first")
    torch.set_num_threads(args.threads)
    settings = Settings(args.align_steps, args.expert_steps, args.mixed_steps)
    claim_folder(args.runs, settings)
    _, processor = build(0)
    model = unimoe.UniMoEForConditionalGeneration.from_pretrained(base)
    banks = load_banks(args.work, model, processor, args.workers)
    experiment = Experiment(settings, base, processor, *banks, args.runs)
    # Seed by seed, so that what is there at any time can be compared.
    runs = [(name, seed) for seed in args.seeds for name in args.conditions]
    progress = tqdm(runs)
    for name, seed in progress:
        progress.set_postfix_str(f"{name}, seed {seed}")
        experiment.run(name, seed)
        gather(args.runs, settings, args.output)


if __name__ == "__main__":
    main()
