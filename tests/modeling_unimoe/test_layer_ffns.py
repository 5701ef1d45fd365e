"""FFNs under other names than `mlp`, in parts, and with dropout behind them."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
    SeedOssConfig,
    SeedOssForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import unimoe
from unimoe.modeling_unimoe.layer_ffns import FFN_PLACES, ffn_place

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 48}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0}
WAVES = {
    "num_feat_extract_layers": 2,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "activation_dropout": 0,
}
IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
TWO_IDS = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
# A model, its inputs, the part that is made sparse, the name of a layer's FFN and the dropout behind it.
MODELS = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40)), None, "mlp", 0.1),
    "seed_oss": (
        lambda: SeedOssForCausalLM(SeedOssConfig(num_key_value_heads=2, head_dim=8, **TEXT)),
        None,
        "mlp",
        0.1,
    ),
    "starcoder2": (
        lambda: Starcoder2ForCausalLM(Starcoder2Config(num_key_value_heads=2, residual_dropout=0.2, **TEXT)),
        None,
        "mlp",
        0.2,
    ),
    "falcon": (lambda: FalconForCausalLM(FalconConfig(ffn_hidden_size=48, **SIZES)), None, "mlp", 0),
    "lfm2": (
        lambda: Lfm2ForCausalLM(Lfm2Config(num_key_value_heads=2, full_attn_idxs=[0, 1, 2], **TEXT)),
        None,
        "feed_forward",
        0,
    ),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=40, dim=32, hidden_dim=48, n_layers=3, n_heads=4)),
        None,
        "ffn",
        0.1,
    ),
    "wavlm": (lambda: WavLMModel(WavLMConfig(**TEXT, **WAVES)), None, "feed_forward", 0.1),
    "pixtral": (
        lambda: PixtralVisionModel(PixtralVisionConfig(image_size=16, patch_size=8, **TEXT)),
        None,
        "feed_forward",
        0,
    ),
    "t5_encoder": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "encoder", "layer.1.DenseReluDense", 0),
    "t5_decoder": (
        lambda: T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **T5)),
        "decoder",
        "layer.2.DenseReluDense",
        0,
    ),
    "bert": (lambda: BertModel(BertConfig(**TEXT)), None, "intermediate", 0),
    "bert_decoder": (lambda: BertLMHeadModel(BertConfig(is_decoder=True, **TEXT)), None, "intermediate", 0),
    "opt": (lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SIZES)), None, "fc1", 0),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), "model.decoder", "fc1", 0),
    "whisper": (
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(max_source_positions=20, max_target_positions=16, num_mel_bins=8, **SEQ2SEQ)
        ),
        "model.encoder",
        "fc1",
        0,
    ),
}


def inputs_of(model):
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type == "whisper":
        features = torch.randn(2, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": TWO_IDS["decoder_input_ids"]}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return TWO_IDS if model.config.is_encoder_decoder else {"input_ids": IDS}


@torch.no_grad()
def run(model, **kwargs):
    return model(**inputs_of(model), **kwargs)


def build(kind):
    torch.manual_seed(0)
    make, *facts = MODELS[kind]
    return make(), *facts


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_upcycled_model_computes_what_the_dense_one_did(kind, training):
    model, part, name, dropout = build(kind)
    dense = run(model.eval())[0]
    model.train(training)
    before = {key: module.training for key, module in model.named_modules()}
    unimoe.sparsify(model, [0], num_experts=4, top_k=2, part=part)
    assert all(before[key] == module.training for key, module in model.named_modules() if key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(run(model.eval())[0], dense, rtol=1e-4, atol=1e-5)
    (block,) = (module for module in model.modules() if isinstance(module, unimoe.UniMoESparseMoeBlock))
    assert dict(model.named_modules())[f"{stack_of(model, part)}.0.{name}"] is block
    assert block.dropout.p == dropout
    assert [len(logits.shape) for logits in run(model, output_router_logits=True).router_logits] == [2]


def stack_of(model, part):
    names = [key for key, module in model.named_modules() if isinstance(module, nn.ModuleList) and ffn_place(module)]
    (name,) = (key for key in names if f"{key}.".startswith(f"{part}." if part else ""))
    return name


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded_again(kind, tmp_path):
    model, part, *_ = build(kind)
    unimoe.sparsify(model, "even", num_experts=2, top_k=1, part=part)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path)
    again, info = unimoe.load_sparsified(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(run(again)[0], run(model)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "t5_decoder", "falcon"])
def test_gradients_reach_every_expert(kind):
    model, part, *_ = build(kind)
    unimoe.sparsify(model, "all", num_experts=2, top_k=2, part=part, norm_topk_prob=False)
    output = model.train()(**inputs_of(model))[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    missing = [
        name for name, p in model.named_parameters() if ".experts." in name and (p.grad is None or not p.grad.any())
    ]
    assert not missing
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("gate.weight"))


@pytest.mark.parametrize("kind", ["gpt2", "seed_oss", "starcoder2", "distilbert"])
def test_dropout_behind_the_ffn_stays(kind):
    model, part, name, dropout = build(kind)
    dense = model.get_submodule(stack_of(model, part))[0].get_submodule(name).train()
    block = unimoe.UniMoESparseMoeBlock.from_dense(dense, 4, 2)
    hidden_states = torch.randn(2, 5, 32)
    outputs = []
    for ffn in (dense, block):
        torch.manual_seed(1)
        outputs.append(ffn(hidden_states))
    # The same numbers are zero, and the others are as much larger.
    assert (outputs[0] == 0).any() and torch.equal(outputs[0] == 0, outputs[1] == 0)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not (block.eval()(hidden_states) == 0).any()


def test_generate_with_a_sparse_decoder():
    model = build("opt")[0].eval()
    dense = model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    unimoe.sparsify(model, "all", num_experts=4, top_k=2)
    sparse = model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert torch.equal(sparse, dense)


def implementations_of(model):
    blocks = [module for module in model.modules() if isinstance(module, unimoe.UniMoESparseMoeBlock)]
    return [block.experts.config._experts_implementation for block in blocks]


def pixtral_llava():
    text = {"model_type": "mistral", "num_key_value_heads": 2, **TEXT}
    vision = {"model_type": "pixtral", "image_size": 16, "patch_size": 8, **TEXT}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


TWO_PARTS = {
    # Its stacks have copies of its configuration.
    "t5": (lambda: build("t5_encoder")[0], ["encoder", "decoder"]),
    # The parts have configurations of their own.
    "llava": (pixtral_llava, ["model.vision_tower", "model.language_model"]),
}


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "unimoe"])
@pytest.mark.parametrize("kind", TWO_PARTS)
def test_the_implementation_asked_for_runs_in_all_parts(kind, name, tmp_path):
    make, parts = TWO_PARTS[kind]
    model = make()
    for part in parts:
        unimoe.sparsify(model, [0], num_experts=2, top_k=1, part=part)
    assert implementations_of(model) == ["unimoe"] * 2
    model.set_experts_implementation(name)
    assert implementations_of(model) == [name] * 2
    model.save_pretrained(tmp_path)
    assert implementations_of(unimoe.load_sparsified(tmp_path)) == ["unimoe"] * 2
    assert implementations_of(unimoe.load_sparsified(tmp_path, experts_implementation=name)) == [name] * 2


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["t5_encoder", "bart"])
def test_routing_of_encoder_and_decoder_is_recorded_without_the_padding_of_each(kind, use_cache):
    model = build(kind)[0].eval()
    for stack in ("encoder", "decoder") if kind == "t5_encoder" else ("model.encoder", "model.decoder"):
        unimoe.sparsify(model, [0], num_experts=2, top_k=1, part=stack)
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    with torch.no_grad(), unimoe.record_routing(model) as routing:
        model(**inputs, decoder_input_ids=IDS)
    assert [counts["all"].sum() for counts in routing.counts.values()] == [8, 10]
    options = {"min_new_tokens": 3, "max_new_tokens": 3, "num_beams": 1, "do_sample": False}
    with unimoe.record_routing(model) as routing:
        model.generate(**inputs, decoder_start_token_id=2, eos_token_id=0, use_cache=use_cache, **options)
    # Two texts; without a cache all tokens before are computed again.
    assert [counts["all"].sum() for counts in routing.counts.values()] == [8, 2 * 3 if use_cache else 2 * (1 + 2 + 3)]


def test_router_logits_come_from_a_router_that_was_set_later():
    model = build("opt")[0].eval()
    unimoe.sparsify(model, "all", num_experts=4, top_k=2)
    before = run(model, output_router_logits=True).router_logits
    for layer in model.model.decoder.layers:
        layer.fc1.set_router(unimoe.UniMoETopKRouter(32, 4, 2))
    after = run(model, output_router_logits=True).router_logits
    assert len(after) == 3 and all(torch.equal(*pair) for pair in zip(after, before))


# ---- what is refused, with the model left as it was


class ShiftingConfig(PreTrainedConfig):
    model_type = "shifting"
    hidden_size = 8
    initializer_range = 0.02


class ShiftingLayer(nn.Module):
    """An FFN in parts, and one number more."""

    def __init__(self, shift=1.0):
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.shift = shift

    def forward(self, hidden_states):
        return hidden_states + self.fc2(self.shift + self.activation_fn(self.fc1(self.attention(hidden_states))))


class ShiftingModel(PreTrainedModel):
    config_class = ShiftingConfig

    def __init__(self, config, shift=1.0):
        super().__init__(config)
        self.layers = nn.ModuleList(ShiftingLayer(shift) for _ in range(2))
        self.post_init()

    def forward(self, hidden_states, **kwargs):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(hidden_states)


REFUSED = {
    "something between the parts": (
        lambda: ShiftingModel(ShiftingConfig()),
        None,
        TypeError,
        "layer 0 of ShiftingModel: ShiftingLayer does more with fc1, activation_fn, fc2",
    ),
    "a norm before the parts": (
        lambda: RobertaPreLayerNormModel(RobertaPreLayerNormConfig(**TEXT)),
        None,
        TypeError,
        "RobertaPreLayerNormLayer does more with intermediate.dense",
    ),
    "dropout between the parts": (
        lambda: BartForConditionalGeneration(BartConfig(activation_dropout=0.1, **SEQ2SEQ)),
        "model.encoder",
        ValueError,
        r"BartEncoderLayer has dropout inside its FFN \(rates \[0.1\]\)",
    ),
    "dropout inside a module": (
        lambda: T5ForConditionalGeneration(T5Config(**{**T5, "dropout_rate": 0.1})),
        "encoder",
        ValueError,
        r"T5DenseActDense has dropout inside \(rates \[0.1\]\)",
    ),
    "a layer that needs more": (
        lambda: DebertaV2Model(DebertaV2Config(**TEXT)),
        None,
        TypeError,
        "DebertaV2Layer cannot be called with hidden states alone",
    ),
}


# Dropout is seen on the meta device, too; what is computed is not.
@pytest.mark.parametrize(
    "case, device",
    [(case, "cpu") for case in REFUSED] + [(case, "meta") for case in REFUSED if case.startswith("dropout")],
)
def test_refused_models_stay_as_they_were(case, device):
    make, part, error, words = REFUSED[case]
    with torch.device(device):
        model = make().train()
    before = {name: (module, module.training) for name, module in model.named_modules()}
    with pytest.raises(error, match=words):
        unimoe.sparsify(model, part=part)
    assert {name: (module, module.training) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_own_layers_with_parts():
    model = ShiftingModel(ShiftingConfig(), shift=0.0)
    hidden_states = torch.randn(1, 3, 8)
    dense = model(hidden_states)[0]
    unimoe.sparsify(model, num_experts=2, top_k=1)
    torch.testing.assert_close(model(hidden_states)[0], dense)


def test_modules_of_nothing_but_parts_are_no_layers():
    parts = nn.Module()
    parts.fc1, parts.activation_fn, parts.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
    assert ffn_place([parts]) is None
    parts.attn = nn.Identity()
    assert ffn_place([parts]) == FFN_PLACES[-1]
    assert ffn_place([]) is None


def test_one_stack_with_mlp_is_meant_before_towers_of_other_layers():
    model = pixtral_llava()
    unimoe.sparsify(model, [0], num_experts=2, top_k=1)
    assert isinstance(model.model.language_model.layers[0].mlp, unimoe.UniMoESparseMoeBlock)
    unimoe.sparsify(model, [1], num_experts=2, top_k=1, part="model.vision_tower")
    assert isinstance(model.model.vision_tower.transformer.layers[1].feed_forward, unimoe.UniMoESparseMoeBlock)
    with pytest.raises(ValueError, match="several stacks of layers; .*part='model.encoder' or part='model.decoder'"):
        unimoe.sparsify(build("bart")[0])
