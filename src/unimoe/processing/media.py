"""Media items of any kind to what the towers read: RGB images, lists of RGB frames, 16 kHz mono waveforms."""

import io
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .media_source import MediaError, check_complete, find_source, is_source, label, one_line, read_source
from .video_frames import open_container, read_frames

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# More rows than this are samples, not channels.
MAX_CHANNELS = 64


def check_media(item: Any, kind: str, name: str, sampling_rate: int | None = None) -> None:
    """Refuses what can be seen to be wrong without decoding or fetching anything.

    Args:
        item: what `load_image`, `load_audio` or `load_video` will be given.
        kind: "image", "video", "audio" or "speech".
        name: what to call the item in errors, such as `images[2]`.
        sampling_rate: of sound arrays, in Hz.

    Raises:
        MediaError: a missing path, an empty file, a wrong type, an array of sound without sampling rate.
    """
    if is_source(item):
        find_source(item, name, folder=kind == "video")
    elif kind == "image":
        if not isinstance(item, (Image.Image, np.ndarray, torch.Tensor)):
            raise _wrong_type(item, name, "an image must be a path, URL, bytes, base64, PIL image, array or tensor")
    elif kind == "video":
        if isinstance(item, (list, tuple)):
            if not item:
                raise MediaError(f"{name}: the list of frames is empty; pass at least one frame.")
            for index, frame in enumerate(item):
                check_media(frame, "image", f"{name}[{index}]")
        elif not isinstance(item, (np.ndarray, torch.Tensor)):
            raise _wrong_type(
                item, name, "a video must be a path, URL, bytes, base64, folder or list of frames, or 4-D array"
            )
    else:
        array, rate = _split_sound(item, name)
        _check_rate(rate if rate is not None else sampling_rate, name)
        if not isinstance(array, (np.ndarray, torch.Tensor)):
            wanted = "a sound must be a path, URL, bytes, base64, array or tensor"
            if array is not item:
                wanted = (
                    "a sound with its sampling rate must be an array or tensor; a file tells its own, so pass it alone"
                )
            raise _wrong_type(array, name, wanted)


def load_image(item: Any, name: str = "image") -> Image.Image:
    """An upright RGB image.

    Args:
        item: path, URL, bytes, base64, data URI, PIL image, or array/tensor [H, W], [H, W, C] or [C, H, W] with one,
            three or four channels, integers 0..255 (uint16: 0..65535) or floats 0..1. Of an animation the first frame.
        name: what to call the item in errors.

    Returns:
        PIL image, mode RGB, turned as its EXIF orientation says, 16-bit values scaled to 8 bits. Everything else is
        Pillow's `convert("RGB")`, as in the original systems: alpha is dropped, not blended.

    Raises:
        MediaError: the item is missing, unreachable, damaged, or no image.
    """
    check_media(item, "image", name)
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return _image_from_array(_as_numpy(item), name, channels_first=isinstance(item, torch.Tensor))
    source = None
    try:
        if isinstance(item, Image.Image):
            image = item
        else:
            source = read_source(find_source(item, name), name)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if 0 in image.size:
            raise MediaError(
                f"{label(name, source)}: the image has no pixels ({image.width} x {image.height}); pass one that has."
            )
        return _to_rgb(image)
    except MediaError:
        raise
    # Pillow's readers raise nearly anything on damaged files: OSError, SyntaxError, EOFError, struct.error...
    except Exception as error:
        # Its own message shows an object in memory.
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise MediaError(
            f"{label(name, source)}: not a readable image, or a damaged or truncated one ({reason}); "
            "pass a whole png, jpeg, webp or gif file."
        ) from None


