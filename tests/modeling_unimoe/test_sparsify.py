"""Sparsified stock models still behave as Transformers models do."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BloomConfig,
    BloomModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DogeConfig,
    DogeForCausalLM,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SegformerConfig,
    SegformerModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

import unimoe
from unimoe import UniMoEConfig, UniMoEForConditionalGeneration
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock, init_sparse_moe_weights
from unimoe.modeling_unimoe.sparsify import load_sparsified, resolve_layers, sparsify

IMPLEMENTATIONS = ["unimoe", "eager", "grouped_mm", "batched_mm"]
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
GPT = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **kwargs})).eval()


@pytest.fixture
def sparse_llama():
    torch.manual_seed(1)
    return sparsify(llama(), "even", 4, 2)


STOCK = {
    "llama": lambda: llama(),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**TEXT)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**TEXT)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(resid_pdrop=0, **GPT)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "clip_projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
}


def run(model, **kwargs):
    inputs = {"pixel_values": PIXELS} if model.main_input_name == "pixel_values" else {"input_ids": IDS}
    return model(**inputs, **kwargs)


# ---- the model computes what it did, whatever runs the experts


@pytest.mark.parametrize("kind", STOCK)
def test_upcycled_model_computes_what_the_dense_one_did(kind):
    model = STOCK[kind]().eval()
    stock_class = type(model)
    with torch.no_grad():
        dense = run(model)[0]
        assert sparsify(model, "even", 4, 2) is model
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(run(model)[0], dense, rtol=1e-4, atol=1e-5)
        recorded = run(model, output_router_logits=True).router_logits
    assert isinstance(model, stock_class) and type(model).__name__ == stock_class.__name__
    tokens = 2 * (IDS.shape[1] if model.main_input_name == "input_ids" else recorded[0].shape[0] // 2)
    assert isinstance(recorded, tuple) and [r.shape for r in recorded] == [(tokens, 4)] * 2
    assert "router_logits" not in run(model)


def test_names_in_the_state_dict(sparse_llama):
    names = {n.removeprefix("model.layers.2.mlp.") for n in sparse_llama.state_dict() if ".layers.2.mlp." in n}
    assert names == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    assert "model.layers.1.mlp.gate_proj.weight" in sparse_llama.state_dict()


def test_number_of_experts_per_layer():
    model = sparsify(llama(), [3, 0], [2, 5], 2)
    assert [model.model.layers[i].mlp.gate.num_experts for i in (3, 0)] == [2, 5]


# ---- experts implementation


def count_calls(monkeypatch, name):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []
    function = ALL_EXPERTS_FUNCTIONS[name]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, name, lambda *args: calls.append(name) or function(*args)
    )
    return calls


def test_experts_implementation_is_what_the_user_set(sparse_llama, monkeypatch):
    calls = {name: count_calls(monkeypatch, name) for name in ("unimoe", "grouped_mm", "batched_mm")}
    assert sparse_llama.config._experts_implementation == "unimoe"
    run(sparse_llama)
    assert [len(calls[name]) for name in calls] == [2, 0, 0]
    sparse_llama.set_experts_implementation("grouped_mm")
    run(sparse_llama)
    assert [len(calls[name]) for name in calls] == [2, 2, 0]
    sparse_llama.set_experts_implementation("batched_mm")
    assert sparse_llama.config._experts_implementation == "batched_mm"
    run(sparse_llama)
    assert [len(calls[name]) for name in calls] == [2, 2, 2]
    sparse_llama.config._experts_implementation = "eager"
    run(sparse_llama)
    assert [len(calls[name]) for name in calls] == [2, 2, 2]
    with pytest.raises(ValueError, match="warp_drive"):
        sparse_llama.set_experts_implementation("warp_drive")


def test_an_implementation_chosen_before_stays():
    config = LlamaConfig(**TEXT)
    config._experts_implementation = "batched_mm"
    assert sparsify(LlamaForCausalLM(config)).config._experts_implementation == "batched_mm"


# ---- recorded outputs


def test_router_logits_of_base_and_head_are_those_of_the_routers(sparse_llama):
    seen = []
    for layer in (0, 2):
        gate = sparse_llama.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    for model in (sparse_llama.model, sparse_llama):
        seen.clear()
        for got, expected in zip(model(IDS, output_router_logits=True).router_logits, seen, strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(sparse_llama(IDS, output_router_logits=True, return_dict=False)[-1][0], seen[0])
    sparse_llama.config.output_router_logits = True
    assert len(sparse_llama(IDS).router_logits) == 2
    assert "router_logits" not in sparse_llama(IDS, output_router_logits=False)


def test_hidden_states_recorded_before_and_after_are_not_doubled():
    model = llama()
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 5
    sparsify(model, [1], 4, 2)
    outputs = model(IDS, output_hidden_states=True, output_router_logits=True)
    assert len(outputs.hidden_states) == 5 and len(outputs.router_logits) == 1


def test_dense_models_of_the_same_class_are_untouched(sparse_llama):
    dense = llama()
    assert type(dense) is LlamaForCausalLM and "router_logits" not in LlamaModel._can_record_outputs
    assert "router_logits" not in dense(IDS, output_router_logits=True)
    assert len(sparse_llama(IDS, output_router_logits=True).router_logits) == 2
    assert not LlamaForCausalLM._can_set_experts_implementation()


def test_heads_without_generation_hand_router_logits_up_too():
    model = sparsify(LlamaForSequenceClassification(LlamaConfig(**TEXT)), [1], 4, 2)
    assert len(model(IDS, output_router_logits=True).router_logits) == 1


def test_heads_that_keep_the_request_to_themselves_hand_router_logits_up_too():
    model = sparsify(DogeForCausalLM(DogeConfig(**TEXT)), [1], 4, 2)
    assert [r.shape for r in model(IDS, output_router_logits=True).router_logits] == [(10, 4)]


def test_a_stack_that_is_not_called_has_no_router_logits():
    model = sparsify(GitForCausalLM(GitConfig(vision_config=VISION, **TEXT)).eval(), [1], 4, 2)
    assert model(IDS, output_router_logits=True).router_logits == ()
    assert len(model(IDS, pixel_values=PIXELS, output_router_logits=True).router_logits) == 1


def test_models_that_record_nothing_else_return_router_logits():
    model = sparsify(GPTJForCausalLM(GPTJConfig(rotary_dim=4, resid_pdrop=0, **GPT)), [1], 4, 2)
    for part in (model, model.transformer):
        assert [r.shape for r in part(IDS, output_router_logits=True).router_logits] == [(10, 4)]


# ---- life as a Transformers model


def test_generate_cached_and_uncached(sparse_llama):
    mask = torch.ones_like(IDS)
    ids = [
        sparse_llama.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*ids) and ids[0].shape[1] > IDS.shape[1]


def test_gradients_with_checkpointing_are_those_without(sparse_llama):
    sparse_llama.train()
    gradients = []
    for _ in range(2):
        sparse_llama.zero_grad()
        sparse_llama(IDS, labels=IDS, use_cache=False, output_router_logits=True).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in sparse_llama.named_parameters()})
        sparse_llama.gradient_checkpointing_enable()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    assert gradients[0]["model.layers.0.mlp.gate.weight"].any()


def test_copies_and_pickles(sparse_llama):
    for other in (copy.deepcopy(sparse_llama), pickle.loads(pickle.dumps(sparse_llama))):
        assert type(other) is type(sparse_llama)
        assert other.model.layers[0].mlp.experts.config is other.config is not sparse_llama.config
        assert torch.equal(other(IDS).logits, sparse_llama(IDS).logits)
        other.set_experts_implementation("eager")
        assert len(other(IDS, output_router_logits=True).router_logits) == 2
    assert sparse_llama.config._experts_implementation == "unimoe"


@pytest.mark.parametrize("kind", ["llama", "clip", "siglip", "phi", "phi3", "gpt2", "gpt_neox"])
def test_saved_and_loaded_again(kind, tmp_path):
    model = sparsify(STOCK[kind]().eval(), [2, 0], [3, 4], 2, norm_topk_prob=False, router_dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [type(model).__name__]
    again, info = load_sparsified(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model) and not again.training
    assert torch.equal(run(again)[0], run(model)[0])
    assert again.config._experts_implementation == "unimoe"
    assert load_sparsified(tmp_path, experts_implementation="eager").config._experts_implementation == "eager"
    assert load_sparsified(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    # What was loaded saves and loads as what was made.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(run(load_sparsified(tmp_path / "again"))[0], run(model)[0])


def test_loading_takes_what_from_pretrained_takes(sparse_llama, tmp_path):
    sparse_llama.save_pretrained(tmp_path / "sub")
    options = {"use_cache": False, "attention_dropout": 0.1, "dtype": "bfloat16", "experts_implementation": "eager"}
    again, info = load_sparsified(
        tmp_path, subfolder="sub", trust_remote_code=False, local_files_only=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    assert (again.config.use_cache, again.config.attention_dropout, again.dtype) == (False, 0.1, torch.bfloat16)
    assert again.config._experts_implementation == "eager"
    with pytest.raises(TypeError, match="attention_dropuot"):
        load_sparsified(tmp_path / "sub", attention_dropuot=0.1)


def test_loading_with_a_configuration_of_ones_own(sparse_llama, tmp_path):
    sparse_llama.save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path, use_cache=False)
    for given in (config, tmp_path):
        again = load_sparsified(tmp_path, config=given)
        assert again.config.use_cache is (given is not config)
        assert torch.equal(again(IDS).logits, sparse_llama(IDS).logits)


def test_loading_something_else_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no sparsified"):
        load_sparsified(tmp_path)
    with pytest.raises(ValueError, match="config describes no sparsified"):
        load_sparsified(tmp_path, config=LlamaConfig(**TEXT))
    with pytest.raises(OSError, match="nowhere"):
        load_sparsified(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unimoe_sparsity"):
        type(sparsify(llama()))(LlamaConfig(**TEXT))


class LlamaOfOnesOwn(LlamaForCausalLM):
    pass


def test_classes_that_transformers_does_not_offer_are_named_by_the_caller(tmp_path):
    model = sparsify(LlamaOfOnesOwn(LlamaConfig(**TEXT)).eval(), "even", 4, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_class=LlamaOfOnesOwn"):
        load_sparsified(tmp_path)
    for model_class in (LlamaOfOnesOwn, type(model)):
        again = load_sparsified(tmp_path, model_class=model_class)
        assert isinstance(again, LlamaOfOnesOwn)
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lora_on_experts_and_router(sparse_llama, implementation, tmp_path):
    sparse_llama.set_experts_implementation(implementation)
    base = copy.deepcopy(sparse_llama)
    names = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    adapted = get_peft_model(sparse_llama, config)
    adapted.train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    logits = adapted(IDS).logits
    assert len(adapted(IDS, output_router_logits=True).router_logits) == 2
    assert not torch.allclose(logits, base(IDS).logits, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_later_initialisation_leaves_the_copies_alone(sparse_llama):
    before = copy.deepcopy(sparse_llama.state_dict())
    sparse_llama.post_init()
    assert all(torch.equal(v, before[k]) for k, v in sparse_llama.state_dict().items())


# ---- inside a composite model, the way of its own `__init__`


class CompositeConfig(PreTrainedConfig):
    model_type = "composite-for-test"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(self, text_config=None, **kwargs):
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(**kwargs)


class Composite(PreTrainedModel):
    config_class = CompositeConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        sparsify(self.language_model, "odd", 4, 2, copy_weights=False)
        self.connector = UniMoESparseMoeBlock(8, 8, 2, 1, gated=False, bias=True, output_size=32, config=config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        init_sparse_moe_weights(module)


def assert_initialised(model):
    for name, parameter in model.named_parameters():
        if ".mlp." in name or name.startswith("connector"):
            if name.endswith("bias"):
                assert not parameter.any(), name
            else:
                assert 0.01 < parameter.std() < 0.03, (name, parameter.std())


def test_composite_built_from_config():
    assert_initialised(Composite(CompositeConfig(LlamaConfig(**TEXT))))


def test_composite_saved_and_loaded(tmp_path):
    model = Composite(CompositeConfig(LlamaConfig(**TEXT)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again, info = Composite.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again.set_experts_implementation({"text_config": "batched_mm"})
    assert again.language_model.config._experts_implementation == "batched_mm"
    assert len(again.language_model(IDS, output_router_logits=True).router_logits) == 2


def test_composite_loaded_from_a_checkpoint_that_lacks_the_sparse_parts(tmp_path):
    model = Composite(CompositeConfig(LlamaConfig(**TEXT)))
    state = {k: v for k, v in model.state_dict().items() if ".experts." not in k and ".gate." not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    again, info = Composite.from_pretrained(tmp_path, output_loading_info=True)
    assert any("experts.gate_up_proj" in key for key in info["missing_keys"])
    assert_initialised(again)


def test_meta_model_stays_on_meta():
    with torch.device("meta"):
        model = sparsify(LlamaModel(LlamaConfig(**TEXT)))
    assert all(p.is_meta for p in model.parameters())
    # Shapes can be had from it, as from the dense model.
    assert model(IDS.to("meta"))[0].shape == (2, 5, 32)


# ---- which layers, and what is refused


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("all", [0, 1, 2, 3, 4]),
        ("even", [0, 2, 4]),
        ("odd", [1, 3]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ([4, 0], [4, 0]),
        (range(2), [0, 1]),
        (np.array([3, 1]), [3, 1]),
    ],
)
def test_layer_rules(layers, expected):
    assert resolve_layers(layers, 5) == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"layers": "every"}, "layers. must be one of"),
        ({"layers": []}, "chooses none"),
        ({"layers": [4]}, "layers. holds 4"),
        ({"layers": [-1]}, "layers. holds -1"),
        ({"layers": [True]}, "layers. holds True"),
        ({"layers": [1, 1]}, "twice"),
        ({"num_experts": [4]}, "num_experts has 1 entries"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": [4, 4, 4, "8"]}, "num_experts"),
        ({"num_experts": [4, 4, 1, 4]}, "top_k"),
        ({"top_k": 5}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"router_dtype": "float31"}, "router_dtype"),
        ({"layers": 2}, "layers. must be one of .* or a list of indices, got 2"),
        ({"layers": None}, "layers. must be one of .* or a list of indices, got None"),
        ({"num_experts": 4.0}, "num_experts must be a positive integer or one per chosen layer, got 4.0"),
        ({"num_experts": "4"}, "num_experts must be a positive integer or one per chosen layer, got '4'"),
        ({"eval_capacity_factor": -1.0}, "`eval_capacity_factor` must be a positive number"),
        ({"random_token_selection": True}, "random_token_selection"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, words):
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        sparsify(model, **arguments)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_models_that_cannot_be_made_sparse_are_refused_whole(sparse_llama):
    with pytest.raises(TypeError, match="layer 0 .*sparse already"):
        sparsify(sparse_llama, "all")
    with pytest.raises(TypeError, match="sparse already"):
        sparsify(MixtralForCausalLM(MixtralConfig(num_local_experts=2, **TEXT)))
    half_dense = {"decoder_sparse_step": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM has routers of its own"):
        sparsify(Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=4, **half_dense, **TEXT)), "even")
    with pytest.raises(ValueError, match="made sparse by its configuration: .*vision_sparsity"):
        model = UniMoEForConditionalGeneration(UniMoEConfig.from_pretrained(unimoe.tiny_checkpoint()))
        sparsify(model, part="model.vision_tower")
    with pytest.raises(TypeError, match="layer 0 of BloomModel: cannot make BloomMLP"):
        sparsify(BloomModel(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)))
    with pytest.raises(TypeError, match="PreTrainedModel"):
        sparsify(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no list of layers"):
        sparsify(CLIPVisionModel(CLIPVisionConfig(**{**VISION, "num_hidden_layers": 0})))
    model = llama()
    model.model.layers[3].mlp.up_proj = type("Linear8bitLt", (nn.Linear,), {})(32, 48, bias=False)
    with pytest.raises(TypeError, match="layer 3 .*Linear8bitLt"):
        sparsify(model)
    assert type(model) is LlamaForCausalLM and model.model.layers[0].mlp.up_proj is not None


def clip():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def test_several_stacks_are_named():
    model = clip()
    with pytest.raises(ValueError, match="several stacks of layers; .*part='text_model' or part='vision_model'"):
        sparsify(model)
    sparsify(model.vision_model)
    assert isinstance(model.vision_model.encoder.layers[0].mlp, UniMoESparseMoeBlock)


def test_stacks_of_one_model_are_named_by_themselves():
    stages = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [1, 1]}
    model = SegformerModel(SegformerConfig(sr_ratios=[1, 1], patch_sizes=[3, 3], strides=[2, 2], **stages))
    with pytest.raises(ValueError, match="part='stages.0.blocks' or part='stages.1.blocks'"):
        sparsify(model)
    with pytest.raises(TypeError, match="layer 0 of SegformerModel: "):
        sparsify(model, part="stages.1.blocks")


# ---- one part of a model, or several


def llava():
    torch.manual_seed(0)
    text = {**TEXT, "model_type": "llama", "vocab_size": 64}
    vision = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 4}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, vision_feature_layer=-2)
    return LlavaForConditionalGeneration(config).eval()


def image_and_text():
    # 8 x 8 pixels in patches of 4: four tokens an image.
    return {"input_ids": torch.tensor([[1, 63, 63, 63, 63, 5, 7]] * 2), "pixel_values": PIXELS}


LANGUAGE, TOWER = "model.language_model", "model.vision_tower"


@pytest.mark.parametrize("parts", [[LANGUAGE], [TOWER], [TOWER, LANGUAGE]], ids=["language", "vision", "both"])
def test_parts_of_a_model_are_made_sparse_saved_and_loaded(parts, tmp_path):
    model, inputs = llava(), image_and_text()
    dense = model(**inputs).logits
    for number, part in enumerate(parts):
        sparsify(model, "even", 2 + number, 2, part=part)
    output = model(**inputs, output_router_logits=True)
    torch.testing.assert_close(output.logits, dense, rtol=1e-4, atol=1e-5)
    # Two layers of each part are sparse; the tower has four patches and a class token, and the last layer is not run.
    shapes = {TOWER: [(10, 2)] * 2, LANGUAGE: [(14, 1 + len(parts))] * 2}
    assert [r.shape for r in output.router_logits] == sum((shapes[part] for part in parts), [])
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(model(**inputs).logits, dense, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = load_sparsified(tmp_path)
    assert (
        isinstance(loaded, LlavaForConditionalGeneration) and loaded.state_dict().keys() == model.state_dict().keys()
    )
    again = loaded(**inputs, output_router_logits=True)
    torch.testing.assert_close(again.logits, output.logits, rtol=1e-4, atol=1e-5)
    assert len(again.router_logits) == 2 * len(parts)
    kept = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **kept), llava().generate(**inputs, **kept))


def test_gradients_reach_the_routers_and_experts_of_a_part():
    model = sparsify(llava(), "odd", 4, 2, part=LANGUAGE)
    output = model(**image_and_text(), output_router_logits=True, labels=image_and_text()["input_ids"])
    (output.loss + sum(logits.square().mean() for logits in output.router_logits)).backward()
    block = model.model.language_model.layers[1].mlp
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


class LlamaAroundAnother(PreTrainedModel):
    """Layers of its own behind those of a model inside."""

    config_class = LlamaConfig
    _can_record_outputs = {"hidden_states": nn.Linear}

    def __init__(self, config):
        super().__init__(config)
        self.inner = LlamaModel(config)
        self.layers = nn.ModuleList([LlamaModel(config).layers[0] for _ in range(2)])
        self.post_init()

    @capture_outputs
    def forward(self, input_ids, **kwargs):
        hidden_states = self.inner(input_ids).last_hidden_state
        for layer in self.layers:
            hidden_states = hidden_states + layer.mlp(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)


@pytest.mark.parametrize("parts", [["inner", "layers"], ["layers", "inner"]], ids=str)
def test_layers_beside_a_model_with_layers_keep_their_router_logits(parts):
    model = LlamaAroundAnother(LlamaConfig(**TEXT))
    for part in parts:
        sparsify(model, "even", 3 if part == "inner" else 2, 2, part=part)
        model(IDS, output_router_logits=True)
    for one in (model, copy.deepcopy(model)):
        logits = one(IDS, output_router_logits=True).router_logits
        assert [r.shape for r in logits] == [(10, 3), (10, 3), (10, 2)]


def test_text_alone_asks_no_tower_for_router_logits():
    model = sparsify(sparsify(llava(), "even", 2, 2, part=TOWER), "even", 3, 2, part=LANGUAGE)
    logits = model(IDS, output_router_logits=True).router_logits
    assert [r.shape for r in logits] == [(10, 3)] * 2


@pytest.mark.parametrize(
    "part, words",
    [
        (
            "language_model",
            "LlavaForConditionalGeneration has no part 'language_model'; .*part='model.language_model'",
        ),
        (3, "no part 3"),
        ("model", "model of LlavaForConditionalGeneration has several stacks"),
        ("model.multi_modal_projector", "model.multi_modal_projector of .* has no list of layers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, words):
    model = llava()
    with pytest.raises(ValueError, match=words):
        sparsify(model, part=part)
    assert type(model) is LlavaForConditionalGeneration


def test_a_second_call_takes_the_layers_that_are_still_dense(sparse_llama, tmp_path):
    sparsify(sparse_llama, [1], 2, 1, norm_topk_prob=False)
    assert len(sparse_llama(IDS, output_router_logits=True).router_logits) == 3
    sparse_llama.save_pretrained(tmp_path)
    assert torch.equal(load_sparsified(tmp_path)(IDS).logits, sparse_llama(IDS).logits)


@pytest.mark.parametrize(
    "first, second",
    [
        ({"capacity_factor": 1.0}, {"residual": True}),
        ({"capacity_factor": 0.5}, {"eval_capacity_factor": 0.5}),
        ({"min_capacity": 1}, {"residual": True}),
    ],
)
def test_calls_that_differ_only_in_which_option_they_set_come_back_apart(first, second, tmp_path):
    model = sparsify(sparsify(llama(), [0], 4, 2, **first), [2], 4, 2, **second)
    model.save_pretrained(tmp_path)
    again, info = load_sparsified(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert [again.model.layers[layer].mlp.options for layer in (0, 2)] == [first, second]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
