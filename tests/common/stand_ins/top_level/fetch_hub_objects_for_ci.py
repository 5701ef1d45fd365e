"""In place of the helper of Transformers' CI that keeps copies of hub files: makes a small file of the same kind."""

import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

_FOLDER = tempfile.TemporaryDirectory(prefix="transformers-tests-media-")
SIZE = (64, 48)
VIDEO_FRAMES = 11
SAMPLING_RATE = 16000


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    """A local picture, video or sound named as the file at `url` is."""
    path = Path(_FOLDER.name) / url.rsplit("/", 1)[-1]
    if not path.exists():
        write = {".png": _write_image, ".jpg": _write_image, ".mp4": _write_video}.get(path.suffix, _write_sound)
        write(path)
    return str(path)


def _picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def _write_image(path: Path):
    Image.fromarray(_picture(0)).save(path)


def _write_video(path: Path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = SIZE
        for index in range(VIDEO_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(index), format="rgb24")))
        container.mux(stream.encode())


def _write_sound(path: Path):
    seconds = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * seconds), SAMPLING_RATE)
