"""From images to embeddings: the vision tower at every scale, the selected layer, the connector.

Shape letters: N images, R image side, P tokens per image, H decoder width, E experts.
"""

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
