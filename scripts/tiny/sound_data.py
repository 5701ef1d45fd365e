"""Sound events with a known name, made from sines and noise."""

from __future__ import annotations

import numpy as np

SAMPLING_RATE = 16_000
EVENTS = ("tone", "rising chirp", "falling chirp", "noise", "clicks", "siren", "beeps")
MAX_BEEPS = 4
# The gap of an octave keeps the question for low or high fair; a middle tone is never asked about.
PITCHES = {"low": (150.0, 500.0), "middle": (500.0, 1200.0), "high": (1200.0, 3600.0)}


def _sine(frequency: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def _fade(sound: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    edge = min(int(seconds * SAMPLING_RATE), len(sound) // 2)
    ramp = np.linspace(0, 1, edge)
    sound[:edge] *= ramp
    sound[len(sound) - edge :] *= ramp[::-1]
    return sound


def _seconds(rng: np.random.Generator, shortest: float, longest: float) -> np.ndarray:
    """Sample times of a sound of random length; one in eight is longer than the model hears in one piece."""
    stretch = 2.2 if rng.random() < 0.125 else 1.0
    return np.arange(int(stretch * rng.uniform(shortest, longest) * SAMPLING_RATE)) / SAMPLING_RATE


def _finish(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Random level, some silence around, mostly a noise floor 28 to 60 dB below the sound; float32 in [-1, 1]."""
    level = rng.uniform(0.1, 0.95)
    before, after = (int(max(rng.uniform(-0.1, 0.3), 0) * SAMPLING_RATE) for _ in range(2))
    sound = np.concatenate([np.zeros(before), level * sound, np.zeros(after)])
    if rng.random() < 0.7:
        sound = sound + rng.normal(0, level * 10 ** (-rng.uniform(28, 60) / 20), len(sound))
    return np.clip(sound, -1, 1).astype(np.float32)


def tone(rng: np.random.Generator, height: str) -> np.ndarray:
    """A steady tone with some overtones; `height` is one of PITCHES."""
    pitch = np.exp(rng.uniform(*np.log(PITCHES[height])))
    frequency = np.full(len(_seconds(rng, 0.5, 3.8)), pitch)
    overtones = rng.uniform(0, 0.3, 2) * rng.integers(2)
    sound = _sine(frequency) + overtones[0] * _sine(2 * frequency) + overtones[1] * _sine(3 * frequency)
    return _finish(rng, _fade(sound / np.abs(sound).max()))


def beeps(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` short equal tones with gaps between them."""
    pitch = np.exp(rng.uniform(*np.log((150.0, 3600.0))))
    length, gap = rng.uniform(0.12, 0.2), rng.uniform(0.16, 0.24)
    beep = _fade(_sine(np.full(int(length * SAMPLING_RATE), pitch)))
    pause = np.zeros(int(gap * SAMPLING_RATE))
    parts = [part for _ in range(count) for part in (beep, pause)]
    return _finish(rng, np.concatenate(parts[:-1]))


def _chirp(rng: np.random.Generator, rising: bool) -> np.ndarray:
    low = np.exp(rng.uniform(*np.log((150.0, 900.0))))
    high = min(low * rng.uniform(2.5, 6), 5000.0)
    ends = (low, high) if rising else (high, low)
    sweep = (np.geomspace, np.linspace)[rng.integers(2)]
    frequency = sweep(*ends, int(rng.uniform(0.5, 3) * SAMPLING_RATE))
    return _finish(rng, _fade(_sine(frequency)))


def _noise(rng: np.random.Generator) -> np.ndarray:
    sound = rng.normal(0, 1, len(_seconds(rng, 0.5, 3.8)))
    colour = rng.uniform(0, 0.9)
    spectrum = np.fft.rfft(sound)
    spectrum /= np.maximum(np.arange(len(spectrum)) / len(spectrum), 0.01) ** colour
    sound = np.fft.irfft(spectrum, len(sound))
    return _finish(rng, _fade(0.9 * sound / np.abs(sound).max()))


def _clicks(rng: np.random.Generator) -> np.ndarray:
    sound = np.zeros(len(_seconds(rng, 1, 3.8)))
    length = int(rng.uniform(0.002, 0.008) * SAMPLING_RATE)
    click = np.exp(-np.arange(4 * length) / length) * rng.choice([-1.0, 1.0], 4 * length)
    if rng.random() < 0.3:
        click[1:] = 0
    slowest = rng.uniform(0.12, 0.4)
    fastest = slowest * rng.uniform(0.4, 1)
    at = 0.0
    while (start := int(at * SAMPLING_RATE)) + len(click) <= len(sound):
        sound[start : start + len(click)] += click
        at += rng.uniform(fastest, slowest)
    return _finish(rng, sound)


def _siren(rng: np.random.Generator) -> np.ndarray:
    time = _seconds(rng, 1.5, 3.8)
    middle, depth, rate = rng.uniform(600, 1100), rng.uniform(0.25, 0.45), rng.uniform(0.9, 2.5)
    wave = np.sin(2 * np.pi * rate * time + rng.uniform(0, 2 * np.pi))
    if rng.integers(2):
        wave = np.sign(wave)
    return _finish(rng, _fade(_sine(middle * (1 + depth * wave))))


def event(rng: np.random.Generator, name: str) -> np.ndarray:
    """A sound of the kind `name` (one of EVENTS): float32 mono at 16 kHz, 0.5 to 9 seconds."""
    if name == "tone":
        return tone(rng, list(PITCHES)[rng.integers(len(PITCHES))])
    if name == "beeps":
        return beeps(rng, int(rng.integers(2, MAX_BEEPS + 1)))
    if name.endswith("chirp"):
        return _chirp(rng, name.startswith("rising"))
    return {"noise": _noise, "clicks": _clicks, "siren": _siren}[name](rng)