def load_audio(
    item: Any, sampling_rate: int | None = None, target_sampling_rate: int = 16000, name: str = "audio"
) -> np.ndarray:
    """A mono waveform at the target rate, as the original systems load it: mean of channels, then soxr_hq resampling.

    Args:
        item: path, URL, bytes, base64 or data URI of a sound or of a video with a sound track; array or tensor
            [samples] or [channels, samples]; `{"array": ..., "sampling_rate": ...}`; or `(array, sampling_rate)`.
            Integer arrays are scaled to -1..1 by their type's range.
        sampling_rate: of an array, in Hz. Files tell their own.
        target_sampling_rate: of the result, in Hz.
        name: what to call the item in errors.

    Returns:
        float32 [samples].

    Raises:
        MediaError: the item is missing, unreachable, damaged, without a sound track, without samples, has NaN or
            infinite samples, or is an array without sampling rate.
    """
    check_media(item, "audio", name, sampling_rate)
    source = None
    if is_source(item):
        source = read_source(find_source(item, name), name)
        channels, rate = _read_sound(source, name)
    else:
        array, rate = _split_sound(item, name)
        rate = _check_rate(rate if rate is not None else sampling_rate, name)
        channels = _sound_channels(_as_numpy(array), name)
    if not channels.size:
        raise MediaError(f"{label(name, source)}: the sound has zero samples; pass a whole sound.")
    mono = channels.mean(axis=0)
    if not np.isfinite(mono).all():
        raise MediaError(f"{label(name, source)}: the sound has NaN or infinite samples; pass finite values in -1..1.")
    if rate == target_sampling_rate:
        return mono
    length = math.ceil(len(mono) * (float(target_sampling_rate) / rate))
    resampled = soxr.resample(mono, rate, target_sampling_rate, quality="soxr_hq")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def load_video(item: Any, num_frames: int = 8, name: str = "video") -> list[Image.Image]:
    """The frames of a video as upright RGB images.

    Args:
        item: path, URL, bytes, base64 or data URI of a video or animation, of which `num_frames` frames are taken at
            the times i * (total // num_frames) / fps, or all where it has fewer; or the frames themselves, used as
            given: a list of whatever `load_image` takes, an array or tensor [F, H, W, 3] or [F, 3, H, W], or a folder
            of images in the order of their names.
        num_frames: frames to take of a file.
        name: what to call the item in errors.

    Raises:
        MediaError: the item is missing, unreachable, damaged, empty, or no video.
    """
    if not is_count(num_frames):
        raise MediaError(f"{name}: `num_frames` must be a whole number of at least 1, got {num_frames!r}.")
    num_frames = int(num_frames)
    check_media(item, "video", name)
    if isinstance(item, (list, tuple)):
        return [load_image(frame, f"{name}[{index}]") for index, frame in enumerate(item)]
    if isinstance(item, (np.ndarray, torch.Tensor)):
        if item.ndim != 4 or not len(item):
            raise MediaError(
                f"{name}: an array of frames must have shape [F, H, W, 3] or [F, 3, H, W] with at least one frame, "
                f"got {list(item.shape)}."
            )
        return [load_image(frame, f"{name}[{index}]") for index, frame in enumerate(item)]
    source = read_source(find_source(item, name, folder=True), name)
    if isinstance(source, Path) and source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise MediaError(f"{label(name, source)}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        return [load_image(path, f"{name}[{index}]") for index, path in enumerate(paths)]
    if _is_webp(source):
        return _read_animated_webp(source, num_frames, name)
    return read_frames(source, num_frames, name)[0]


def is_count(value: Any) -> bool:
    """Whether this is a whole number of at least 1, of any numeric type."""
    return isinstance(value, Real) and not isinstance(value, bool) and value >= 1 and value % 1 == 0


def _wrong_type(item: Any, name: str, wanted: str) -> MediaError:
    return MediaError(f"{name}: got {type(item).__name__}, but {wanted}.")


def _as_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, np.ndarray):
        # Types are told apart below, and that of another byte order is another type.
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    array = array.detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


# Images


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Both of Pillow's functions copy where there is nothing to do.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_sixteen_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "I":
        values = np.asarray(image)
        # 32 bits wide in memory only: files of 16 bits are opened so, and so are 8-bit images converted to integers.
        if values.max() > 255:
            return Image.fromarray(_sixteen_to_eight_bits(values.clip(0, 65535))).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours, without Pillow's warning about the step in between.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _sixteen_to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _image_from_array(array: np.ndarray, name: str, channels_first: bool) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            array = array[:0]
    if array.ndim not in (2, 3) or not array.size:
        raise MediaError(
            f"{name}: an array must have shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels "
            f"and at least one pixel, got {shape}."
        )
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise MediaError(f"{name}: an array must be of integers 0..255 or floats 0..1, got {array.dtype}.")
    low, high = array.min(), array.max()
    if array.dtype == np.uint16:
        array = _sixteen_to_eight_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        # A little beyond the ends is what interpolation leaves behind.
        if not (low >= -0.01 and high <= 1.01):
            raise MediaError(
                f"{name}: float values must lie in 0..1, got {low:.4g}..{high:.4g}; divide by 255 or pass uint8."
            )
        array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    else:
        if low < 0 or high > 255:
            raise MediaError(f"{name}: integer values must lie in 0..255, got {low}..{high}.")
        array = array.astype(np.uint8)
    array = array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


