"""Writes the files of `make demo` and their questions: `python -m scripts.tiny.demo_media`.

They come from a split of their own: never trained on, and not part of the evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

import unimoe.demo

from .items import Item, make_item
from .questions import TASKS
from .sound_data import SAMPLING_RATE

FRAMES_PER_SECOND = 8
# File, kind of item, what it shall be, and what is asked about it (a task of `questions.py` and a phrasing).
FILES: tuple[tuple[str, str, dict[str, Any], tuple[tuple[str, str], ...]], ...] = (
    (
        "picture.png",
        "scene",
        {"shape": "star", "colour": "red", "count": 3},
        (
            ("image: colour", "what colour is it?"),
            ("image: shape", "what shape do you see?"),
            ("image: count", "how many stars are there?"),
            ("image: describe", "describe the picture."),
        ),
    ),
    ("handwriting.png", "digit", {"digit": 7}, (("image: digit", "what digit is this?"),)),
    (
        "video.mp4",
        "shape_video",
        {"shape": "triangle", "colour": "blue", "moves": True},
        (
            ("video: colour", "what colour is it?"),
            ("video: shape", "which shape is it?"),
            ("video: motion", "is it moving?"),
        ),
    ),
    ("siren.wav", "event", {"event": "siren"}, (("audio: event", "what sound is this?"),)),
    (
        "beeps.wav",
        "event",
        {"event": "beeps", "beeps": 3},
        (("audio: event", "what do you hear?"), ("audio: beeps", "how many beeps are there?")),
    ),
    ("word.wav", "word", {"word": "seven"}, (("speech: word", "what word is said?"),)),
    ("question.wav", "spoken_question", {"about": "colour"}, ()),
)
# Questions about several of the files.
TOGETHER = (
    ("mixed: picture, spoken colour question", ("picture.png", "question.wav"), ""),
    ("mixed: video, spoken colour question", ("video.mp4", "question.wav"), ""),
    ("mixed: picture and sound", ("picture.png", "siren.wav"), "what colour is it and what sound is this?"),
)


def find_item(kind: str, facts: dict[str, Any]) -> Item:
    """The first item of the demo's split of which the facts are true."""
    index = 0
    while True:
        item = make_item(kind, "demo", index)
        if facts.items() <= item.facts.items():
            return item
        index += 1


def write(path: Path, media: Any) -> None:
    """A picture, frames or a sound to a file of the type that its name says."""
    if isinstance(media, Image.Image):
        media.save(path, optimize=True)
    elif isinstance(media, list):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
            stream.width, stream.height = media[0].size
            stream.bit_rate = 400_000
            for frame in media:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
    else:
        soundfile.write(path, np.asarray(media), SAMPLING_RATE, subtype="PCM_16")


def main() -> None:
    # Without options; whatever else is written behind it shall not replace the files.
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    folder = unimoe.demo.DEMO_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    items, questions = {}, []

    def ask(task_name: str, files: tuple[str, ...], phrasing: str) -> None:
        task = TASKS[task_name]
        facts = {name: value for file in files for name, value in items[file].facts.items()}
        typed = [{"type": kind, "name": file} for kind, file in zip(task.content_types, files)]
        questions.append({"files": typed, "question": phrasing, "answer": task.answer(facts)})

    for name, kind, facts, asked in FILES:
        items[name] = find_item(kind, facts)
        write(folder / name, items[name].media)
        for task_name, phrasing in asked:
            ask(task_name, (name,), phrasing)
    for task_name, files, phrasing in TOGETHER:
        ask(task_name, files, phrasing)
    (folder / "questions.json").write_text(json.dumps(questions, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
