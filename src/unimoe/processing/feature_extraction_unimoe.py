"""Waveforms to BEATs filterbanks (sound tower) and Whisper log-mels (speech tower), one feature extractor for both."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.utils import TensorType, logging

from .spectrograms import kaldi_filterbank, kaldi_window_and_step, repeat_last, whisper_log_mel

logger = logging.get_logger(__name__)


class UniMoEFeatureExtractor(SequenceFeatureExtractor):
    """Cuts sounds into chunks and turns each chunk into what one of the two sound towers reads.

    The sound tower (BEATs) reads Kaldi filterbanks, the speech tower (Whisper) reads log-mels; a long sound gives
    several chunks, which stay consecutive in the batch.

    Args:
        sampling_rate: samples a second of the waveforms, in Hz.
        audio_chunk_samples: samples in one chunk for the sound tower (30 s); a shorter rest is filled up by repeating
            its last sample, as in the original.
        audio_max_chunks: chunks kept of one sound (the original drops what comes after 20, ten minutes); None: all.
        num_mel_bins: filterbank channels.
        audio_mean, audio_std: the filterbank becomes `(x - audio_mean) / (2 * audio_std)`.
        speech_chunk_samples: samples in one chunk for the speech tower (30 s), a multiple of `hop_length`; a shorter
            rest is filled up with zeros.
        speech_chunk_stride: distance between the starts of two speech chunks. The original takes chunks of 480001
            samples and reads 480000 of them, so it loses one sample at every boundary; the default does the same,
            `speech_chunk_stride == speech_chunk_samples` loses none.
        speech_max_chunks: chunks kept of one speech recording; None keeps all, as the original does.
        speech_feature_size, n_fft, hop_length: mel channels, window and step (in samples) of the log-mel.

    Raises:
        ValueError: a value out of range; the message names the argument.
    """

    model_input_names = ["input_values", "input_values_mask", "input_features"]

    def __init__(
        self,
        sampling_rate: int = 16000,
        audio_chunk_samples: int = 480000,
        audio_max_chunks: int | None = 20,
        num_mel_bins: int = 128,
        audio_mean: float = 15.41663,
        audio_std: float = 6.55582,
        speech_chunk_samples: int = 480000,
        speech_chunk_stride: int = 480001,
        speech_max_chunks: int | None = None,
        speech_feature_size: int = 80,
        n_fft: int = 400,
        hop_length: int = 160,
        padding_value: float = 0.0,
        **kwargs: Any,
    ):
        # Saved by the base class beside num_mel_bins, which it repeats.
        kwargs.pop("feature_size", None)
        # Chunks are not padded to each other. With a side of its own, Transformers' pipelines would refuse batches
        # wherever the tokenizer pads on the other.
        kwargs["padding_side"] = None
        super().__init__(feature_size=num_mel_bins, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.audio_chunk_samples = audio_chunk_samples
        self.audio_max_chunks = audio_max_chunks
        self.num_mel_bins = num_mel_bins
        self.audio_mean = audio_mean
        self.audio_std = audio_std
        self.speech_chunk_samples = speech_chunk_samples
        self.speech_chunk_stride = speech_chunk_stride
        self.speech_max_chunks = speech_max_chunks
        self.speech_feature_size = speech_feature_size
        self.n_fft = n_fft
        self.hop_length = hop_length
        self._validate()

    def _validate(self) -> None:
        whole = "sampling_rate audio_chunk_samples num_mel_bins speech_chunk_samples speech_chunk_stride "
        for argument in (whole + "speech_feature_size n_fft hop_length audio_max_chunks speech_max_chunks").split():
            value = getattr(self, argument)
            if value is None and argument.endswith("_max_chunks"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                or_none = " or None" if argument.endswith("_max_chunks") else ""
                raise ValueError(f"`{argument}` must be a whole number of at least 1{or_none}, got {value!r}.")
        for argument in ("audio_mean", "audio_std"):
            value = getattr(self, argument)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"`{argument}` must be a finite number, got {value!r}.")
        if self.audio_std <= 0:
            raise ValueError(f"`audio_std` must be above 0, got {self.audio_std}.")
        if self.sampling_rate < 1000:
            raise ValueError(f"`sampling_rate` is in Hz and must be at least 1000, got {self.sampling_rate}.")
        window_length, _ = kaldi_window_and_step(self.sampling_rate)
        if self.audio_chunk_samples < window_length:
            raise ValueError(
                f"`audio_chunk_samples` must hold at least one window of {window_length} samples, "
                f"got {self.audio_chunk_samples}."
            )
        if self.speech_chunk_samples % self.hop_length:
            raise ValueError(
                f"`speech_chunk_samples` must be a multiple of `hop_length` ({self.hop_length}), "
                f"got {self.speech_chunk_samples}."
            )
        if self.speech_chunk_samples <= self.n_fft // 2:
            raise ValueError(
                f"`speech_chunk_samples` must be above half of `n_fft` ({self.n_fft}), "
                f"got {self.speech_chunk_samples}."
            )
        if self.speech_chunk_stride < self.speech_chunk_samples:
            raise ValueError(
                f"`speech_chunk_stride` ({self.speech_chunk_stride}) must not be below `speech_chunk_samples` "
                f"({self.speech_chunk_samples}): chunks do not overlap."
            )

    @property
    def audio_num_frames(self) -> int:
        """Filterbank frames of one chunk (2998 for 30 s): only whole windows count."""
        window_length, step = kaldi_window_and_step(self.sampling_rate)
        return 1 + (self.audio_chunk_samples - window_length) // step

    @property
    def speech_num_frames(self) -> int:
        """Log-mel frames of one chunk (3000 for 30 s)."""
        return self.speech_chunk_samples // self.hop_length

    def extract_audio(self, waveforms: Sequence[Any]) -> dict[str, Any]:
        """BEATs filterbanks, chunk by chunk, as the original makes them.

        Args:
            waveforms: mono sounds, each [samples] in -1..1 at `sampling_rate`.

        Returns:
            input_values: float32 [chunks of all sounds, frames, num_mel_bins], normalised.
            input_values_mask: int64 [chunks of all sounds, frames], 1 where any of the 10 ms of samples that start
                with the frame is real, 0 where all are padding.
            num_chunks: how many consecutive chunks each sound has.

        Raises:
            ValueError: a sound is not one-dimensional, has no samples, or has NaN or infinite ones.
        """
        frames = self.audio_num_frames
        _, step = kaldi_window_and_step(self.sampling_rate)
        frame_starts = np.arange(frames) * step
        values, masks, num_chunks = [], [], []
        for index, waveform in enumerate(waveforms):
            samples = _as_mono(waveform, f"audio[{index}]")
            chunks = self._split(
                samples, self.audio_chunk_samples, self.audio_chunk_samples, self.audio_max_chunks, f"audio[{index}]"
            )
            for chunk in chunks:
                filterbank = self._filterbank(chunk)
                values.append(filterbank.sub_(self.audio_mean).div_(2 * self.audio_std).numpy())
                masks.append((frame_starts < len(chunk)).astype(np.int64))
            num_chunks.append(len(chunks))
        return {
            "input_values": np.stack(values) if values else np.zeros((0, frames, self.num_mel_bins), np.float32),
            "input_values_mask": np.stack(masks) if masks else np.zeros((0, frames), np.int64),
            "num_chunks": num_chunks,
        }

    def _filterbank(self, chunk: np.ndarray) -> torch.Tensor:
        """[frames, num_mel_bins] of a chunk filled up with its last sample."""
        window_length, step = kaldi_window_and_step(self.sampling_rate)
        # From the last sample on all frames are equal: one of them is computed.
        num_computed = min(self.audio_num_frames, math.ceil((len(chunk) - 1) / step) + 1)
        length = (num_computed - 1) * step + window_length
        filled = np.pad(chunk[:length], (0, max(0, length - len(chunk))), mode="edge")
        filterbank = kaldi_filterbank(torch.from_numpy(filled), self.num_mel_bins, self.sampling_rate)
        return repeat_last(filterbank, self.audio_num_frames)

    def extract_speech(self, waveforms: Sequence[Any]) -> dict[str, Any]:
        """Whisper log-mels of every chunk alone, equal to what Transformers' `WhisperFeatureExtractor` gives.

        Args:
            waveforms: mono recordings, each [samples] in -1..1 at `sampling_rate`.

        Returns:
            input_features: float32 [chunks of all recordings, speech_feature_size, frames].
            num_chunks: how many consecutive chunks each recording has.

        Raises:
            ValueError: a recording is not one-dimensional, has no samples, or has NaN or infinite ones.
        """
        features, num_chunks = [], []
        for index, waveform in enumerate(waveforms):
            name = f"speech[{index}]"
            samples = _as_mono(waveform, name)
            chunks = self._split(
                samples, self.speech_chunk_samples, self.speech_chunk_stride, self.speech_max_chunks, name
            )
            for chunk in chunks:
                log_mel = whisper_log_mel(
                    chunk,
                    self.speech_chunk_samples,
                    self.speech_feature_size,
                    self.sampling_rate,
                    self.n_fft,
                    self.hop_length,
                )
                features.append(log_mel.T.numpy())
            num_chunks.append(len(chunks))
        empty = np.zeros((0, self.speech_feature_size, self.speech_num_frames), np.float32)
        return {"input_features": np.stack(features) if features else empty, "num_chunks": num_chunks}

    def _split(
        self, samples: np.ndarray, length: int, stride: int, max_chunks: int | None, name: str
    ) -> list[np.ndarray]:
        # A rest that fits into one stride is one chunk, so a recording of exactly `stride` samples is not split.
        count = max(1, math.ceil(len(samples) / stride))
        if max_chunks is not None and count > max_chunks:
            logger.warning(
                f"{name} lasts {len(samples) / self.sampling_rate:.1f} s; only its first "
                f"{max_chunks * stride / self.sampling_rate:.1f} s ({max_chunks} chunks) are used."
            )
            count = max_chunks
        return [samples[i * stride : i * stride + length] for i in range(count)]

    def __call__(
        self,
        audio: Any = None,
        speech: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Features of sounds, of speech recordings, or of both.

        Args:
            audio: one mono sound [samples] or a list of them, for the sound tower.
            speech: the same for the speech tower.
            sampling_rate: of all of them, in Hz; must be the extractor's own.
            return_tensors: "pt" or "np".

        Returns:
            `input_values` and `input_values_mask` if audio is given, `input_features` if speech is given, shaped as
            in `extract_audio` and `extract_speech` (which also tell how many chunks each item has).

        Raises:
            ValueError: neither is given, another sampling rate, or a bad waveform.
        """
        if audio is None and speech is None:
            raise ValueError("Neither `audio` nor `speech` is given; pass at least one waveform.")
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate} Hz, but the features are made from {self.sampling_rate} Hz; "
                "resample the waveforms first."
            )
        data: dict[str, np.ndarray] = {}
        if audio is not None:
            features = self.extract_audio(_as_list(audio))
            data.update({key: features[key] for key in ("input_values", "input_values_mask")})
        if speech is not None:
            data["input_features"] = self.extract_speech(_as_list(speech))["input_features"]
        return BatchFeature(data, tensor_type=return_tensors)


def _as_list(waveforms: Any) -> list[Any]:
    """One waveform (array, tensor, or list of numbers) or several, as several."""
    if isinstance(waveforms, (list, tuple)):
        return [waveforms] if waveforms and np.isscalar(waveforms[0]) else list(waveforms)
    return [waveforms] if waveforms.ndim == 1 else list(waveforms)


def _as_mono(waveform: Any, name: str) -> np.ndarray:
    """float32 [samples], checked."""
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu().float().numpy()
    samples = np.ascontiguousarray(waveform, dtype=np.float32)
    if np.ndim(waveform) != 1:
        raise ValueError(f"{name} must be mono with shape [samples], got shape {list(np.shape(waveform))}.")
    if not len(samples):
        raise ValueError(f"{name} has no samples; pass a sound of at least one sample.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} has NaN or infinite samples; pass finite values in -1..1.")
    return samples


__all__ = ["UniMoEFeatureExtractor"]