# Sounds


def _split_sound(item: Any, name: str) -> tuple[Any, Any]:
    """The array and, where the item carries it, its sampling rate."""
    if isinstance(item, Mapping):
        if "array" not in item or "sampling_rate" not in item:
            raise MediaError(f"{name}: a sound as dict needs the keys 'array' and 'sampling_rate', got {list(item)}.")
        return item["array"], item["sampling_rate"]
    if isinstance(item, tuple) and len(item) == 2:
        return item
    return item, None


def _check_rate(rate: Any, name: str) -> int:
    if rate is None:
        raise MediaError(f"{name}: an array of sound needs its sampling rate; pass `sampling_rate=` in Hz.")
    is_number = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
    if not is_number or not 1 <= rate < math.inf:
        raise MediaError(f"{name}: the sampling rate must be a positive number of Hz, got {rate!r}.")
    if rate != int(rate):
        raise MediaError(f"{name}: the sampling rate must be a whole number of Hz, got {rate!r}.")
    return int(rate)


def _sound_channels(array: np.ndarray, name: str) -> np.ndarray:
    """float32 [channels, samples]"""
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > MAX_CHANNELS):
        raise MediaError(
            f"{name}: a sound must have shape [samples] or [channels, samples], got {list(array.shape)}"
            + ("; transpose it." if array.ndim == 2 else ".")
        )
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype in (np.int8, np.int16, np.int32):
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif not np.issubdtype(array.dtype, np.floating):
        raise MediaError(
            f"{name}: a sound must be of floats in -1..1 or of uint8, int8, int16 or int32, got {array.dtype}."
        )
    return np.atleast_2d(array.astype(np.float32, copy=False))


def _read_sound(source: Path | bytes, name: str) -> tuple[np.ndarray, int]:
    """float32 [channels, samples] and the rate of a file's sound."""
    check_complete(source, name)
    try:
        # Opened here: libsndfile's binding takes only names that the locale can write.
        with (
            io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as content,
            soundfile.SoundFile(content) as file,
        ):
            samples = file.read(dtype="float32", always_2d=True)
            rate = file.samplerate
            # A cut between two blocks is no decoding error; a stream's header holds no length or the largest one.
            cut = file.format == "FLAC" and len(samples) < file.frames < 2**36
    # TypeError: a suffix for headerless data.
    except (soundfile.LibsndfileError, TypeError):
        return _read_sound_track(source, name)
    if cut:
        raise MediaError(f"{label(name, source)}: the file is truncated; pass the whole file.")
    return samples.T, rate


def _read_sound_track(source: Path | bytes, name: str) -> tuple[np.ndarray, int]:
    """What libsndfile does not read: AAC and others, and the sound track of a video."""
    with open_container(source, name) as container:
        if not container.streams.audio:
            raise MediaError(f"{label(name, source)}: the file has no sound track; pass a file with sound.")
        stream = container.streams.audio[0]
        # Keeps rate and channels; only the sample format changes, to float32 [channels, samples].
        resampler = av.AudioResampler(format="fltp")
        try:
            blocks = [block.to_ndarray() for frame in container.decode(stream) for block in resampler.resample(frame)]
            blocks += [block.to_ndarray() for block in resampler.resample(None)] if blocks else []
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{label(name, source)}: the sound is damaged or truncated ({one_line(error)}); pass a whole file."
            ) from None
        empty = np.zeros((1, 0), np.float32)
        return (np.concatenate(blocks, axis=1) if blocks else empty), stream.codec_context.sample_rate


# Animations that FFmpeg does not read


def _is_webp(source: Path | bytes) -> bool:
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with source.open("rb") as file:
            head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def _read_animated_webp(source: Path | bytes, num_frames: int, name: str) -> list[Image.Image]:
    check_complete(source, name)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            step = max(image.n_frames // num_frames, 1)
            frames = []
            for index in range(0, image.n_frames, step)[:num_frames]:
                image.seek(index)
                frames.append(image.convert("RGB"))
            return frames
    except Exception as error:
        raise MediaError(
            f"{label(name, source)}: the animation is damaged or truncated ({one_line(error)}); pass a whole file."
        ) from None


__all__ = ["MediaError", "check_media", "load_audio", "load_image", "load_video"]
