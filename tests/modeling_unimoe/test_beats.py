"""The BEATs encoder against recorded outputs of the original, and how it behaves as a Transformers model."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open

from unimoe.modeling_unimoe.beats import UniMoEAudioModel, relative_position_buckets, token_padding_mask
from unimoe.modeling_unimoe.configuration_unimoe import UniMoEAudioConfig

TOLERANCE = {"atol": 3e-5, "rtol": 0.0}
RENAMES = (
    (".self_attn_layer_norm.", ".layer_norm."),
    (".self_attn.grep_linear.", ".attention.gru_rel_pos_linear."),
    (".self_attn.grep_a", ".attention.gru_rel_pos_const"),
    (".self_attn.", ".attention."),
    (".fc1.", ".feed_forward.intermediate_dense."),
    (".fc2.", ".feed_forward.output_dense."),
    (".pos_conv.0.weight_g", ".pos_conv_embed.conv.weight_magnitude"),
    (".pos_conv.0.weight_v", ".pos_conv_embed.conv.weight_direction"),
    (".pos_conv.0.bias", ".pos_conv_embed.conv.bias"),
)


def our_name(name: str) -> str:
    if name.startswith("layer_norm."):
        return f"feature_projection.{name}"
    if name.startswith("post_extract_proj."):
        return name.replace("post_extract_proj", "feature_projection.projection")
    if name.endswith("relative_attention_bias.weight"):
        return "encoder.relative_attention_bias.weight"
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def load_official(path) -> UniMoEAudioModel:
    checkpoint = torch.load(path, weights_only=True)
    cfg = checkpoint["cfg"]
    config = UniMoEAudioConfig(
        hidden_size=cfg["encoder_embed_dim"],
        intermediate_size=cfg["encoder_ffn_embed_dim"],
        num_hidden_layers=cfg["encoder_layers"],
        num_attention_heads=cfg["encoder_attention_heads"],
        patch_embed_dim=cfg["embed_dim"],
        num_conv_pos_embeddings=cfg["conv_pos"],
        num_conv_pos_embedding_groups=cfg["conv_pos_groups"],
        num_buckets=cfg["num_buckets"],
        max_bucket_distance=cfg["max_distance"],
        layerdrop=cfg["encoder_layerdrop"],
    )
    model = UniMoEAudioModel(config)
    model.load_state_dict({our_name(name): value for name, value in checkpoint["model"].items()})
    return model.eval()


@pytest.fixture(scope="module")
def official(golden):
    return load_official(golden("unimoe_audio") / "checkpoint" / "BEATs_iter3_plus_AS2M.pt")


@pytest.fixture(scope="module")
def recorded(golden):
    with safe_open(golden("unimoe_audio") / "cases.safetensors", "pt") as file:
        wanted = ("component_fbank", "component_beats", "fbank", "beats_features")
        return {name: file.get_tensor(name).clone() for name in file.keys() if any(part in name for part in wanted)}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = UniMoEAudioConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_embed_dim=24,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        initializer_range=0.3,
    )
    return UniMoEAudioModel(config).eval()


def ragged_batch(frames: int = 64, real: tuple[int, ...] = (64, 41, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_values = torch.randn(len(real), frames, 128, generator=generator)
    mask = (torch.arange(frames) < torch.tensor(real).unsqueeze(1)).long()
    return input_values, mask


def frame_mask_from_samples(is_padding: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The original's first step, from samples [S] to frames: equal runs of samples, a remainder dropped."""
    run = len(is_padding) // num_frames
    return (~is_padding[: run * num_frames].view(1, num_frames, run).all(-1)).long()


# --- against the original


def test_relative_position_buckets_match_the_original(recorded):
    expected = recorded["component_beats.relative_position_bucket_for_minus1500_to_1500"]
    torch.testing.assert_close(relative_position_buckets(torch.arange(-1500, 1501), 320, 800), expected)


def test_position_bias_matches_the_original(official, recorded):
    expected = recorded["component_beats.position_bias_5x5_layer0"]
    torch.testing.assert_close(official.encoder.position_bias(5)[0], expected, atol=0, rtol=0)


def test_position_bias_is_a_lookup_of_every_pair(official):
    distance = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = official.encoder.relative_attention_bias(relative_position_buckets(distance, 320, 800))
    torch.testing.assert_close(official.encoder.position_bias(600)[0], expected.permute(2, 0, 1), atol=0, rtol=0)


