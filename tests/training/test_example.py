"""examples/finetune_lora.py on the user's own JSON improves a held-out loss and leaves a checkpoint that loads."""

import json
import runpy
import sys
from pathlib import Path

from tiny_processor import image
from transformers import AutoModelForMultimodalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_lora.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return runpy.run_path(str(EXAMPLE))["main"]()


def write(folder, name, seeds):
    """A fact that the model cannot know: every picture shows a wug."""
    records = []
    for seed in seeds:
        image(seed).save(folder / f"{seed}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "it is a wug"}]
        records.append({"image": f"{seed}.png", "conversations": turns})
    (folder / name).write_text(json.dumps(records))
    return folder / name


def check(folder, monkeypatch, *options):
    train, heldout = write(folder, "train.json", range(8)), write(folder, "heldout.json", range(100, 104))
    before, after = run(monkeypatch, train, heldout, "--output", folder / "out", *options)
    assert after < before - 0.3
    AutoModelForMultimodalLM.from_pretrained(folder / "out" / "merged")
    AutoModelForMultimodalLM.from_pretrained(folder / "out" / "adapter")


def test_on_a_random_model(model_folder, tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, "--model", model_folder("sparse"), "--steps", 12, "--learning-rate", 1e-2)


def test_on_the_embedded_checkpoint(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, "--steps", 12)


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 80
