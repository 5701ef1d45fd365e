import pytest
from tiny_models import tiny_config, tiny_text_config
from transformers import AutoConfig, LlamaConfig

from unimoe import (
    UniMoEAudioConfig,
    UniMoEConfig,
    UniMoEConnectorConfig,
    UniMoEForConditionalGeneration,
    UniMoESparsityConfig,
)


def test_no_tower_is_there_unless_asked_for():
    config = UniMoEConfig()
    assert config.input_modalities == ()
    assert config.vision_config is None and config.vision_connector_config is None
    assert config.text_config.model_type == "llama"


@pytest.mark.parametrize(
    "tower, modalities",
    [
        ("vision", ("audio", "speech")),
        ("audio", ("image", "video", "speech")),
        ("speech", ("image", "video", "audio")),
    ],
)
def test_any_tower_may_be_absent(tower, modalities):
    config = tiny_config(**{f"{tower}_config": None, f"{tower}_connector_config": None})
    assert config.input_modalities == modalities


def test_a_tower_alone_gets_a_connector_that_fits():
    config = UniMoEConfig(
        text_config=tiny_text_config(),
        vision_config={"model_type": "clip_vision_model"},
        audio_config={"hidden_size": 64, "num_attention_heads": 4},
        speech_config={"model_type": "whisper", "d_model": 32},
    )
    assert config.vision_connector_config.type == "mlp"
    assert config.audio_connector_config.backbone_config.encoder_hidden_size == 64
    assert config.speech_connector_config.backbone_config.d_model == 32


def test_round_trip_through_a_folder(tmp_path):
    config = tiny_config(vision_sparsity={"layers": [1], "num_experts": 3, "top_k": 1})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    expected, found = config.to_dict(), loaded.to_dict()
    assert found | {"_name_or_path": ""} == expected


def test_the_folder_of_another_kind_of_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for loads in (UniMoEConfig, UniMoEForConditionalGeneration):
        with pytest.raises(ValueError, match="describes a 'llama', not a 'unimoe'.*convert"):
            loads.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "image_size, patch_size, model_type, strategy, expected",
    [
        (336, 14, "clip_vision_model", "default", 576),
        (336, 14, "clip_vision_model", "full", 577),
        (384, 14, "siglip_vision_model", "full", 729),
        (384, 14, "siglip_vision_model", "default", 728),
    ],
)
def test_tokens_per_image(image_size, patch_size, model_type, strategy, expected):
    config = UniMoEConfig(
        vision_config={"model_type": model_type, "image_size": image_size, "patch_size": patch_size},
        vision_feature_select_strategy=strategy,
    )
    assert config.num_image_tokens == expected


def test_default_placeholders_lie_behind_the_vocabulary():
    config = tiny_config()
    ids = [config.image_token_id, config.video_token_id, config.audio_token_id, config.speech_token_id]
    assert ids == [99, 100, 101, 102]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("all", [0, 1, 2, 3, 4]),
        ("even", [0, 2, 4]),
        ("odd", [1, 3]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ([3, 1], [3, 1]),
    ],
)
def test_layer_patterns(layers, expected):
    assert UniMoESparsityConfig(layers=layers).layer_indices(5) == expected


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: tiny_config(text_sparsity={"top_k": 5}), "top_k"),
        (lambda: tiny_config(text_sparsity={"top_k": 0}), "top_k"),
        (lambda: tiny_config(text_sparsity={"num_experts": 1, "top_k": 1}), "num_experts"),
        (lambda: tiny_config(text_sparsity={"layers": "every"}), "layers"),
        (lambda: tiny_config(text_sparsity={"layers": [0, 9]}), "text_sparsity"),
        (lambda: tiny_config(text_sparsity={"layers": [0, 0]}), "layers"),
        (lambda: tiny_config(text_sparsity={"layers": "all", "num_experts": [4, 4]}), "num_experts"),
        (lambda: tiny_config(text_sparsity={"router_dtype": "float8"}), "router_dtype"),
        (lambda: tiny_config(text_sparsity={"router_aux_loss_coef": -1.0}), "router_aux_loss_coef"),
        (lambda: tiny_config(text_config={"model_type": "mixtral"}), "text_sparsity"),
        (lambda: tiny_config(vision_config=None, vision_connector_config=None, vision_sparsity={}), "vision_sparsity"),
        (lambda: tiny_config(vision_config=None), "vision_connector_config"),
        (lambda: tiny_config(vision_config={"model_type": "bert"}), "vision_config"),
        (lambda: tiny_config(speech_config={"model_type": "bert"}), "speech_config"),
        (lambda: tiny_config(vision_feature_layer=7), "vision_feature_layer"),
        (lambda: tiny_config(vision_connector_config={"type": "qformer"}), "vision_connector_config"),
        (lambda: tiny_config(image_token_id=5, audio_token_id=5), "image_token_id"),
        (lambda: tiny_config(image_token_id=-200), "image_token_id"),
        (lambda: tiny_config(audio_connector_config={"type": "qformer"}), "audio_connector_config"),
        (lambda: UniMoEConnectorConfig(type="perceiver"), "type"),
        (lambda: UniMoEConnectorConfig(type="linear", sparsity={}), "sparsity"),
        (lambda: UniMoEConnectorConfig(num_layers=0), "num_layers"),
        (lambda: UniMoEConnectorConfig(type="mlp", backbone_config={"model_type": "whisper"}), "backbone_config"),
        (lambda: UniMoEAudioConfig(num_attention_heads=7), "num_attention_heads"),
        (lambda: UniMoEAudioConfig(num_buckets=3), "num_buckets"),
        (lambda: UniMoEAudioConfig(num_mel_bins=100), "num_mel_bins"),
        (lambda: UniMoEAudioConfig(layer_norm_first=True), "deep_norm"),
    ],
)
def test_contradictions_are_refused_by_the_field_name(make, field):
    with pytest.raises(ValueError, match=f"`{field}"):
        make()
