"""Media with known contents: what every question is asked about.

An item is named by its kind, its split and its index, and is always the same for the same name. The held-out split has
other seeds, other writers' digits and other voices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import sound_data, speech_data, vision_data

SPLITS = ("train", "test", "demo")
KINDS = ("scene", "digit", "shape_video", "digit_video", "event", "word", "spoken_question")
# Which placeholder an item of a kind takes.
CONTENT_TYPES = {
    "scene": "image",
    "digit": "image",
    "shape_video": "video",
    "digit_video": "video",
    "event": "audio",
    "word": "speech",
    "spoken_question": "speech",
}
SPOKEN_QUESTIONS = {
    "colour": ("what colour is it", "which colour is it", "tell me the colour"),
    "shape": ("what shape is it", "which shape is it", "tell me the shape"),
    "count": ("how many are there", "count them", "tell me how many there are"),
    "digit": ("what digit is this", "which digit is it", "tell me the digit"),
}
FRAMES = (4, 4, 4, 6, 8)


@dataclass
class Item:
    """`media` is a PIL image, a list of them, or float32 mono sound at 16 kHz; `facts` is what is true about it."""

    kind: str
    facts: dict[str, Any]
    media: Any


def make_item(kind: str, split: str, index: int, seed: int = 0) -> Item:
    """Item `index` of a kind (one of KINDS) in a split (one of SPLITS)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind), index])
    return _MAKERS[kind](rng, split != "train")


def _pick(rng: np.random.Generator, options) -> Any:
    options = list(options)
    return options[rng.integers(len(options))]


def _scene(rng: np.random.Generator, held_out: bool) -> Item:
    shape, colour = _pick(rng, vision_data.SHAPES), _pick(rng, vision_data.COLOURS)
    count = int(rng.integers(1, vision_data.MAX_COUNT + 1))
    facts = {"shape": shape, "colour": colour, "count": count}
    return Item("scene", facts, vision_data.scene(rng, shape, colour, count))


def _digit(rng: np.random.Generator, held_out: bool) -> Item:
    digit, picture = vision_data.digit_picture(rng, held_out)
    return Item("digit", {"digit": digit}, picture)


def _shape_video(rng: np.random.Generator, held_out: bool) -> Item:
    shape, colour, moves = _pick(rng, vision_data.SHAPES), _pick(rng, vision_data.COLOURS), bool(rng.integers(2))
    facts = {"shape": shape, "colour": colour, "moves": moves}
    return Item("shape_video", facts, vision_data.shape_video(rng, shape, colour, moves, _pick(rng, FRAMES)))


def _digit_video(rng: np.random.Generator, held_out: bool) -> Item:
    digit, frames = vision_data.digit_video(rng, held_out, _pick(rng, FRAMES))
    return Item("digit_video", {"digit": digit}, frames)


def _event(rng: np.random.Generator, held_out: bool) -> Item:
    name = _pick(rng, sound_data.EVENTS)
    facts: dict[str, Any] = {"event": name}
    if name == "tone":
        height = _pick(rng, sound_data.PITCHES)
        if height != "middle":
            facts["pitch"] = height
        return Item("event", facts, sound_data.tone(rng, height))
    if name == "beeps":
        facts["beeps"] = int(rng.integers(2, sound_data.MAX_BEEPS + 1))
        return Item("event", facts, sound_data.beeps(rng, facts["beeps"]))
    return Item("event", facts, sound_data.event(rng, name))


def _word(rng: np.random.Generator, held_out: bool) -> Item:
    word = _pick(rng, speech_data.WORDS)
    return Item("word", {"word": word}, speech_data.clip(rng, word, held_out))


def _spoken_question(rng: np.random.Generator, held_out: bool) -> Item:
    about = _pick(rng, SPOKEN_QUESTIONS)
    sound = speech_data.clip(rng, _pick(rng, SPOKEN_QUESTIONS[about]), held_out)
    return Item("spoken_question", {"about": about}, sound)


_MAKERS = {
    "scene": _scene,
    "digit": _digit,
    "shape_video": _shape_video,
    "digit_video": _digit_video,
    "event": _event,
    "word": _word,
    "spoken_question": _spoken_question,
}
