"""The questions, their phrasings and their right answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .items import CONTENT_TYPES, SPOKEN_QUESTIONS
from .sound_data import SAMPLING_RATE

Facts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Args:
        modality: The row of the results table that it counts for.
        items: Kinds of item, in the order in which they stand in the prompt.
        phrasings: Ways to ask; an empty one leaves the asking to the spoken item. May name `{shapes}`, from the facts.
        answer: The right answer from the facts of the items (those of several items joined in one dict).
        needs: A fact that the items must have for the question to make sense, as `(name, value or None for any)`.
        weight: How often it is asked in training, relative to the others.
    """

    modality: str
    items: tuple[str, ...]
    phrasings: tuple[str, ...]
    answer: Callable[[Facts], str]
    needs: tuple[str, Any] | None = None
    weight: float = 1.0

    @property
    def content_types(self) -> tuple[str, ...]:
        return tuple(CONTENT_TYPES[kind] for kind in self.items)

    def makes_sense(self, facts: Facts) -> bool:
        if self.needs is None:
            return True
        name, value = self.needs
        return name in facts and (value is None or facts[name] == value)


def plural(shape: str) -> str:
    return f"{shape}s"


def _describe(facts: Facts) -> str:
    shape = facts["shape"] if facts["count"] == 1 else plural(facts["shape"])
    return f"{facts['count']} {facts['colour']} {shape}"


COLOUR = (
    "what colour is it?",
    "which colour is it?",
    "what color is it?",
    "what colour do you see?",
    "name the colour.",
)
SHAPE = ("what shape is it?", "which shape is it?", "what shape do you see?", "name the shape.")
COUNT = (
    *("how many are there?", "how many shapes are there?", "how many {shapes} are there?"),
    *("how many do you see?", "how many {shapes} do you see?", "count the {shapes}."),
)
DIGIT = ("what digit is this?", "which digit is it?", "what digit do you see?", "read the digit.")
DESCRIBE = ("describe the picture.", "what is in the picture?", "what do you see?")
MOTION = ("does it move?", "is it moving?", "does the shape move?")
EVENT = ("what sound is this?", "which sound is it?", "what do you hear?", "name the sound.")
PITCH = ("is the tone high or low?", "is it a high or a low tone?", "how high is the tone?")
BEEPS = ("how many beeps are there?", "how many beeps do you hear?", "count the beeps.")
WORD = ("what word is said?", "which word is it?", "what does the speaker say?", "write down the word.")
LISTEN = ("", "answer the spoken question.", "listen and answer.")

TASKS: dict[str, Task] = {
    "image: colour": Task("image", ("scene",), COLOUR, lambda f: f["colour"]),
    "image: shape": Task("image", ("scene",), SHAPE, lambda f: f["shape"]),
    "image: count": Task("image", ("scene",), COUNT, lambda f: str(f["count"]), weight=1.5),
    "image: describe": Task("image", ("scene",), DESCRIBE, _describe, weight=1.5),
    "image: digit": Task("image", ("digit",), DIGIT, lambda f: str(f["digit"]), weight=2.5),
    "video: colour": Task("video", ("shape_video",), COLOUR, lambda f: f["colour"], weight=0.5),
    "video: shape": Task("video", ("shape_video",), SHAPE, lambda f: f["shape"]),
    "video: motion": Task("video", ("shape_video",), MOTION, lambda f: "yes" if f["moves"] else "no"),
    "video: digit": Task("video", ("digit_video",), DIGIT, lambda f: str(f["digit"]), weight=1.5),
    "audio: event": Task("audio", ("event",), EVENT, lambda f: f["event"], weight=1.5),
    "audio: pitch": Task("audio", ("event",), PITCH, lambda f: f["pitch"], needs=("pitch", None), weight=0.5),
    "audio: beeps": Task("audio", ("event",), BEEPS, lambda f: str(f["beeps"]), needs=("event", "beeps"), weight=1.5),
    "speech: word": Task("speech", ("word",), WORD, lambda f: f["word"], weight=3.0),
    "mixed: picture, spoken colour question": Task(
        "mixed", ("scene", "spoken_question"), LISTEN, lambda f: f["colour"], needs=("about", "colour"), weight=0.7
    ),
    "mixed: picture, spoken shape question": Task(
        "mixed", ("scene", "spoken_question"), LISTEN, lambda f: f["shape"], needs=("about", "shape"), weight=0.7
    ),
    "mixed: picture, spoken count question": Task(
        "mixed", ("scene", "spoken_question"), LISTEN, lambda f: str(f["count"]), needs=("about", "count"), weight=0.7
    ),
    "mixed: digit, spoken question": Task(
        "mixed", ("digit", "spoken_question"), LISTEN, lambda f: str(f["digit"]), needs=("about", "digit"), weight=0.7
    ),
    "mixed: video, spoken colour question": Task(
        "mixed",
        ("shape_video", "spoken_question"),
        LISTEN,
        lambda f: f["colour"],
        needs=("about", "colour"),
        weight=0.4,
    ),
    "mixed: video, spoken shape question": Task(
        "mixed", ("shape_video", "spoken_question"), LISTEN, lambda f: f["shape"], needs=("about", "shape"), weight=0.4
    ),
    "mixed: picture and sound": Task(
        "mixed",
        ("scene", "event"),
        ("what colour is it and what sound is this?", "name the colour and the sound."),
        lambda f: f"{f['colour']}, {f['event']}",
        weight=0.7,
    ),
    "mixed: video and word": Task(
        "mixed",
        ("shape_video", "word"),
        ("what shape is it and what word is said?", "name the shape and the word."),
        lambda f: f"{f['shape']}, {f['word']}",
        weight=0.7,
    ),
}
# Items in words, for a decoder that cannot see or hear yet.
DESCRIPTIONS: dict[str, Callable[[Facts], str]] = {
    "scene": _describe,
    "digit": lambda f: f"digit {f['digit']}",
    "shape_video": lambda f: f"{f['colour']} {f['shape']} {'moving' if f['moves'] else 'still'}",
    "digit_video": lambda f: f"digit {f['digit']}",
    "event": lambda f: " ".join(str(f[name]) for name in ("pitch", "beeps", "event") if name in f),
    "word": lambda f: f["word"],
    "spoken_question": lambda f: SPOKEN_QUESTIONS[f["about"]][0],
}
MODALITIES = ("image", "video", "audio", "speech", "mixed")


def word_question(rng: np.random.Generator, task: Task, facts: Facts) -> str:
    """A phrasing as people type it: some with a capital letter in front, some without the last sign."""
    phrasing = task.phrasings[rng.integers(len(task.phrasings))]
    if "{shapes}" in phrasing:
        phrasing = phrasing.format(shapes=plural(facts["shape"]))
    if rng.random() < 0.3:
        phrasing = phrasing[:1].upper() + phrasing[1:]
    if rng.random() < 0.1:
        phrasing = phrasing[:-1]
    return phrasing


def messages(
    content_types: tuple[str, ...], media: list[Any], phrasing: str, text_first: bool = False
) -> list[dict[str, Any]]:
    """The chat turn that asks: the items (sounds at SAMPLING_RATE) in order, and the text if there is any."""
    content = [{"type": kind, kind: item} for kind, item in zip(content_types, media)]
    for block in content:
        if block["type"] in ("audio", "speech"):
            block["sampling_rate"] = SAMPLING_RATE
    if phrasing:
        content.insert(0 if text_first else len(content), {"type": "text", "text": phrasing})
    return [{"role": "user", "content": content}]
