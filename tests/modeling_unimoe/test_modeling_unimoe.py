"""The composed model: splicing, padding, losses, saving, and what Transformers may set on it."""

import copy

import pytest
import torch
from tiny_models import num_placeholders, tiny_config, tiny_inputs, tiny_text_config
from transformers import AutoModel, AutoModelForMultimodalLM
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from unimoe import UniMoEForConditionalGeneration, UniMoEModel
from unimoe.modeling_unimoe.modeling_unimoe import MEDIA_INPUTS

TOLERANCE = {"rtol": 0, "atol": 1e-4}
# The vocabulary of the tiny decoder ends with 98.
IDS_INSIDE = {"image_token_id": 95, "video_token_id": 96, "audio_token_id": 97, "speech_token_id": 98}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniMoEForConditionalGeneration(tiny_config()).eval()


def row(inputs, index):
    """One row of a batch in which every row has one item of each modality."""
    return {name: value[index : index + 1] for name, value in inputs.items()}


def pad(inputs, amount, side):
    """The same inputs with `amount` padding tokens on one side."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    extra = ids.new_zeros(ids.shape[0], amount)
    order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
    return {**inputs, "input_ids": order(extra, ids), "attention_mask": order(extra, mask)}


def ragged_batch(config):
    """Three rows of different length and items, and each row alone: all four kinds; two images; only text."""
    everything = tiny_inputs(config, batch_size=1, seed=1)
    first, second = (tiny_inputs(config, batch_size=1, modalities=("image",), seed=s) for s in (2, 3))
    two_images = {
        name: torch.cat([first[name], second[name]], dim=0 if name == "pixel_values" else 1) for name in first
    }
    text = tiny_inputs(config, batch_size=1, modalities=(), seed=4)
    return [everything, two_images, text]


def join(rows, side):
    length = max(inputs["input_ids"].shape[1] for inputs in rows)
    padded = [pad(inputs, length - inputs["input_ids"].shape[1], side) for inputs in rows]
    names = {name for inputs in rows for name in inputs}
    return {name: torch.cat([inputs[name] for inputs in padded if name in inputs]) for name in names}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_alone_and_in_a_padded_batch_agree(model, side):
    rows = ragged_batch(model.config)
    batch = model(**join(rows, side)).logits
    for index, inputs in enumerate(rows):
        alone = model(**inputs).logits[0]
        length = alone.shape[0]
        found = batch[index, -length:] if side == "left" else batch[index, :length]
        torch.testing.assert_close(found, alone, **TOLERANCE)


@torch.no_grad()
def test_items_fill_their_placeholders_in_reading_order(model):
    inputs = tiny_inputs(model.config, batch_size=2)
    output = model.model(**inputs)
    embeds = model.model._splice(inputs["input_ids"], None, model.model.encode_media(**media_of(inputs)))
    for modality in MEDIA_INPUTS:
        mask = inputs["input_ids"] == getattr(model.config, f"{modality}_token_id")
        features = getattr(output, f"{modality}_hidden_states")
        assert features.shape == (2, num_placeholders(model.config, modality), model.config.text_config.hidden_size)
        torch.testing.assert_close(embeds[mask], features.flatten(0, 1))


def media_of(inputs):
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def test_swapped_order_of_kinds_in_the_text(model):
    """Where an item stands in the text does not change which features it gets."""
    inputs = tiny_inputs(model.config, batch_size=1, modalities=("image", "speech"))
    other = tiny_inputs(model.config, batch_size=1, modalities=("speech", "image"))
    swapped = {**inputs, "input_ids": other["input_ids"]}
    found = model.model(**swapped)
    expected = model.model(**inputs)
    torch.testing.assert_close(found.image_hidden_states, expected.image_hidden_states)
    torch.testing.assert_close(found.speech_hidden_states, expected.speech_hidden_states)
    assert not torch.allclose(found.last_hidden_state[0, -1], expected.last_hidden_state[0, -1])


@torch.no_grad()
def test_video_is_the_mean_over_its_real_frames(model):
    frames = torch.randn(5, 3, 16, 16)
    each = model.get_image_features(frames).pooler_output
    stacked = torch.zeros(2, 3, 3, 16, 16)
    stacked[0], stacked[1, :2] = frames[:3], frames[3:]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    video = model.get_video_features(stacked, mask).pooler_output
    torch.testing.assert_close(video[0], each[:3].mean(0))
    torch.testing.assert_close(video[1], each[3:].mean(0))
    torch.testing.assert_close(model.get_video_features(stacked[:1]).pooler_output[0], each[:3].mean(0))


@torch.no_grad()
def test_feature_selection(model):
    config = tiny_config(vision_feature_select_strategy="full", vision_feature_layer=-1)
    full = UniMoEForConditionalGeneration(config).eval()
    full.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 16, 16)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, hidden[-2][:, 1:])
    torch.testing.assert_close(full.get_image_features(pixels).last_hidden_state, hidden[-1])


@pytest.mark.parametrize("vision_type", ["clip_vision_model", "siglip_vision_model"], ids=["clip", "siglip"])
@torch.no_grad()
def test_vision_towers(vision_type):
    config = tiny_config(vision_config={**tiny_config().vision_config.to_dict(), "model_type": vision_type})
    model = UniMoEModel(config).eval()
    inputs = tiny_inputs(config, modalities=("image",))
    assert model(**inputs).image_hidden_states.shape[1] == config.num_image_tokens


def test_inputs_embeds_equal_input_ids(model):
    inputs = tiny_inputs(model.config)
    features = model.model.encode_media(**media_of(inputs))
    embeds = model.model._splice(inputs["input_ids"], None, features)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_placeholders_inside_the_vocabulary_can_be_placed_by_embeddings():
    model = UniMoEForConditionalGeneration(tiny_config(**IDS_INSIDE)).eval()
    inputs = tiny_inputs(model.config)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).logits
    found = model(inputs_embeds=embeds, **media_of(inputs)).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_embeddings_that_are_scaled_place_placeholders():
    text_config = tiny_text_config(model_type="gemma3_text", head_dim=8)
    model = UniMoEForConditionalGeneration(tiny_config(text_config=text_config, text_sparsity=None)).eval()
    model.resize_token_embeddings(model.config.speech_token_id + 1, mean_resizing=False)
    inputs = tiny_inputs(model.config)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeds, **media_of(inputs)).logits
    torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 95]}},
    ],
    ids=["lora", "trainable_tokens"],
)
@torch.no_grad()
def test_adapted_embeddings_place_placeholders(options):
    peft = pytest.importorskip("peft")
    model = UniMoEForConditionalGeneration(tiny_config(**IDS_INSIDE)).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    inputs = tiny_inputs(model.config)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = adapted(inputs_embeds=embeds, **media_of(inputs)).logits
    torch.testing.assert_close(found, adapted(**inputs).logits)


@torch.no_grad()
def test_embeddings_that_round_by_the_number_of_rows_place_placeholders():
    """As the products of adapters do on some processors; here each number of rows has results of its own."""
    model = UniMoEForConditionalGeneration(tiny_config(**IDS_INSIDE)).eval()
    model.get_input_embeddings().register_forward_hook(lambda _, args, found: found * (1 + args[0].numel() * 2**-20))
    inputs = tiny_inputs(model.config)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeds, **media_of(inputs)).logits
    torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_implementations_agree(model, attention):
    inputs = tiny_inputs(model.config)
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    assert other.model.language_model.config._attn_implementation == attention
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "request_, expected",
    [
        ("eager", ["eager"] * 4),
        ({"text_config": "eager"}, ["sdpa", "eager", "sdpa", "sdpa"]),
        ({"": "eager", "audio_connector_config": "eager"}, ["eager", "sdpa", "sdpa", "eager"]),
        ({"audio_connector_config": {"backbone_config": "eager"}}, ["sdpa", "sdpa", "sdpa", "eager"]),
    ],
    ids=str,
)
def test_setting_attention_warns_of_no_config_without_a_model(request_, expected):
    model = UniMoEForConditionalGeneration(tiny_config())
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        model.set_attn_implementation(request_)
    parts = [model, model.model.language_model, model.model.vision_tower, model.model.audio_connector.qformer]
    assert [part.config._attn_implementation for part in parts] == expected
    assert not log.out


def test_an_unknown_attention_is_refused_and_changes_nothing():
    model = UniMoEForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match="no_such"):
        model.set_attn_implementation("no_such")
    assert model.config._attn_implementation == model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("experts", ["unimoe", "eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_experts_implementation_is_what_the_user_set(model, experts, tmp_path):
    inputs = tiny_inputs(model.config)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, experts_implementation=experts)
    changed = copy.deepcopy(model)
    changed.set_experts_implementation(experts)
    built = UniMoEForConditionalGeneration._from_config(tiny_config(), experts_implementation=experts)
    for found in (loaded, changed, built):
        assert found.config._experts_implementation == experts
        assert found.config.text_config._experts_implementation == experts
        layer = found.model.language_model.layers[0]
        assert layer.mlp.experts.config._experts_implementation == experts
    for found in (loaded, changed):
        torch.testing.assert_close(found(**inputs).logits, expected, **TOLERANCE)


def test_experts_implementation_default_and_per_sub_config(tmp_path):
    model = UniMoEForConditionalGeneration(tiny_config(vision_sparsity={"layers": [0], "num_experts": 2}))
    assert model.config._experts_implementation == "unimoe"
    assert model.config.text_config._experts_implementation == "unimoe"
    assert model.config.vision_config._experts_implementation == "unimoe"
    model.save_pretrained(tmp_path)
    asked = {"text_config": "batched_mm", "vision_config": "eager"}
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=asked)
    assert loaded.config.text_config._experts_implementation == "batched_mm"
    assert loaded.config.vision_config._experts_implementation == "eager"


def test_router_logits_and_auxiliary_loss():
    config = tiny_config(
        text_sparsity={
            "layers": "even",
            "num_experts": [4, 3],
            "top_k": 2,
            "router_aux_loss_coef": 0.5,
            "router_z_loss_coef": 0.25,
        }
    )
    model = UniMoEForConditionalGeneration(config).eval()
    inputs = tiny_inputs(config)
    tokens = inputs["input_ids"].numel()
    output = model(**inputs, output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(tokens, 4), (tokens, 3)]
    expected = 0.0
    for logits in output.router_logits:
        probabilities = logits.softmax(-1)
        first = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).float()
        expected = expected + logits.shape[1] * (probabilities.mean(0) * first.mean(0)).sum()
    torch.testing.assert_close(output.aux_loss, expected)
    z_loss = sum(logits.logsumexp(-1).square().mean() for logits in output.router_logits)

    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 99, -100)
    with_aux = model(**inputs, labels=labels)
    assert with_aux.router_logits is None, "recorded for the loss only, not asked for"
    plain = copy.deepcopy(model)
    plain.config.text_sparsity.router_aux_loss_coef = plain.config.text_sparsity.router_z_loss_coef = 0.0
    cross_entropy = plain(**inputs, labels=labels).loss
    torch.testing.assert_close(with_aux.loss, cross_entropy + 0.5 * expected + 0.25 * z_loss)


def test_loss_with_the_trainers_token_count_adds_up_over_micro_batches():
    config = tiny_config(text_sparsity={"layers": "even", "num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.5})
    model = UniMoEForConditionalGeneration(config).eval()
    inputs = tiny_inputs(config, batch_size=4, modalities=("image",))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 99, -100)
    total = (labels[:, 1:] != -100).sum()
    one = model(**row(inputs, 0), labels=labels[:1], num_items_in_batch=total)
    aux = model(**row(inputs, 0), output_router_logits=True).aux_loss
    alone = model(**row(inputs, 0), labels=labels[:1])
    share = (labels[:1, 1:] != -100).sum() / total
    torch.testing.assert_close(one.loss, (alone.loss - 0.5 * aux) * share + 0.5 * aux * share)


def test_padding_does_not_count_in_the_auxiliary_loss(model):
    inputs = tiny_inputs(model.config, batch_size=1)
    expected = model(**inputs, output_router_logits=True).aux_loss
    found = model(**pad(inputs, 7, "right"), output_router_logits=True).aux_loss
    torch.testing.assert_close(found, expected)


def test_every_part_gets_a_gradient(model):
    model = copy.deepcopy(model).train()
    inputs = tiny_inputs(model.config, batch_size=4)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 99, -100)
    model(**inputs, labels=labels).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Unused by design: the last CLIP layer lies behind the selected one; Whisper's positions are frozen.
    expected = {
        name for name in without if "vision_tower" in name and ("layers.1" in name or "post_layernorm" in name)
    }
    expected |= {name for name in without if name.endswith("speech_tower.embed_positions.weight")}
    expected |= {name for name in without if "embed_positions" in name and "speech_connector" in name}
    assert without == expected


def test_gradient_checkpointing_changes_nothing(model):
    inputs = tiny_inputs(model.config)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 99, -100)
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
            assert trained.is_gradient_checkpointing
        loss = trained(**inputs, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_bfloat16(model, tmp_path):
    inputs = tiny_inputs(model.config)
    model.save_pretrained(tmp_path)
    half = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    difference = (logits.float() - model(**inputs).logits).abs().mean()
    assert difference < 0.02


@torch.no_grad()
def test_device_map_auto(model, tmp_path):
    inputs = tiny_inputs(model.config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("text_type", ["mistral", "mixtral", "qwen2", "phi", "stablelm"])
@torch.no_grad()
def test_other_decoders(text_type, tmp_path):
    sparsity = None if text_type == "mixtral" else {"layers": "all", "num_experts": 4, "top_k": 2}
    extra = {"num_local_experts": 4} if text_type == "mixtral" else {}
    config = tiny_config(text_config=tiny_text_config(model_type=text_type, **extra), text_sparsity=sparsity)
    model = UniMoEForConditionalGeneration(config).eval()
    inputs = tiny_inputs(config)
    output = model(**inputs, output_router_logits=True)
    assert len(output.router_logits) == 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(**inputs).logits, output.logits)


@torch.no_grad()
def test_sparse_vision_tower_and_connector(tmp_path):
    config = tiny_config(
        vision_sparsity={"layers": "all", "num_experts": 3, "top_k": 1},
        vision_connector_config={"type": "mlp", "sparsity": {"num_experts": 5, "top_k": 2}},
    )
    model = UniMoEForConditionalGeneration(config).eval()
    inputs = tiny_inputs(config, modalities=("image",))
    expected = model(**inputs).logits
    assert model.model.vision_connector.experts.config is model.config
    assert any("vision_tower" in name and "experts.up_proj" in name for name in model.state_dict())
    assert any("vision_connector" in name and "experts.up_proj" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected)


class TestSaving:
    def test_names_on_disk_are_ours(self, model, tmp_path):
        from safetensors import safe_open

        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert names == set(model.state_dict())
        assert {
            "lm_head.weight",
            "model.language_model.layers.0.mlp.gate.weight",
            "model.language_model.layers.0.mlp.experts.gate_up_proj",
            "model.language_model.layers.0.mlp.experts.down_proj",
            "model.language_model.layers.1.mlp.gate_proj.weight",
        } <= names

    def test_base_model_round_trip(self, model, tmp_path):
        model.model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is UniMoEModel
        for name, value in model.model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value)

    def test_base_model_from_a_checkpoint_with_a_head_but_not_the_reverse(self, model, tmp_path):
        model.save_pretrained(tmp_path / "with_head")
        loaded = AutoModel.from_pretrained(tmp_path / "with_head")
        torch.testing.assert_close(loaded.language_model.norm.weight, model.model.language_model.norm.weight)
        loaded.save_pretrained(tmp_path / "without_head")
        with pytest.raises(ValueError, match="missing .lm_head.weight"):
            AutoModelForMultimodalLM.from_pretrained(tmp_path / "without_head")

    def test_sharded_round_trip(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
        loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value)

    @pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
    def test_a_checkpoint_that_does_not_fit_is_refused(self, model, tmp_path, damage):
        from safetensors.torch import load_file, save_file

        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.language_model.layers.0.mlp.gate.weight"
        if damage == "missing":
            del tensors[name]
        elif damage == "extra":
            name = "model.language_model.layers.9.extra"
            tensors[name] = torch.zeros(2)
        else:
            tensors[name] = torch.zeros(7, 32)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            AutoModelForMultimodalLM.from_pretrained(tmp_path)
        AutoModelForMultimodalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)

    def test_tied_embeddings(self, tmp_path):
        model = UniMoEForConditionalGeneration(tiny_config(text_config=tiny_text_config(tie_word_embeddings=True)))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


class TestRefusals:
    def test_more_placeholders_than_features(self, model):
        inputs = tiny_inputs(model.config, modalities=("image",))
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        with pytest.raises(ValueError, match="8 image placeholder tokens.*gives 4"):
            model(**inputs)

    def test_placeholders_without_features(self, model):
        inputs = tiny_inputs(model.config, modalities=("audio",))
        with pytest.raises(ValueError, match="audio placeholder.*input_values"):
            model(input_ids=inputs["input_ids"])

    @pytest.mark.parametrize("modality", ["image", "video", "audio", "speech"])
    @pytest.mark.parametrize("damage", [lambda value: value[:0], lambda value: value.numpy()], ids=["empty", "numpy"])
    def test_media_that_are_no_items(self, model, modality, damage):
        inputs = tiny_inputs(model.config, modalities=(modality,))
        name = MEDIA_INPUTS[modality]
        with pytest.raises(ValueError, match=f"`{name}` must be a tensor with at least one item"):
            model(**{**inputs, name: damage(inputs[name])})

    @pytest.mark.parametrize("shape", [(80, 40), (2, 128, 40), (2, 80, 39)], ids=str)
    def test_wrong_spectrogram_size(self, model, shape):
        inputs = tiny_inputs(model.config, modalities=("speech",))
        with pytest.raises(ValueError, match=r"`input_features` must be \[N, 80, 40\]"):
            model(**{**inputs, "input_features": torch.zeros(shape)})

    def test_encoded_media_of_an_unknown_kind(self, model):
        inputs = tiny_inputs(model.config, modalities=("image",))
        encoded = model.model.encode_media(inputs["pixel_values"])
        with pytest.raises(ValueError, match="`mm_encoder_outputs` has picture; its keys are among image, video"):
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"picture": encoded["image"]})

    @pytest.mark.parametrize("modality, tower", [("image", "vision"), ("audio", "audio"), ("speech", "speech")])
    def test_no_tower(self, modality, tower):
        model = UniMoEModel(tiny_config(**{f"{tower}_config": None, f"{tower}_connector_config": None}))
        inputs = tiny_inputs(tiny_config(), modalities=(modality,))
        with pytest.raises(ValueError, match=f"no tower for {modality}"):
            model(**inputs)

    def test_wrong_image_size(self, model):
        inputs = tiny_inputs(model.config, modalities=("image",))
        inputs["pixel_values"] = torch.zeros(2, 3, 24, 24)
        with pytest.raises(ValueError, match="pixel_values.*3, 16, 16"):
            model(**inputs)

    @pytest.mark.parametrize(
        "mask, message",
        [
            ([[1, 1], [0, 0], [0, 0]], "video_frame_mask.*video 1, 2"),
            ([[1, 1, 1]], r"video_frame_mask.*\[3, 2\], got \[1, 3\]"),
        ],
        ids=["a_video_without_frames", "another_shape"],
    )
    def test_video_frame_mask(self, model, mask, message):
        with pytest.raises(ValueError, match=message):
            model.get_video_features(torch.zeros(3, 2, 3, 16, 16), torch.tensor(mask))

    @pytest.mark.parametrize("ids", [[[1, 999999]], [[103, 5]], [[999999]], [[99]], [[-1, 1]]], ids=str)
    def test_ids_that_are_neither_words_nor_placeholders(self, model, ids):
        """A placeholder alone and without features (99) is none."""
        with pytest.raises(IndexError, match="out of range"):
            model(input_ids=torch.tensor(ids))

    def test_ids_and_embeds(self, model):
        with pytest.raises(ValueError, match="exactly one"):
            model()

    def test_embeds_cannot_place_ids_beyond_the_vocabulary(self, model):
        inputs = tiny_inputs(model.config, modalities=("image",))
        with pytest.raises(ValueError, match="image_token_id"):
            model(inputs_embeds=torch.zeros(2, 12, 32), pixel_values=inputs["pixel_values"])
