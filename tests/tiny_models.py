"""A random UniMoE model with all four towers that is small enough for every test, and inputs that fit it."""

from typing import Any

import torch

from unimoe.modeling_unimoe.configuration_unimoe import MODALITIES, UniMoEConfig

NUM_VIDEO_FRAMES = 2
NUM_AUDIO_FRAMES = 64
# Ids below are padding, beginning and end of a sequence.
FIRST_TEXT_ID = 3


def tiny_config(**overrides: Any) -> UniMoEConfig:
    """A Llama decoder (3 layers, experts in 0 and 2) with CLIP, BEATs and Whisper towers.

    `overrides` replace whole arguments of `UniMoEConfig`, so `audio_config=None, audio_connector_config=None` takes a
    tower away. Placeholder ids follow the vocabulary of 99 unless given.
    """
    arguments = {
        "text_config": tiny_text_config(),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_embed_dim": 16,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "num_buckets": 16,
            "max_bucket_distance": 32,
            "layerdrop": 0.0,
        },
        "speech_config": tiny_whisper_config(),
        "vision_connector_config": {"type": "mlp"},
        "audio_connector_config": {
            "type": "qformer",
            "num_query_tokens": 3,
            "backbone_config": tiny_qformer_config(),
        },
        "speech_connector_config": {
            "type": "whisper_decoder",
            "num_query_tokens": 5,
            "backbone_config": tiny_whisper_config(),
        },
        "text_sparsity": {"layers": "even", "num_experts": 4, "top_k": 2},
    }
    return UniMoEConfig(**{**arguments, **overrides})


def tiny_text_config(**overrides: Any) -> dict[str, Any]:
    """The decoder of `tiny_config`, with some fields replaced."""
    return {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides,
    }


def tiny_whisper_config(**overrides: Any) -> dict[str, Any]:
    """The speech tower of `tiny_config`, with some fields replaced; takes 40 frames instead of 3000."""
    return {
        "model_type": "whisper",
        "vocab_size": 20,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 80,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        **overrides,
    }


def tiny_qformer_config(**overrides: Any) -> dict[str, Any]:
    """The audio connector's Q-Former of `tiny_config`, with some fields replaced."""
    return {
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **overrides,
    }


def tiny_inputs(
    config: UniMoEConfig,
    batch_size: int = 2,
    modalities: tuple[str, ...] | None = None,
    num_text_tokens: int = 4,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Model inputs in which every row holds one item of each of `modalities` (default: all that the model takes).

    A row is `num_text_tokens` random ids, then for each modality its placeholders and as many random ids again, and
    holds no padding.
    """
    modalities = config.input_modalities if modalities is None else modalities
    generator = torch.Generator().manual_seed(seed)
    placeholders = [getattr(config, f"{modality}_token_id") for modality in MODALITIES]
    vocabulary = [i for i in range(FIRST_TEXT_ID, config.text_config.vocab_size) if i not in placeholders]

    def text() -> torch.Tensor:
        chosen = torch.randint(len(vocabulary), (batch_size, num_text_tokens), generator=generator)
        return torch.tensor(vocabulary)[chosen]

    pieces = [text()]
    for modality in modalities:
        token_id = getattr(config, f"{modality}_token_id")
        pieces += [torch.full((batch_size, num_placeholders(config, modality)), token_id), text()]
    input_ids = torch.cat(pieces, dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        **_media(config, batch_size, modalities, generator),
    }


def num_placeholders(config: UniMoEConfig, modality: str) -> int:
    """Tokens that one item of `tiny_inputs` takes."""
    if modality in ("image", "video"):
        return config.num_image_tokens
    return config.num_audio_tokens if modality == "audio" else config.num_speech_tokens


def _media(
    config: UniMoEConfig, batch_size: int, modalities: tuple[str, ...], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    media = {}
    if "image" in modalities or "video" in modalities:
        side = config.vision_config.image_size
    if "image" in modalities:
        media["pixel_values"] = random(3, side, side)
    if "video" in modalities:
        media["pixel_values_videos"] = random(NUM_VIDEO_FRAMES, 3, side, side)
    if "audio" in modalities:
        media["input_values"] = random(NUM_AUDIO_FRAMES, config.audio_config.num_mel_bins)
        media["input_values_mask"] = torch.ones(batch_size, NUM_AUDIO_FRAMES, dtype=torch.long)
    if "speech" in modalities:
        speech = config.speech_config
        media["input_features"] = random(speech.num_mel_bins, 2 * speech.max_source_positions)
    return media
