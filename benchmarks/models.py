"""A UniMoE model and the Transformers model of the same size that it is compared with, both with the same random weights."""

from dataclasses import dataclass, field

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PreTrainedModel,
)

import unimoe

# Where Llava keeps the two layers of its projector.
PEER_NAMES = {"model.multi_modal_projector.linear_1.": 0, "model.multi_modal_projector.linear_2.": 1}


@dataclass(frozen=True)
class Sizes:
    """Of a model; the defaults make a decode step of some tens of milliseconds on two cores."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 4
    num_heads: int = 16
    num_key_value_heads: int = 16
    num_experts: int = 4
    top_k: int = 2
    vocab_size: int = 8000
    vision_size: int = 512
    vision_layers: int = 6
    image_size: int = 224
    patch_size: int = 14
    sound_size: int = 384
    sound_layers: int = 4
    num_query_tokens: int = 50
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def image_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def audio_token_id(self) -> int:
        return self.vocab_size - 2

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def decoder(self) -> dict:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            # No end token, so that every model generates as many tokens as it is asked for.
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        }

    @property
    def vision(self) -> dict:
        return {
            "hidden_size": self.vision_size,
            "intermediate_size": 4 * self.vision_size,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_size // 64,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }

    def __str__(self) -> str:
        return (
            f"H={self.hidden_size} I={self.intermediate_size} {self.num_layers} layers, "
            f"{self.num_experts} experts top-{self.top_k}"
        )


SMALL = Sizes(num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4, num_key_value_heads=4, vocab_size=200,
              vision_size=64, vision_layers=2, image_size=28, sound_size=64, sound_layers=1, num_query_tokens=4)  # fmt: skip


def unimoe_model(sizes: Sizes, sound: bool = False) -> unimoe.UniMoEForConditionalGeneration:
    """A Mistral decoder with a sparse block in every layer, a CLIP tower and, with `sound`, BEATs and a Q-Former."""
    sound_config = {
        "hidden_size": sizes.sound_size,
        "intermediate_size": 4 * sizes.sound_size,
        "num_hidden_layers": sizes.sound_layers,
        "num_attention_heads": sizes.sound_size // 32,
    }
    connector = {
        "type": "qformer",
        "num_query_tokens": sizes.num_query_tokens,
        "backbone_config": {
            "hidden_size": sizes.sound_size,
            "encoder_hidden_size": sizes.sound_size,
            "intermediate_size": 4 * sizes.sound_size,
            "num_hidden_layers": 2,
            "num_attention_heads": sizes.sound_size // 32,
        },
    }
    config = unimoe.UniMoEConfig(
        text_config={"model_type": "mistral", "sliding_window": None, **sizes.decoder},
        vision_config={"model_type": "clip_vision_model", **sizes.vision},
        vision_connector_config={"type": "mlp"},
        audio_config=sound_config if sound else None,
        audio_connector_config=connector if sound else None,
        speech_config=None,
        speech_connector_config=None,
        text_sparsity={"layers": "all", "num_experts": sizes.num_experts, "top_k": sizes.top_k},
        image_token_id=sizes.image_token_id,
        audio_token_id=sizes.audio_token_id if sound else sizes.vocab_size,
        dtype=sizes.dtype,
    )
    torch.manual_seed(0)
    return unimoe.UniMoEForConditionalGeneration(config).to(sizes.dtype).eval()


def peer_model(sizes: Sizes, experts: str | None = None) -> LlavaForConditionalGeneration:
    """Llava with a Mixtral decoder of these sizes; `experts` names its experts implementation (None: its default)."""
    config = LlavaConfig(
        text_config=MixtralConfig(
            num_local_experts=sizes.num_experts,
            num_experts_per_tok=sizes.top_k,
            sliding_window=None,
            **sizes.decoder,
        ),
        vision_config=CLIPVisionConfig(**sizes.vision),
        image_token_index=sizes.image_token_id,
        image_seq_length=sizes.num_image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        dtype=sizes.dtype,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(sizes.dtype).eval()
    if experts is not None:
        set_experts(model, experts)
    return model


def set_experts(model: PreTrainedModel, name: str) -> None:
    """The experts implementation of a decoder alone, since dense towers refuse one."""
    model.set_experts_implementation({"text_config": name})


def give_weights(peer: LlavaForConditionalGeneration, ours: unimoe.UniMoEForConditionalGeneration) -> None:
    """Makes `ours` hold the peer's tensors themselves, so that both compute the same from the same memory."""
    names = {}
    for name in peer.state_dict():
        prefix = next((prefix for prefix in PEER_NAMES if name.startswith(prefix)), None)
        parameter = name.removeprefix(prefix or "")
        names[name] = name if prefix is None else f"model.vision_connector.layers.{PEER_NAMES[prefix]}.{parameter}"
    ours.load_state_dict({names[name]: value for name, value in peer.state_dict().items()}, assign=True)


def prompt(sizes: Sizes, sound: bool = False, num_text_tokens: int = 64, sound_seconds: float = 10) -> dict:
    """Model inputs: text, an image, with `sound` a filterbank, more text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, sizes.vocab_size - 2, (1, num_text_tokens), generator=generator)
    pieces = [text[:, : num_text_tokens // 2], torch.full((1, sizes.num_image_tokens), sizes.image_token_id)]
    side = sizes.image_size
    inputs = {"pixel_values": torch.randn(1, 3, side, side, generator=generator, dtype=sizes.dtype)}
    if sound:
        pieces.append(torch.full((1, sizes.num_query_tokens), sizes.audio_token_id))
        frames = round(100 * sound_seconds)
        inputs["input_values"] = torch.randn(1, frames, 128, generator=generator, dtype=sizes.dtype)
        inputs["input_values_mask"] = torch.ones(1, frames, dtype=torch.long)
    input_ids = torch.cat([*pieces, text[:, num_text_tokens // 2 :]], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs}
