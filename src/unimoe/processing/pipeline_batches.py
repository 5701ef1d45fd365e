"""Requests of a pipeline joined to one batch for the model, and the model's output taken apart again."""

from typing import Any

import torch

# Inputs that say where a sequence is real; the other inputs along the sequence are padded with 0 too.
_SEQUENCE_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


def join_requests(requests: list[dict[str, Any]], pad_token_id: int | None) -> dict[str, Any]:
    """Several requests as one: sequences padded on the left, media one behind the other.

    Args:
        requests: `{"features": inputs of the model, "prompts": [prompts of a request]}`. A request has one row per
            prompt, so `prompts` stays grouped by request for `split_answers`.

    Raises:
        ValueError: there is no pad token.
    """
    features = [request["features"] for request in requests]
    batch = {}
    for name in dict.fromkeys(name for one in features for name in one):
        tensors = [one[name] for one in features if name in one]
        if name in _SEQUENCE_INPUTS:
            value = pad_token_id if name == "input_ids" else 0
            if value is None:
                raise ValueError("the tokenizer has no pad token, which a batch_size above 1 needs; set one.")
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [
                torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=value) for tensor in tensors
            ]
            batch[name] = torch.cat(tensors)
        elif name == "pixel_values_videos":
            batch.update(_join_videos(features))
        elif name != "video_frame_mask":
            batch[name] = torch.cat(tensors)
    return {"features": batch, "prompts": [prompts for request in requests for prompts in request["prompts"]]}


def split_answers(
    prompts: list[list[Any]], input_ids: torch.Tensor, sequences: torch.Tensor
) -> list[dict[str, list[Any] | torch.Tensor]]:
    """What belongs to each request of a batch: its prompts and their rows.

    Args:
        prompts: per request, the prompts of its rows.
        input_ids: [rows of all requests, S].
        sequences: [rows * returned sequences, S + new], as `generate` returns them.

    Returns:
        Per request `prompts`, `input_ids` [its rows, S] and `sequences` [its rows, returned sequences, S + new].
    """
    counts = [len(one) for one in prompts]
    sequences = sequences.reshape(len(input_ids), -1, sequences.shape[-1])
    parts = zip(prompts, input_ids.split(counts), sequences.split(counts))
    return [{"prompts": texts, "input_ids": ids, "sequences": rows} for texts, ids, rows in parts]


def _join_videos(features: list[Any]) -> dict[str, torch.Tensor]:
    """Videos of several requests one behind the other, padded with zero frames to the longest."""
    features = [one for one in features if "pixel_values_videos" in one]
    videos = [one["pixel_values_videos"] for one in features]
    masks = [
        one.get("video_frame_mask", video.new_ones(video.shape[:2], dtype=torch.int64))
        for one, video in zip(features, videos)
    ]
    width = max(video.shape[1] for video in videos)
    pad = torch.nn.functional.pad
    pixels = torch.cat([pad(video, (0, 0) * 3 + (0, width - video.shape[1])) for video in videos])
    mask = torch.cat([pad(mask, (0, width - mask.shape[1])) for mask in masks])
    return (
        {"pixel_values_videos": pixels}
        if bool(mask.all())
        else {"pixel_values_videos": pixels, "video_frame_mask": mask}
    )
