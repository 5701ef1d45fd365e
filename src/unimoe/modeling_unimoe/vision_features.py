"""From images to embeddings: the vision tower at every scale, the selected layer, the connector; videos as means of frames.

Shape letters: N images or videos, F frames, R image side, P tokens per image, H decoder width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_unimoe import UniMoEConfig
from .connectors import connector_router_logits
from .multi_scale import merge_tiles, resize_and_tile


@dataclass
class UniMoEVisionOutput(BaseModelOutputWithPooling):
    r"""
    Args:
        router_logits (`tuple` of float [N * tiles, tokens, E]): Of a sparse tower with `output_router_logits=True`: one per
            sparse layer at the first scale, then at the next.
        connector_router_logits (float [N, P, E]): Of a sparse connector with `output_router_logits=True`.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    connector_router_logits: torch.Tensor | None = None


def encode_images(
    config: UniMoEConfig,
    tower: PreTrainedModel,
    connector: nn.Module,
    pixel_values: torch.Tensor,
    output_router_logits: bool = False,
    **kwargs,
) -> UniMoEVisionOutput:
    """Embeddings [N, P, H] of images [N, 3, R, R] as `pooler_output`.

    `last_hidden_state` is the selected layer, that of all scales side by side; `hidden_states` and `attentions` are those of
    the tower for the images at its own size. Further arguments go to the tower.
    """
    scales = config.vision_scales or [1]
    pixel_values = pixel_values.to(tower.dtype)
    if output_router_logits and config.vision_sparsity is not None:
        kwargs["output_router_logits"] = True
    outputs, selected, router_logits = [], [], []
    for scale in scales:
        tiles = resize_and_tile(pixel_values, scale)
        output = tower(tiles, return_dict=True, **kwargs)
        outputs.append(output)
        states = output.hidden_states[config.vision_feature_layer]
        router_logits += [logits.unflatten(0, (len(tiles), -1)) for logits in output.get("router_logits") or ()]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        selected.append(merge_tiles(states, scale))
    features = torch.cat(selected, dim=-1)
    return UniMoEVisionOutput(
        last_hidden_state=features,
        pooler_output=connector(features),
        hidden_states=outputs[0].hidden_states,
        attentions=outputs[0].attentions,
        router_logits=tuple(router_logits) or None,
        connector_router_logits=connector_router_logits(connector, features) if output_router_logits else None,
    )


def encode_videos(
    encode_frames: Callable[..., UniMoEVisionOutput],
    pixel_values_videos: torch.Tensor,
    video_frame_mask: torch.Tensor | None = None,
    **kwargs,
) -> UniMoEVisionOutput:
    """Embeddings [N, P, H] of videos [N, F, 3, R, R]: the mean over their real frames of what `encode_frames` makes of each.

    `last_hidden_state` is [N, F, P, width], zero for frames that are not real; `hidden_states` and `attentions` have one row
    per real frame. Further arguments go to `encode_frames`.

    Raises:
        ValueError: The videos or the mask have a wrong shape, or a video has no frame.
    """
    _check_video_shapes(pixel_values_videos, video_frame_mask)
    num_videos, num_frames = pixel_values_videos.shape[:2]
    frames = pixel_values_videos.flatten(0, 1)
    if video_frame_mask is None:
        outputs = encode_frames(frames, return_dict=True, **kwargs)
        outputs.pooler_output = outputs.pooler_output.unflatten(0, (num_videos, num_frames)).mean(dim=1)
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(0, (num_videos, num_frames))
        return outputs
    frames_per_video = video_frame_mask.bool().sum(dim=1)
    _check_every_video_has_a_frame(frames_per_video)
    # Padding frames are left out before the tower, which costs far more than this selection.
    place = video_frame_mask.flatten().nonzero().flatten()
    outputs = encode_frames(frames[place.to(frames.device)], return_dict=True, **kwargs)
    # Tower and connector may lie on other devices than the inputs.
    features, selected = outputs.pooler_output, outputs.last_hidden_state
    total = features.new_zeros((num_videos, *features.shape[1:]))
    total = total.index_add(0, place.to(features.device) // num_frames, features)
    outputs.pooler_output = total / frames_per_video.to(total).view(-1, 1, 1)
    every_frame = selected.new_zeros((len(frames), *selected.shape[1:]))
    every_frame = every_frame.index_copy(0, place.to(selected.device), selected)
    outputs.last_hidden_state = every_frame.unflatten(0, (num_videos, num_frames))
    return outputs


def _check_video_shapes(pixel_values_videos: torch.Tensor, video_frame_mask: torch.Tensor | None):
    if pixel_values_videos.ndim != 5:
        raise ValueError(f"`pixel_values_videos` must be [N, F, 3, R, R], got {list(pixel_values_videos.shape)}")
    shape = pixel_values_videos.shape[:2]
    if shape[1] == 0:
        raise ValueError("`pixel_values_videos` has no frames")
    if video_frame_mask is not None and video_frame_mask.shape != shape:
        raise ValueError(
            f"`video_frame_mask` must have one entry per frame, {list(shape)}, got {list(video_frame_mask.shape)}"
        )


def _check_every_video_has_a_frame(frames_per_video: torch.Tensor):
    # What a graph is captured from has shapes and no values.
    if torch.compiler.is_compiling():
        return
    empty = (frames_per_video == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"`video_frame_mask` has no real frame for video {', '.join(map(str, empty))} (counted from 0): mark at least one "
            "frame with 1, or leave the video out"
        )