@torch.no_grad()
def test_every_stage_matches_the_original(official, recorded):
    expected = {name.removeprefix("component_beats.clip_b."): value for name, value in recorded.items()}
    fbank = recorded["component_fbank.clip_b.fbank"]
    patches = official.patch_embedding(fbank.unsqueeze(1))
    torch.testing.assert_close(patches, expected["patch_embedding_raw"], **TOLERANCE)
    projected = official.feature_projection(patches.flatten(2).transpose(1, 2))
    torch.testing.assert_close(projected, expected["after_ln_and_proj"], **TOLERANCE)
    torch.testing.assert_close(official.encoder.pos_conv_embed(projected), expected["pos_conv_output"], **TOLERANCE)
    states = official(fbank, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer, state in enumerate(states[1:]):
        torch.testing.assert_close(state, expected[f"after_layer{layer}"], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("clip, num_samples", [("clip_a", 27200), ("clip_b", 14400)])
@torch.no_grad()
def test_features_match_the_original(official, recorded, clip, num_samples, implementation):
    official.set_attn_implementation(implementation)
    fbank = recorded[f"component_fbank.{clip}.fbank"]
    expected = recorded[f"component_beats.{clip}.features_no_mask"]
    torch.testing.assert_close(official(fbank).last_hidden_state, expected, **TOLERANCE)

    mask = frame_mask_from_samples(torch.arange(num_samples) >= int(num_samples * 0.6), fbank.shape[1])
    expected_tokens = recorded[f"component_beats.{clip}.token_mask_60pct"]
    torch.testing.assert_close(token_padding_mask(mask, expected_tokens.shape[1]), expected_tokens)
    expected = recorded[f"component_beats.{clip}.features_masked_from_60pct"]
    torch.testing.assert_close(official(fbank, mask).last_hidden_state, expected, **TOLERANCE)


@torch.no_grad()
def test_padded_30_second_chunks_match_the_original(official, recorded):
    official.set_attn_implementation("sdpa")
    # 1.7 s, and 1.25 s of a second chunk. The recorded rows reach into the padding, which is constant from there on.
    rows = [recorded["audio.fbank_first_rows"][0], recorded["audio_long.fbank_first_rows"][1]]
    last = [recorded["audio.fbank_last_row"][0], recorded["audio_long.fbank_last_row"][1]]
    input_values = torch.stack([torch.cat([a, b.expand(2998 - len(a), -1)]) for a, b in zip(rows, last)])
    mask = (torch.arange(2998) < torch.tensor([[170], [125]])).long()
    features = official(input_values, mask).last_hidden_state
    assert features.shape == (2, official.num_tokens(2998), 48) == (2, 1496, 48)
    torch.testing.assert_close(features[:1], recorded["audio.beats_features.0"], **TOLERANCE)
    torch.testing.assert_close(features[1:, :32], recorded["audio_long.beats_features_first32.1"], **TOLERANCE)
    norms = recorded["audio_long.beats_features_row_norms.1"]
    torch.testing.assert_close(features[1:].norm(dim=-1), norms, atol=1e-4, rtol=0)


# --- the mask


def test_a_partly_padded_time_step_masks_some_bands():
    # 64 frames are 4 steps of 8 bands. With 20 real frames, the reference's flattened rule leaves tokens 0 to 9.
    mask = (torch.arange(64) < 20).long().unsqueeze(0)
    assert token_padding_mask(mask, 32).int().tolist() == [[0] * 10 + [1] * 22]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_batch_equals_its_chunks_one_by_one(tiny, implementation):
    tiny.set_attn_implementation(implementation)
    input_values, mask = ragged_batch()
    batched = tiny(input_values, mask).last_hidden_state
    for row in range(len(mask)):
        alone = tiny(input_values[row : row + 1], mask[row : row + 1]).last_hidden_state
        torch.testing.assert_close(batched[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batched[:1], tiny(input_values[:1]).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_content_does_not_reach_real_tokens(tiny):
    input_values, mask = ragged_batch(real=(64, 32, 16))
    changed = input_values.masked_fill(mask.unsqueeze(-1) == 0, 7.0)
    real = ~token_padding_mask(mask, 32)
    before, after = (tiny(values, mask.bool()).last_hidden_state[real] for values in (input_values, changed))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_chunk_of_padding_gives_no_nan(tiny, implementation, dtype):
    tiny.set_attn_implementation(implementation)
    input_values, mask = ragged_batch(real=(64, 0))
    assert tiny.to(dtype)(input_values, mask).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("frames", [16, 31, 50, 88])
@torch.no_grad()
def test_any_number_of_frames(tiny, frames):
    input_values, mask = ragged_batch(frames, real=(frames, frames // 2))
    assert tiny(input_values, mask).last_hidden_state.shape == (2, frames // 16 * 8, 32)


# --- as a Transformers model


@torch.no_grad()
def test_eager_and_sdpa_agree(tiny):
    input_values, mask = ragged_batch()
    outputs = []
    for implementation in ("eager", "sdpa"):
        tiny.set_attn_implementation(implementation)
        outputs.append(tiny(input_values, mask).last_hidden_state)
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ("flash_attention_2", "flex_attention"))
def test_what_takes_no_bias_becomes_sdpa(tiny, implementation):
    input_values, mask = ragged_batch()
    tiny.set_attn_implementation("sdpa")
    expected = tiny(input_values, mask).last_hidden_state
    tiny.set_attn_implementation(implementation)
    assert tiny.config._attn_implementation == "sdpa"
    assert torch.equal(tiny(input_values, mask).last_hidden_state, expected)


def test_output_capture(tiny):
    tiny.set_attn_implementation("eager")
    input_values, mask = ragged_batch()
    output = tiny(input_values, mask, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, 32, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(3, 4, 32, 32)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 32))
    assert tiny(input_values, return_dict=False)[0].shape == (3, 32, 32)


def test_gradients_reach_every_parameter_and_survive_checkpointing(tiny):
    input_values, mask = ragged_batch()
    tiny.train()
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny.zero_grad()
        tiny(input_values, mask).last_hidden_state.pow(2)[..., :16].sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in tiny.named_parameters()})
    # A bias on all keys alike cancels in the softmax.
    exempt = "k_proj.bias"
    assert all(grad.abs().max() > 0 for name, grad in gradients[0].items() if not name.endswith(exempt))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, atol=1e-4, rtol=1e-4)


def test_layerdrop_skips_layers_in_training_only(tiny):
    tiny.config.layerdrop = 1.0
    input_values, _ = ragged_batch()
    assert len(tiny(input_values, output_hidden_states=True).hidden_states) == 3
    assert len(tiny.train()(input_values, output_hidden_states=True).hidden_states) == 0


@torch.no_grad()
def test_bfloat16_is_close_to_float32(tiny):
    input_values, mask = ragged_batch()
    expected = tiny(input_values, mask).last_hidden_state
    got = tiny.to(torch.bfloat16)(input_values, mask).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        got = tiny.to(torch.float32)(input_values, mask).last_hidden_state
    assert (got.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_round_trips(tiny, tmp_path):
    input_values, mask = ragged_batch()
    expected = tiny(input_values, mask).last_hidden_state
    tiny.save_pretrained(tmp_path)
    loaded, report = UniMoEAudioModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny.state_dict())
    for other in (loaded.eval(), copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        torch.testing.assert_close(other(input_values, mask).last_hidden_state, expected, atol=0, rtol=0)


def test_every_parameter_is_initialised():
    config = UniMoEAudioConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_embed_dim=24
    )
    with torch.device("meta"):
        model = UniMoEAudioModel(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    attention, conv = model.encoder.layers[0].attention, model.encoder.pos_conv_embed.conv
    # Xavier's standard deviation is sqrt(2 / (32 + 32)); DeepNorm shrinks values and outputs by (8 * 3) ** -0.25.
    assert attention.q_proj.weight.std().item() == pytest.approx(0.177, rel=0.15)
    assert attention.out_proj.weight.std().item() == pytest.approx(0.177 * 24**-0.25, rel=0.15)
    torch.testing.assert_close(conv.weight_magnitude, conv.direction_norm())


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_first": True, "deep_norm": False},
        {"gated_relative_position": False},
        {"relative_position_embedding": False},
        {"patch_embed_dim": 32, "conv_bias": True, "num_conv_pos_embeddings": 7},
    ],
)
@torch.no_grad()
def test_variants_of_the_architecture(tiny, changes):
    config = UniMoEAudioConfig(**{**tiny.config.to_dict(), **changes})
    model = UniMoEAudioModel(config).eval()
    input_values, mask = ragged_batch()
    eager, sdpa = [], []
    for outputs, implementation in ((eager, "eager"), (sdpa, "sdpa")):
        model.set_attn_implementation(implementation)
        outputs += [model(input_values, mask).last_hidden_state, model(input_values).last_hidden_state]
    torch.testing.assert_close(eager, sdpa, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, mask_shape, message",
    [
        ((64, 128), None, r"`input_values` must have the shape \[chunks, frames, 128\]"),
        ((1, 64, 80), None, r"`input_values` must have the shape \[chunks, frames, 128\]"),
        ((1, 15, 128), None, "fewer than the 16 of a patch"),
        ((1, 64, 128), (1, 32), "`attention_mask` .* must have one entry per frame"),
    ],
)
def test_wrong_shapes_are_named(tiny, shape, mask_shape, message):
    mask = None if mask_shape is None else torch.ones(mask_shape)
    with pytest.raises(ValueError, match=message):
        tiny(torch.zeros(shape), mask)
