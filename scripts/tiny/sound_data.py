"""Sound events with a known name, made from sines and noise."""

from __future__ import annotations

import numpy as np

SAMPLING_RATE = 16_000
EVENTS = ("tone", "rising chirp", "falling chirp", "noise", "clicks", "siren", "beeps")
MAX_BEEPS = 4
# A gap of an octave between "low" and "high" keeps the question fair.
LOW_PITCH = (180.0, 500.0)
HIGH_PITCH = (1200.0, 3400.0)


def _sine(frequency: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def _fade(sound: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    edge = min(int(seconds * SAMPLING_RATE), len(sound) // 2)
    ramp = np.linspace(0, 1, edge)
    sound[:edge] *= ramp
    sound[len(sound) - edge :] *= ramp[::-1]
    return sound


def _finish(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Random level, some silence around, a noise floor 28 to 50 dB below the sound; float32 in [-1, 1]."""
    level = rng.uniform(0.15, 0.9)
    before, after = (int(rng.uniform(0, 0.3) * SAMPLING_RATE) for _ in range(2))
    sound = np.concatenate([np.zeros(before), level * sound, np.zeros(after)])
    sound = sound + rng.normal(0, level * 10 ** (-rng.uniform(28, 50) / 20), len(sound))
    return np.clip(sound, -1, 1).astype(np.float32)


def tone(rng: np.random.Generator, high: bool | None = None) -> np.ndarray:
    """A steady tone with some overtones, low or high (either when `high` is None)."""
    high = bool(rng.integers(2)) if high is None else high
    pitch = np.exp(rng.uniform(*np.log(HIGH_PITCH if high else LOW_PITCH)))
    frequency = np.full(int(rng.uniform(0.5, 3.5) * SAMPLING_RATE), pitch)
    overtones = rng.uniform(0, 0.3, 2)
    sound = _sine(frequency) + overtones[0] * _sine(2 * frequency) + overtones[1] * _sine(3 * frequency)
    return _finish(rng, _fade(sound / np.abs(sound).max()))


def beeps(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` short equal tones with gaps between them."""
    pitch = np.exp(rng.uniform(*np.log((LOW_PITCH[0], HIGH_PITCH[1]))))
    length, gap = rng.uniform(0.12, 0.3), rng.uniform(0.15, 0.35)
    beep = _fade(_sine(np.full(int(length * SAMPLING_RATE), pitch)))
    pause = np.zeros(int(gap * SAMPLING_RATE))
    parts = [part for _ in range(count) for part in (beep, pause)]
    return _finish(rng, np.concatenate(parts[:-1]))


def _chirp(rng: np.random.Generator, rising: bool) -> np.ndarray:
    low = np.exp(rng.uniform(*np.log((150.0, 900.0))))
    high = min(low * rng.uniform(2.5, 6), 5000.0)
    ends = (low, high) if rising else (high, low)
    frequency = np.geomspace(*ends, int(rng.uniform(0.5, 3) * SAMPLING_RATE))
    return _finish(rng, _fade(_sine(frequency)))


def _noise(rng: np.random.Generator) -> np.ndarray:
    sound = rng.normal(0, 1, int(rng.uniform(0.5, 3.5) * SAMPLING_RATE))
    colour = rng.uniform(0, 0.9)
    spectrum = np.fft.rfft(sound)
    spectrum /= np.maximum(np.arange(len(spectrum)) / len(spectrum), 0.01) ** colour
    sound = np.fft.irfft(spectrum, len(sound))
    return _finish(rng, _fade(0.9 * sound / np.abs(sound).max()))


def _clicks(rng: np.random.Generator) -> np.ndarray:
    sound = np.zeros(int(rng.uniform(1, 3.5) * SAMPLING_RATE))
    length = int(rng.uniform(0.003, 0.008) * SAMPLING_RATE)
    click = np.exp(-np.arange(4 * length) / length) * rng.choice([-1.0, 1.0], 4 * length)
    at = 0.0
    while (start := int(at * SAMPLING_RATE)) + len(click) <= len(sound):
        sound[start : start + len(click)] += click
        at += rng.uniform(0.1, 0.35)
    return _finish(rng, sound)


def _siren(rng: np.random.Generator) -> np.ndarray:
    time = np.arange(int(rng.uniform(1.5, 3.8) * SAMPLING_RATE)) / SAMPLING_RATE
    middle, depth, rate = rng.uniform(600, 1100), rng.uniform(0.25, 0.45), rng.uniform(0.9, 2.5)
    wave = np.sin(2 * np.pi * rate * time + rng.uniform(0, 2 * np.pi))
    if rng.integers(2):
        wave = np.sign(wave)
    return _finish(rng, _fade(_sine(middle * (1 + depth * wave))))


def event(rng: np.random.Generator, name: str) -> np.ndarray:
    """A sound of the kind `name` (one of EVENTS): float32 mono at 16 kHz, 0.5 to 4.5 seconds."""
    if name == "tone":
        return tone(rng)
    if name == "beeps":
        return beeps(rng, int(rng.integers(2, MAX_BEEPS + 1)))
    if name.endswith("chirp"):
        return _chirp(rng, name.startswith("rising"))
    return {"noise": _noise, "clicks": _clicks, "siren": _siren}[name](rng)
