"""Trains one tower with its connector: `python -m scripts.tiny.train_towers vision` (or `audio`, `speech`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer

from .towers import TOWERS, ItemCollator, ItemDataset, TowerClassifier, Watch, speech_window
from .training import Phase, arguments, build, load_items, training_arguments, without_unread_layers


@dataclass(frozen=True)
class TowerPhase(Phase):
    """How often each kind of item is shown (harder ones more often, expensive ones less), and how long a window of
    speech is; None: all of Whisper's 3000 frames."""

    name: str = ""
    chances: dict[str, float] | None = None
    speech_frames: int | None = None


PHASES = {
    # All at once, nothing is learnt for a long time; one after the other, each builds on the one before.
    "vision": (
        TowerPhase(
            name="digits",
            steps=300,
            batch_size=32,
            learning_rate=1.3e-3,
            warmup_steps=100,
            schedule="constant_with_warmup",
            chances={"digit": 1.0},
        ),
        TowerPhase(
            name="pictures",
            steps=1000,
            batch_size=32,
            learning_rate=1e-3,
            schedule="constant_with_warmup",
            chances={"scene": 0.7, "digit": 0.3},
        ),
        TowerPhase(
            name="all",
            steps=1600,
            batch_size=32,
            learning_rate=1e-3,
            chances={"scene": 0.4, "digit": 0.32, "shape_video": 0.22, "digit_video": 0.06},
        ),
        TowerPhase(
            name="again",
            steps=1100,
            batch_size=32,
            learning_rate=8e-4,
            chances={"scene": 0.4, "digit": 0.4, "shape_video": 0.14, "digit_video": 0.06},
        ),
    ),
    "speech": (
        TowerPhase(
            name="short",
            steps=1150,
            batch_size=44,
            learning_rate=1.5e-3,
            warmup_steps=100,
            chances={"word": 0.81, "spoken_question": 0.19},
            speech_frames=320,
        ),
        TowerPhase(
            name="whole",
            steps=160,
            batch_size=12,
            learning_rate=5e-4,
            warmup_steps=20,
            chances={"word": 0.8, "spoken_question": 0.2},
        ),
    ),
    "audio": (
        TowerPhase(
            name="first", steps=1200, batch_size=20, learning_rate=1.5e-3, warmup_steps=100, chances={"event": 1.0}
        ),
        TowerPhase(name="events", steps=400, batch_size=32, learning_rate=8e-4, chances={"event": 1.0}),
        TowerPhase(name="again", steps=300, batch_size=32, learning_rate=5e-4, chances={"event": 1.0}),
    ),
}


def stored_tower(work: Path, tower: str) -> Path:
    return work / f"tower-{tower}-{PHASES[tower][-1].name}.pt"


def train_tower(args, tower: str) -> None:
    """All phases of a tower; those whose result is there already are passed over."""
    model, processor = build(args.seed)
    model = model.model
    classifier = TowerClassifier(model, tower)
    banks, watched = load_items(args, processor)
    for number, phase in enumerate(PHASES[tower]):
        path = args.work / f"tower-{tower}-{phase.name}.pt"
        if path.exists():
            classifier.load_state_dict(torch.load(path, weights_only=True), strict=False)
            continue
        started = time.time()
        with without_unread_layers(model), speech_window(model, phase.speech_frames):
            collator = ItemCollator(processor, phase.speech_frames)
            settings = training_arguments(args, phase)
            size = settings.max_steps * phase.batch_size
            trainer = Trainer(
                model=classifier,
                args=settings,
                train_dataset=ItemDataset(banks, phase.chances, size, seed=args.seed + 100 + number),
                data_collator=collator,
                callbacks=[Watch(classifier, watched, collator, every=max(settings.max_steps // 4, 1))],
            )
            trainer.train()
        torch.save(learnt(classifier, tower), path)
        print(f"{tower} tower, {phase.name}: {time.time() - started:.0f} s", flush=True)


def learnt(classifier: TowerClassifier, tower: str) -> dict[str, torch.Tensor]:
    """The tower, its connector and heads. Whisper's sines are not learnt, and as long as the window of a phase."""
    prefixes = ("heads.", f"model.{tower}_")
    return {
        name: parameter.detach()
        for name, parameter in classifier.named_parameters()
        if name.startswith(prefixes) and name != "model.speech_tower.embed_positions.weight"
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("tower", choices=TOWERS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_tower(args, args.tower)


if __name__ == "__main__":
    main()
