"""Images and videos to pixel tensors, as the originals prepare them."""

from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.image_processing_backends import PilBackend


def on_pil_backend(image_processor: Any) -> Any:
    """The same image processor on the PIL backend, the only one that gives the originals' pixels bit by bit.

    Raises ValueError where Transformers has none of its type.
    """
    if image_processor is None or isinstance(image_processor, PilBackend):
        return image_processor
    given = type(image_processor).__name__
    name = given.removesuffix("Fast") + "Pil"
    pil_class = getattr(transformers, name, None)
    if pil_class is None:
        raise ValueError(f"image_processor: {given} has no PIL backend ({name}); pass one that has.")
    return pil_class.from_dict(image_processor.to_dict())


def image_pixels(
    image_processor: Any, images: list[Image.Image], pad_to_square: bool, options: dict[str, Any]
) -> np.ndarray:
    """RGB images to float32 [N, 3, R, R], on request each first centred on a square canvas in the mean colour.

    `options` replace those of the image processor.
    """
    if pad_to_square:
        colour = tuple(int(mean * 255) for mean in image_processor.image_mean)
        images = [_pad_to_square(image, colour) for image in images]
    pixels = image_processor(images=images, return_tensors="np", **options)["pixel_values"]
    return np.asarray(pixels, dtype=np.float32)


def video_pixels(
    image_processor: Any, videos: list[list[Image.Image]], pad_to_square: bool, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Videos as lists of RGB frames to `pixel_values_videos` float32 [N, F, 3, R, R].

    Where their lengths differ, the shorter end in zero frames and `video_frame_mask` int64 [N, F] tells the real ones.
    """
    frames = image_pixels(image_processor, [frame for video in videos for frame in video], pad_to_square, options)
    lengths = [len(video) for video in videos]
    pixels = np.zeros((len(videos), max(lengths), *frames.shape[1:]), dtype=np.float32)
    mask = np.zeros(pixels.shape[:2], dtype=np.int64)
    start = 0
    for i, length in enumerate(lengths):
        pixels[i, :length] = frames[start : start + length]
        mask[i, :length] = 1
        start += length
    if mask.all():
        return {"pixel_values_videos": pixels}
    return {"pixel_values_videos": pixels, "video_frame_mask": mask}


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
