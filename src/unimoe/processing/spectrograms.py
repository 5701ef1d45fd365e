"""Mel spectrograms of the two sound towers: Kaldi's filterbank for BEATs, Whisper's log-mel.

They are float32 on the CPU, whatever PyTorch's defaults for new tensors are: users set these for their models.

Shape letters: F frames, M mel bins.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

# Kaldi's filterbank as the BEATs checkpoints were trained with it: 25 ms windows every 10 ms.
WINDOW_SECONDS = 0.025
STEP_SECONDS = 0.010
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
# Kaldi works on 16-bit sample values.
KALDI_SCALE = 32768.0
# Frames that are worked on at a time, at most: few enough for a processor's cache, many enough for its threads.
BLOCK = 512
# A block has a multiple of so many, since matrix products of very few rows are summed in another order.
ROWS = 64


@lru_cache(maxsize=8)
def _povey_window(length: int) -> torch.Tensor:
    """Kaldi's default window, a symmetric Hann window to the power 0.85. float32 [length]."""
    return torch.hann_window(length, periodic=False, dtype=torch.float32, device="cpu").pow(0.85)


@lru_cache(maxsize=8)
def _kaldi_mel_filters(num_mel_bins: int, fft_length: int, sampling_rate: int) -> torch.Tensor:
    """Triangles straight in mel (1127 ln(1 + f/700)) from 20 Hz to half the rate. float32 [fft/2 + 1, M]."""

    def to_mel(hertz: torch.Tensor) -> torch.Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    precise = {"dtype": torch.float64, "device": "cpu"}
    ends = to_mel(torch.tensor([LOWEST_HZ, sampling_rate / 2], **precise))
    edges = torch.linspace(float(ends[0]), float(ends[1]), num_mel_bins + 2, **precise)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = to_mel(torch.arange(fft_length // 2 + 1, **precise) * sampling_rate / fft_length)[:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    # Kaldi leaves the bin at half the sampling rate out.
    filters[-1] = 0
    return filters.float()


@lru_cache(maxsize=8)
def _whisper_window_and_filters(
    num_mel_bins: int, sampling_rate: int, n_fft: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A periodic Hann window [n_fft] and Slaney's mel filters [n_fft/2 + 1, M], both float32."""
    own = WhisperFeatureExtractor(feature_size=num_mel_bins, sampling_rate=sampling_rate, n_fft=n_fft)
    window = torch.hann_window(n_fft, dtype=torch.float32, device="cpu")
    return window, torch.from_numpy(own.mel_filters).float()


def kaldi_window_and_step(sampling_rate: int) -> tuple[int, int]:
    """Samples in a window of the filterbank and between the starts of two."""
    return round(WINDOW_SECONDS * sampling_rate), round(STEP_SECONDS * sampling_rate)


def kaldi_filterbank(waveform: torch.Tensor, num_mel_bins: int, sampling_rate: int) -> torch.Tensor:
    """Kaldi's log mel filterbank with its default options and no dither.

    Args:
        waveform: float32 [samples] in -1..1, at least one 25 ms window long.
        num_mel_bins: triangles between 20 Hz and half the sampling rate.
        sampling_rate: in Hz.

    Returns:
        float32 [F, num_mel_bins] with F = 1 + (samples - window) // step; only whole windows count.
    """
    length, step = kaldi_window_and_step(sampling_rate)
    fft_length = 1 << (length - 1).bit_length()
    window = _povey_window(length)

    def cut(frames: torch.Tensor, out: torch.Tensor) -> None:
        frames = frames - frames.mean(dim=1, keepdim=True)
        torch.sub(frames[:, 1:], PREEMPHASIS * frames[:, :-1], out=out[:, 1:])
        torch.sub(frames[:, 0], PREEMPHASIS * frames[:, 0], out=out[:, 0])
        out.mul_(window)

    frames = (waveform * KALDI_SCALE).unfold(0, length, step)
    return _log_mel(
        frames,
        cut,
        fft_length,
        _kaldi_mel_filters(num_mel_bins, fft_length, sampling_rate),
        lambda mel: mel.clamp_(min=torch.finfo(torch.float32).eps).log_(),
    )


def whisper_log_mel(
    samples: np.ndarray, num_samples: int, num_mel_bins: int, sampling_rate: int, n_fft: int, hop_length: int
) -> torch.Tensor:
    """What `WhisperFeatureExtractor` makes of a sound filled up with zeros, without working on the zeros.

    Bit for bit where matrix products of any shape add up in the same order, as MKL's do with AVX-512; elsewhere to rounding.

    Args:
        samples: float32 [at most num_samples].
        num_samples: length with zeros, a multiple of `hop_length` and above half of `n_fft`.
        num_mel_bins, sampling_rate, n_fft, hop_length: as there.

    Returns:
        float32 [num_samples / hop_length, num_mel_bins].
    """
    half = n_fft // 2
    num_frames = num_samples // hop_length
    # The frames that hold anything but zeros, and one that holds nothing else.
    num_computed = min(num_frames, math.ceil((len(samples) + half) / hop_length) + 1)
    end = (num_computed - 1) * hop_length + n_fft - half
    filled, mirrored = min(end, num_samples), max(0, end - num_samples)
    padded = np.zeros(half + filled + mirrored, np.float32)
    padded[half : half + min(len(samples), filled)] = samples[:filled]
    padded[:half] = padded[2 * half : half : -1]
    if mirrored:
        padded[-mirrored:] = padded[-mirrored - 2 : -2 * mirrored - 2 : -1]
    window, filters = _whisper_window_and_filters(num_mel_bins, sampling_rate, n_fft)
    log_mel = _log_mel(
        torch.from_numpy(padded).unfold(0, n_fft, hop_length),
        lambda frames, out: torch.mul(frames, window, out=out),
        n_fft,
        filters,
        lambda mel: mel.clamp_(min=1e-10).log10_(),
    )
    floor = float(log_mel.max()) - 8.0
    for block in log_mel.split(BLOCK):
        # (x + 4) / 4 with the same bits, since scaling by a power of two does not round.
        block.clamp_(min=floor).mul_(0.25).add_(1.0)
    return repeat_last(log_mel, num_frames)


def repeat_last(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows [F, M] to [count, M]: the last one stands for all that follow."""
    return rows if len(rows) == count else torch.cat([rows, rows[-1:].expand(count - len(rows), -1)])


def _log_mel(
    frames: torch.Tensor,
    cut: Callable[[torch.Tensor, torch.Tensor], object],
    fft_length: int,
    filters: torch.Tensor,
    logarithm: Callable[[torch.Tensor], object],
) -> torch.Tensor:
    """Power of the spectrum of each frame [F, window] through mel filters [fft/2 + 1, M], and its logarithm: [F, M].

    `cut(frames, out)` writes windowed frames, `logarithm(mel)` works in place. The last block begins earlier rather than being
    shorter.
    """
    (num_frames, length), num_bins = frames.shape, fft_length // 2 + 1
    size = min(BLOCK, math.ceil(num_frames / ROWS) * ROWS)
    windowed = frames.new_zeros(size, fft_length)
    real, imaginary = frames.new_empty(size, num_bins), frames.new_empty(size, num_bins)
    log_mel = frames.new_empty(max(num_frames, size), filters.shape[1])
    for start in range(0, num_frames, size):
        start = max(0, min(start, num_frames - size))
        block, out = frames[start : start + size], log_mel[start : start + size]
        cut(block, windowed[: len(block), :length])
        # Without `out=`, which would be one more copy.
        spectrum = torch.view_as_real(torch.fft.rfft(windowed)).numpy()
        # Side by side in memory, the modulus takes a fifth of the time that it takes of complex numbers.
        np.copyto(real.numpy(), spectrum[..., 0])
        np.copyto(imaginary.numpy(), spectrum[..., 1])
        torch.hypot(real, imaginary, out=real).square_()
        torch.mm(real, filters, out=out)
        logarithm(out)
    return log_mel[:num_frames]


__all__ = ["kaldi_filterbank", "kaldi_window_and_step", "repeat_last", "whisper_log_mel"]
