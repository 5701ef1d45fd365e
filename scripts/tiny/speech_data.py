"""Spoken words and questions from espeak-ng, in voices that training hears and in voices that it never hears."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *DIGIT_WORDS,
    *("red", "green", "blue", "yellow", "orange", "purple", "black", "white"),
    *("yes", "no", "stop", "left", "dog", "cat", "house", "water", "music", "hello"),
)
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
TRAIN_VARIANTS = (
    *("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f2", "f3", "f5", "klatt2", "Alex", "Alicia", "Gene", "Jacky"),
    *("Lee", "Mario", "Michael", "anika", "belinda", "benjamin", "boris", "david", "ed", "edward", "gustave"),
    *("iven", "linda", "marcelo", "max", "miguel", "norbert", "paul", "quincy", "rob", "sandro", "shelby", "steph"),
)
HELD_OUT_VARIANTS = (
    *("m4", "m8", "f4", "Andy", "Annie", "adam"),
    *("antonio", "john", "robert", "steph2", "victor", "travis"),
)


@dataclass(frozen=True)
class Voice:
    """How espeak-ng says something: accent, variant, speed (words a minute), pitch (0 to 99)."""

    accent: str
    variant: str
    speed: int
    pitch: int


def random_voice(rng: np.random.Generator, held_out: bool) -> Voice:
    variants = HELD_OUT_VARIANTS if held_out else TRAIN_VARIANTS
    return Voice(
        accent=ACCENTS[rng.integers(len(ACCENTS))],
        variant=variants[rng.integers(len(variants))],
        speed=int(rng.integers(125, 200)),
        pitch=int(rng.integers(25, 76)),
    )


def say(text: str, voice: Voice) -> np.ndarray:
    """`text` spoken: float32 mono at 16 kHz, as espeak-ng makes it. Raises RuntimeError without espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is not installed; it is needed to make speech (Debian: apt install espeak-ng)")
    command = [program, "-v", f"{voice.accent}+{voice.variant}", "-s", str(voice.speed), "-p", str(voice.pitch)]
    wav = subprocess.run([*command, "--stdout", text], check=True, capture_output=True).stdout
    # espeak-ng cannot know the length of what it streams, so its header claims more samples than there are.
    wav = wav[:40] + (len(wav) - 44).to_bytes(4, "little") + wav[44:]
    sound, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    return soxr.resample(sound, rate, SAMPLING_RATE).astype(np.float32)


def clip(rng: np.random.Generator, text: str, held_out: bool) -> np.ndarray:
    """`text` in a random voice and level, with silence around it and mostly a noise floor; float32 mono at 16 kHz."""
    sound = say(text, random_voice(rng, held_out))
    level = rng.uniform(0.2, 0.95) / np.abs(sound).max()
    before, after = (int(rng.uniform(0, 0.4) * SAMPLING_RATE) for _ in range(2))
    sound = np.concatenate([np.zeros(before), level * sound, np.zeros(after)])
    if rng.random() < 0.7:
        sound = sound + rng.normal(0, np.abs(sound).max() * 10 ** (-rng.uniform(35, 60) / 20), len(sound))
    return np.clip(sound, -1, 1).astype(np.float32)
