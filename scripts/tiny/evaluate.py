"""Asks the tiny checkpoint about held-out items and prints what it gets right: `python -m scripts.tiny.evaluate`.

Held-out means other seeds, other writers' digits and other voices than in training. Every question goes the way of a
user's: raw picture, frames or waveform through the processor's chat template, greedy generation, exact match.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

import unimoe

from .items import Item, make_item
from .questions import MODALITIES, TASKS, Task, messages, word_question

TARGETS = {"image": 95.0, "video": 95.0, "audio": 95.0, "speech": 95.0, "mixed": 90.0}
BATCH_SIZE = 20
LONGEST_ANSWER = 8


@cache
def _held_out(kind: str, index: int, seed: int) -> Item:
    return make_item(kind, "test", index, seed)


def questions(task: Task, count: int, seed: int) -> list[tuple[list, str]]:
    """`count` conversations with their right answers."""
    asked: list[tuple[list, str]] = []
    rng = np.random.default_rng(seed)
    index = 0
    while len(asked) < count:
        items = [_held_out(kind, index, seed) for kind in task.items]
        index += 1
        facts = {name: value for item in items for name, value in item.facts.items()}
        if task.makes_sense(facts):
            media = [item.media for item in items]
            asked.append((messages(task.content_types, media, word_question(rng, task, facts)), task.answer(facts)))
    return asked


@torch.inference_mode()
def answers(model: torch.nn.Module, processor: unimoe.UniMoEProcessor, conversations: list[list]) -> list[str]:
    found = []
    for start in range(0, len(conversations), BATCH_SIZE):
        inputs = processor.apply_chat_template(
            conversations[start : start + BATCH_SIZE],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        ids = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        found += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def evaluate(model_path: Path, count: int, seed: int, show_errors: int) -> str:
    """The results as a Markdown table."""
    model = AutoModelForMultimodalLM.from_pretrained(model_path).eval()
    processor = AutoProcessor.from_pretrained(model_path)
    right: dict[str, int] = {}
    for name, task in TASKS.items():
        asked = questions(task, count, seed)
        given = answers(model, processor, [conversation for conversation, _ in asked])
        wrong = [(answer, truth) for answer, (_, truth) in zip(given, asked) if answer != truth]
        right[name] = count - len(wrong)
        for answer, truth in wrong[:show_errors]:
            print(f"  {name}: {answer!r} instead of {truth!r}")
    rows = ["| questions | right | of | accuracy | target |", "|---|---:|---:|---:|---:|"]
    for modality in MODALITIES:
        names = [name for name, task in TASKS.items() if task.modality == modality]
        good, total = sum(right[name] for name in names), count * len(names)
        rows.append(
            f"| **{modality}** | {good} | {total} | **{100 * good / total:.1f} %** | {TARGETS[modality]:.0f} % |"
        )
        rows += [f"| {name} | {right[name]} | {count} | {100 * right[name] / count:.1f} % | |" for name in names]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(unimoe.tiny_checkpoint()))
    parser.add_argument("--count", type=int, default=200, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-errors", type=int, default=0, help="wrong answers to print, per kind of question")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.time()
    print(evaluate(args.model, args.count, args.seed, args.show_errors))
    print(f"\n{args.count * len(TASKS)} questions in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
