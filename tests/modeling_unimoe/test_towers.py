"""The model's towers against what the original systems recorded: CLIP features, projector, video mean, Whisper encoder."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_text_config
from transformers import AutoConfig, CLIPVisionModel, WhisperModel

from unimoe import UniMoEConfig, UniMoEModel
from unimoe.modeling_unimoe.vision_features import UniMoEVisionOutput, encode_videos


def read(path, *names):
    tensors = load_file(path)
    # Tensors that lie unaligned in a mapped file change matrix products by up to 1e-5.
    return [tensors[name].clone() for name in names]


def build(width, **config):
    text = tiny_text_config(hidden_size=width, intermediate_size=width, num_attention_heads=4, num_key_value_heads=4)
    return UniMoEModel(UniMoEConfig(text_config=text, **config)).eval()


def original_weights(folder, part):
    """Tensors of a connector as the original checkpoint has them."""
    found = {}
    for shard in sorted(folder.glob("*.bin")):
        tensors = torch.load(shard, weights_only=True)
        found |= {name.split(f"{part}.")[1]: value.float() for name, value in tensors.items() if f"{part}." in name}
    return found


@pytest.fixture(scope="module")
def clip(golden):
    """A model with the tower and the projector of the recorded audio release."""
    checkpoint = golden("unimoe_audio") / "checkpoint"
    folder = checkpoint / "clip-vit-large-patch14-336"
    model = build(64, vision_config=AutoConfig.from_pretrained(folder).vision_config)
    tower = CLIPVisionModel.from_pretrained(folder)
    model.vision_tower.load_state_dict(tower.state_dict())
    projector = original_weights(checkpoint / "Uni-MoE-audio-e2", "mm_projector")
    names = {"0.weight": "layers.0.weight", "0.bias": "layers.0.bias", "2.weight": "layers.1.weight"}
    names["2.bias"] = "layers.1.bias"
    model.vision_connector.load_state_dict({names[name]: value for name, value in projector.items()})
    return model


@torch.no_grad()
def test_clip_features_and_projector(clip, golden):
    cases = golden("unimoe_audio") / "cases.safetensors"
    names = ("pixel_values", "selected_features", "projected")
    pixels, selected, projected = read(cases, *(f"component_clip.{name}" for name in names))
    output = clip.get_image_features(pixels)
    torch.testing.assert_close(output.last_hidden_state, selected, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, projected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_video_mean(clip, golden):
    cases = golden("unimoe_audio") / "cases.safetensors"
    frames, mean = read(cases, "video.video_pixel_values", "video.video_features_mean")
    output = clip.get_video_features(frames)
    torch.testing.assert_close(output.pooler_output, mean.reshape(output.pooler_output.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_whisper_encoder(golden, attention):
    root = golden("unimoe_speech")
    folder = root / "checkpoint" / "whisper-small"
    model = build(64, speech_config=AutoConfig.from_pretrained(folder))
    model.speech_tower.load_state_dict(WhisperModel.from_pretrained(folder).encoder.state_dict())
    model.set_attn_implementation(attention)
    names = ("speech_long.input_features", "speech_long.whisper_encoder_out")
    available = load_file(root / "cases_e2.safetensors").keys()
    if names[0] not in available:
        names = ("speech_short.input_features", "speech_short.whisper_encoder_out")
    features, expected = read(root / "cases_e2.safetensors", *names)
    output = model.get_speech_features(features.flatten(0, -3))
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-4)


def test_videos_of_a_tower_on_another_device_than_their_masks():
    def encode_frames(frames, return_dict):
        assert len(frames) == 5
        return UniMoEVisionOutput(
            last_hidden_state=torch.empty(5, 4, 6, device="meta"), pooler_output=torch.empty(5, 4, 8, device="meta")
        )

    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    output = encode_videos(encode_frames, torch.zeros(2, 3, 3, 8, 8), mask)
    assert output.pooler_output.shape == (2, 4, 8) and output.pooler_output.is_meta
    assert output.last_hidden_state.shape == (2, 3, 4, 6) and output.last_hidden_state.is_meta
