"""The sparse block against its definition and the original systems, and upcycling of every supported MLP."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BloomConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.models.bloom.modeling_bloom import BloomMLP
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTConfig, DINOv3ViTMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.gptj.modeling_gptj import GPTJMLP, GPTJConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP
from transformers.models.moonshine.modeling_moonshine import MoonshineConfig, MoonshineDecoderMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionMLP
from transformers.models.sam.modeling_sam import SamMLPBlock, SamVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.models.stablelm.modeling_stablelm import StableLmMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

from unimoe.modeling_unimoe.experts import naive_moe_forward
from unimoe.modeling_unimoe.router import UniMoETopKRouter, naive_topk_router
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock

IMPLEMENTATIONS = ["unimoe", "eager", "grouped_mm", "batched_mm"]
EXPERTS_TOP_K = [(e, k) for e in (2, 4, 8, 64) for k in (1, 2, 3) if k <= e]
HIDDEN, INTERMEDIATE = 16, 24


def make_block(experts=4, top_k=2, implementation="unimoe", dtype=torch.float32, seed=0, **kwargs):
    torch.manual_seed(seed)
    arguments = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, **kwargs}
    block = UniMoESparseMoeBlock(num_experts=experts, top_k=top_k, **arguments)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    block.experts.config._experts_implementation = implementation
    return block.to(dtype)


def oracle(block, hidden_states):
    """The definition in float32, with gradients of its own; returns the output and all gradients of its cosine sum."""
    experts = block.experts
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    parameters = {name: p.detach().float().requires_grad_() for name, p in block.named_parameters()}
    x = hidden_states.detach().float().requires_grad_()
    tokens = x.reshape(-1, x.shape[-1])
    _, weights, index = naive_topk_router(
        tokens, parameters["gate.weight"], block.gate.top_k, norm_topk_prob=block.gate.norm_topk_prob
    )
    output = naive_moe_forward(
        tokens,
        index,
        weights,
        parameters[f"experts.{first}"],
        parameters["experts.down_proj"],
        act_fn=experts.act_fn,
        gated=experts.has_gate,
        first_bias_EI=parameters.get(f"experts.{first}_bias"),
        down_bias_EO=parameters.get("experts.down_proj_bias"),
    ).reshape(*x.shape[:-1], experts.output_size)
    return output, {"hidden_states": x, **parameters}


def assert_block_equals_oracle(block, hidden_states, tolerance):
    x = hidden_states.clone().requires_grad_()
    output = block(x)
    expected, leaves = oracle(block, hidden_states)
    assert output.shape == expected.shape and output.dtype == hidden_states.dtype
    # A cotangent that differs everywhere, so that no gradient is symmetric or cancels.
    cotangent = torch.arange(expected.numel(), dtype=torch.float32).reshape(expected.shape).cos()
    output.backward(cotangent.to(output.dtype))
    expected.backward(cotangent.to(output.dtype).float())
    got = {"hidden_states": x, **dict(block.named_parameters())}
    pairs = [("output", output, expected), *((n, got[n].grad, leaves[n].grad) for n in leaves)]
    for name, actual, wanted in pairs:
        assert actual is not None, f"{name} has no gradient"
        if wanted.numel():
            error = (actual.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name}: {error:.2e} over {tolerance}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts, top_k", EXPERTS_TOP_K)
def test_float32_output_and_gradients(experts, top_k, implementation):
    block = make_block(experts, top_k, implementation)
    assert_block_equals_oracle(block, torch.randn(3, 5, HIDDEN), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts, top_k", EXPERTS_TOP_K)
def test_bfloat16_output_and_gradients(experts, top_k, implementation):
    # The router in float32: with bfloat16 logits, near ties would choose other experts than the definition does.
    block = make_block(experts, top_k, implementation, torch.bfloat16, router_dtype="float32")
    assert_block_equals_oracle(block, torch.randn(15, HIDDEN).bfloat16(), 2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_every_kind_of_expert(implementation, gated, bias, norm_topk_prob):
    block = make_block(
        implementation=implementation, gated=gated, bias=bias, norm_topk_prob=norm_topk_prob, hidden_act="gelu"
    )
    assert_block_equals_oracle(block, torch.randn(15, HIDDEN), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"output_size": 40, "gated": False, "bias": True},
        {"output_size": 8},
        {"hidden_size": 7, "intermediate_size": 9},
        {"hidden_size": 6, "intermediate_size": 10, "gated": False, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_widths_that_the_kernels_do_not_take(sizes, implementation, dtype, tolerance):
    block = make_block(implementation=implementation, dtype=dtype, router_dtype="float32", **sizes)
    assert_block_equals_oracle(block, torch.randn(9, block.experts.hidden_size).to(dtype), tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
    hidden_states = torch.randn(9, HIDDEN)
    output = make_block(implementation=implementation, dtype=torch.float64)(hidden_states.double())
    torch.testing.assert_close(output.float(), make_block()(hidden_states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_starved_expert(implementation, dtype, tolerance):
    block = make_block(implementation=implementation, dtype=dtype, router_dtype="float32")
    with torch.no_grad():
        block.gate.weight[1] = -3
    hidden_states = torch.rand(12, HIDDEN).to(dtype)
    assert 1 not in block.gate(hidden_states)[2]
    assert_block_equals_oracle(block, hidden_states, tolerance)
    assert not block.experts.down_proj.grad[1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, HIDDEN), (1, 1, HIDDEN), (0, HIDDEN), (2, 0, HIDDEN), (HIDDEN,)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"gated": False, "bias": True}, {"output_size": 8}], ids=str)
def test_one_token_and_none(shape, implementation, kind):
    assert_block_equals_oracle(make_block(implementation=implementation, **kind), torch.randn(shape), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    if implementation == "batched_mm" and torch.get_num_threads() > 1:
        pytest.skip("several threads add the gradients of Transformers' batched_mm in no fixed order")
    block = make_block(8, 3, implementation)
    hidden_states = torch.randn(33, HIDDEN)
    runs = []
    for _ in range(2):
        block.zero_grad()
        output = block(hidden_states)
        output.square().sum().backward()
        runs.append([output, *(p.grad.clone() for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_eager_skips_the_id_of_experts_held_elsewhere():
    block = make_block(implementation="eager")
    hidden_states = torch.randn(6, HIDDEN)
    _, weights, index = block.gate(hidden_states)
    away = index.clone()
    away[index == 2] = 4
    expected = block.experts(hidden_states, index, weights * (index != 2))
    torch.testing.assert_close(block.experts(hidden_states, away, weights), expected)
    everything_away = block.experts(hidden_states, torch.full_like(index, 4), weights)
    assert not everything_away.any() and everything_away.requires_grad


def test_parameters_have_the_documented_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_block(bias=True).named_parameters()}
    assert shapes == {
        "gate.weight": (4, HIDDEN),
        "experts.gate_up_proj": (4, 2 * INTERMEDIATE, HIDDEN),
        "experts.gate_up_proj_bias": (4, 2 * INTERMEDIATE),
        "experts.down_proj": (4, HIDDEN, INTERMEDIATE),
        "experts.down_proj_bias": (4, HIDDEN),
    }
    shapes = {name: tuple(p.shape) for name, p in make_block(gated=False, bias=True, output_size=5).named_parameters()}
    assert shapes == {
        "gate.weight": (4, HIDDEN),
        "experts.up_proj": (4, INTERMEDIATE, HIDDEN),
        "experts.up_proj_bias": (4, INTERMEDIATE),
        "experts.down_proj": (4, 5, INTERMEDIATE),
        "experts.down_proj_bias": (4, 5),
    }


def test_fresh_block_is_initialised_and_works_alone_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = UniMoESparseMoeBlock(64, 96, 4, 2, bias=True)
        output = block(torch.randn(3, 64))
    assert output.isfinite().all()
    for name, parameter in block.named_parameters():
        assert not parameter.any() if name.endswith("_bias") else 0.015 < parameter.std() < 0.025, name
    assert block.experts.config._experts_implementation == "unimoe"
    assert torch.equal(copy.deepcopy(block)(torch.ones(1, 64)), pickle.loads(pickle.dumps(block))(torch.ones(1, 64)))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"top_k": 5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"intermediate_size": 2.5}, "intermediate_size"),
        ({"output_size": 0}, "output_size"),
        ({"router_dtype": "half-ish"}, "router_dtype"),
        ({"hidden_act": "half-ish"}, "hidden_act"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_act": nn.GELU}, "hidden_act"),
        ({"hidden_act": nn.PReLU()}, "hidden_act"),
        ({"hidden_act": "xielu"}, "hidden_act"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    good = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4, "top_k": 2}
    with pytest.raises(ValueError, match=name):
        UniMoESparseMoeBlock(**{**good, **arguments})


# ---- the original systems


def merged_originals(root, base, adapter):
    """The reference's LoRA-merged weights: base + scale * B A in float32; gates from their own file."""
    weights = {}
    for shard in sorted((root / base).glob("pytorch_model-*.bin")):
        weights |= {k: v.float() for k, v in torch.load(shard, weights_only=True).items() if ".mlp." in k}
    lora = torch.load(root / adapter / "adapter_model.bin", weights_only=True)
    settings = json.loads((root / adapter / "adapter_config.json").read_text())
    for key in [key for key in lora if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        if name in weights:
            delta = lora[key.replace("lora_A", "lora_B")].float() @ lora[key].float()
            weights[name] = weights[name] + delta * (settings["lora_alpha"] / settings["r"])
    gates = torch.load(root / adapter / "mlp_gates.bin", weights_only=True)
    return weights | {k: v.float() for k, v in gates.items() if k.endswith("gate.weight")}


@pytest.mark.parametrize(
    "folder, file, case, layer, base, adapter",
    [
        ("unimoe_audio", "cases", "component_moe.layer0", 0, "Uni-MoE-audio-base", "Uni-MoE-audio-e2"),
        ("unimoe_audio", "cases", "component_moe.layer2", 2, "Uni-MoE-audio-base", "Uni-MoE-audio-e2"),
        ("unimoe_speech", "cases_e2", "moe_block", 0, "Uni-MoE-speech-base", "Uni-MoE-speech-e2"),
        ("unimoe_speech", "cases_v1.5", "moe_block", 0, "Uni-MoE-speech-base-interval", "Uni-MoE-speech-v1.5"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_block_of_the_original_system(golden, folder, file, case, layer, base, adapter, implementation):
    root = golden(folder)
    if not (root / "checkpoint" / base).is_dir():
        pytest.skip(f"the copy of {folder} has no checkpoint {base}")
    cases = {
        k.removeprefix(f"{case}."): v.clone()
        for k, v in load_file(root / f"{file}.safetensors").items()
        if k.startswith(f"{case}.")
    }
    weights = merged_originals(root / "checkpoint", base, adapter)
    prefix = f"model.layers.{layer}.mlp"
    count, hidden = weights[f"{prefix}.gate.weight"].shape
    stacked = {
        kind: torch.stack([weights[f"{prefix}.experts.{e}.{kind}_proj.weight"] for e in range(count)])
        for kind in ("gate", "up", "down")
    }
    block = UniMoESparseMoeBlock(hidden, stacked["gate"].shape[1], count, 2)
    block.load_state_dict(
        {
            "gate.weight": weights[f"{prefix}.gate.weight"],
            "experts.gate_up_proj": torch.cat([stacked["gate"], stacked["up"]], dim=1),
            "experts.down_proj": stacked["down"],
        }
    )
    block.experts.config._experts_implementation = implementation
    logits, topk_weights, topk_index = block.gate(cases["input"])
    torch.testing.assert_close(logits, cases["router_logits"], rtol=1e-4, atol=1e-4)
    if "topk_index" in cases:
        assert torch.equal(topk_index, cases["topk_index"])
        torch.testing.assert_close(topk_weights, cases["topk_weight"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(cases["input"]), cases["output"], rtol=1e-4, atol=1e-4)


# ---- upcycling

SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 4}
DENSE = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "llama_bias": lambda: LlamaMLP(LlamaConfig(mlp_bias=True, **SIZES)),
    "mistral": lambda: MistralMLP(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2MLP(Qwen2Config(**SIZES)),
    "stablelm": lambda: StableLmMLP(StableLmConfig(**SIZES)),
    "clip": lambda: CLIPMLP(CLIPVisionConfig(**SIZES)),
    "siglip": lambda: SiglipMLP(SiglipVisionConfig(**SIZES)),
    "phi": lambda: PhiMLP(PhiConfig(**SIZES)),
    "phi3": lambda: Phi3MLP(Phi3Config(pad_token_id=None, **SIZES)),
    "modernbert": lambda: ModernBertMLP(ModernBertConfig(**SIZES)),
    "gpt2": lambda: GPT2MLP(INTERMEDIATE, GPT2Config(n_embd=HIDDEN, resid_pdrop=0)),
    "gptj": lambda: GPTJMLP(INTERMEDIATE, GPTJConfig(n_embd=HIDDEN, n_head=4, rotary_dim=4)),
    "gpt_neox": lambda: GPTNeoXMLP(GPTNeoXConfig(**SIZES)),
    "starcoder2": lambda: Starcoder2MLP(Starcoder2Config(residual_dropout=0, **SIZES)),
    "dinov3": lambda: DINOv3ViTMLP(DINOv3ViTConfig(**SIZES)),
    "qwen3_vl_vision": lambda: Qwen3VLVisionMLP(
        Qwen3VLVisionConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    ),
    "sam": lambda: SamMLPBlock(SamVisionConfig(hidden_size=HIDDEN, mlp_dim=INTERMEDIATE)),
    "connector": lambda: nn.Sequential(nn.Linear(HIDDEN, INTERMEDIATE), nn.GELU(), nn.Linear(INTERMEDIATE, 40)),
}


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_upcycled_block_computes_what_the_mlp_did(kind, implementation):
    torch.manual_seed(0)
    mlp = DENSE[kind]()
    block = UniMoESparseMoeBlock.from_dense(mlp, 4, 2)
    block.experts.config._experts_implementation = implementation
    hidden_states = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(block(hidden_states), mlp(hidden_states), rtol=1e-5, atol=1e-5)
    state = block.state_dict()
    for expert in range(4):
        copied = torch.cat([p[expert].flatten() for name, p in state.items() if name != "gate.weight"]).sort().values
        assert torch.equal(copied, torch.cat([p.flatten() for p in mlp.parameters()]).sort().values)
    assert block.gate.weight.any()


def test_upcycling_keeps_dtype_mode_and_requires_grad_and_leaves_the_mlp_alone():
    mlp = DENSE["clip"]().bfloat16().eval().requires_grad_(False)
    before = copy.deepcopy(mlp.state_dict())
    block = UniMoESparseMoeBlock.from_dense(mlp, 4, 2)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert not block.training and not block.experts.training
    assert {n: p.requires_grad for n, p in block.named_parameters() if "experts" in n} == dict.fromkeys(
        ["experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.down_proj_bias"], False
    )
    assert block.gate.weight.requires_grad
    with torch.no_grad():
        block.experts.up_proj.zero_()
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_upcycling_on_meta(kind):
    with torch.device("meta"):
        mlp = DENSE[kind]()
    block = UniMoESparseMoeBlock.from_dense(mlp, 4, 2)
    assert all(p.is_meta for p in block.parameters())


def test_upcycling_router_spread_and_fresh_experts():
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4))
    assert not UniMoESparseMoeBlock.from_dense(mlp, 4, 2, router_init_std=0).gate.weight.any()
    config = LlamaConfig(initializer_range=0.5)
    config._experts_implementation = "eager"
    block = UniMoESparseMoeBlock.from_dense(mlp, 4, 2, copy_weights=False, config=config)
    assert 0.4 < block.gate.weight.std() < 0.6 and 0.4 < block.experts.gate_up_proj.std() < 0.6
    assert block.experts.config is config


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def faint_scaled_mlp():
    mlp = ScaledMLP(LlamaConfig(**SIZES))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.005)
    return mlp


class ConditionedMLP(LlamaMLP):
    def forward(self, x, condition):
        return super().forward(x) + condition


class WindowedMLP(LlamaMLP):
    """Takes tokens in windows of four."""

    def forward(self, hidden_states):
        return super().forward(hidden_states.unflatten(1, (-1, 4))).flatten(1, 2)


class UpcastingMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x).double()


class PackedLinear(nn.Module):
    """Like the linear maps of quantisers that keep no `weight`."""


class DropoutMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(0.1)


class FunctionalDropoutMLP(CLIPMLP):
    def __init__(self, config):
        super().__init__(config)
        self.activation_dropout = 0.1


def narrowed_mlp():
    mlp = DENSE["llama"]()
    mlp.up_proj = type("Linear4bit", (nn.Linear,), {})(HIDDEN, INTERMEDIATE, bias=False)
    return mlp


def packed_mlp():
    mlp = DENSE["llama"]()
    mlp.up_proj = PackedLinear()
    return mlp


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: BloomMLP(BloomConfig(hidden_size=HIDDEN)), TypeError, "cannot make BloomMLP"),
        (lambda: MoonshineDecoderMLP(MoonshineConfig(**SIZES), "silu"), TypeError, "computes more"),
        (lambda: None, TypeError, "nn.Module, got None"),
        (lambda: nn.Linear(4, 4), TypeError, "Linear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), TypeError, "Sequential"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4)), TypeError, "activation"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), TypeError, "activation"),
        (lambda: MixtralSparseMoeBlock(MixtralConfig(**SIZES)), TypeError, "sparse already"),
        (lambda: make_block(), TypeError, "sparse already"),
        (lambda: ScaledMLP(LlamaConfig(**SIZES)), TypeError, "computes more"),
        (faint_scaled_mlp, TypeError, "computes more"),
        (lambda: ConditionedMLP(LlamaConfig(**SIZES)), TypeError, "computes more"),
        (lambda: WindowedMLP(LlamaConfig(**SIZES)), TypeError, "computes more"),
        (lambda: UpcastingMLP(LlamaConfig(**SIZES)), TypeError, "computes more"),
        (lambda: DropoutMLP(LlamaConfig(**SIZES)), ValueError, "dropout"),
        (lambda: FunctionalDropoutMLP(CLIPVisionConfig(**SIZES)), ValueError, "dropout"),
        (narrowed_mlp, TypeError, "Linear4bit"),
        (packed_mlp, TypeError, "PackedLinear"),
    ],
)
def test_unsupported_modules_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        UniMoESparseMoeBlock.from_dense(make(), 4, 2)


# ---- routers of one's own


class TopPRouter(UniMoETopKRouter):
    """As many experts as it takes to reach a probability."""

    chooses_fewer = True

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_size), self.weight)
        weights, index = logits.softmax(dim=-1).topk(self.top_k)
        is_needed = weights.cumsum(dim=-1) - weights < 0.6
        return logits, weights.where(is_needed, 0), index.where(is_needed, self.num_experts)


class NullRouter(UniMoETopKRouter):
    """The upper half of its choices are null experts."""

    chooses_fewer = True

    def forward(self, hidden_states):
        logits, weights, index = super().forward(hidden_states)
        is_null = index >= self.num_experts // 2
        return logits, weights.masked_fill(is_null, 0), index.masked_fill(is_null, self.num_experts)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("router_class", [TopPRouter, NullRouter])
def test_routers_that_choose_fewer_experts(router_class, implementation, tokens):
    torch.manual_seed(0)
    block = UniMoESparseMoeBlock(32, 64, 4, 3)
    block.experts.config._experts_implementation = implementation
    block.set_router(router_class(32, 4, 3))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden_states = torch.randn(tokens, 32, requires_grad=True)
    direction = torch.linspace(-1, 1, tokens * 32).view(tokens, 32)

    _, weights, index = block.gate(hidden_states)
    assert (index == 4).any() and (index < 4).any()
    rows = []
    for token in range(tokens):
        output = torch.zeros(32)
        for weight, expert in zip(weights[token], index[token]):
            if expert < 4:
                gate, up = (block.experts.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                output = output + weight * (block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        rows.append(output)
    expected = torch.stack(rows)
    wanted = [hidden_states, *block.parameters()]
    expected_grads = torch.autograd.grad((expected * direction).sum(), wanted, materialize_grads=True)

    output = block(hidden_states)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((output * direction).sum(), wanted, materialize_grads=True)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden_states), expected, rtol=1e-5, atol=1e-5)


def test_a_router_takes_the_place_of_another():
    block = UniMoESparseMoeBlock(32, 64, 4, 2).to(torch.bfloat16).eval()
    router, weight = TopPRouter(32, 4, 2), block.gate.weight
    block.set_router(router)
    assert block.gate is router and router.weight is weight and not router.training
    assert block(torch.randn(3, 32, dtype=torch.bfloat16)).shape == (3, 32)


def test_capacities_count_the_choices_of_a_router_that_was_set():
    block = UniMoESparseMoeBlock(32, 64, 4, 1, eval_capacity_factor=0.5).eval()
    other = UniMoESparseMoeBlock(32, 64, 4, 2, eval_capacity_factor=0.5, norm_topk_prob=False).eval()
    block.set_router(UniMoETopKRouter(32, 4, 2, norm_topk_prob=False))
    block.load_state_dict(other.state_dict())
    hidden_states = torch.randn(9, 32)
    assert torch.equal(block(hidden_states), other(hidden_states))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_router_beside_adapted_experts(implementation):
    block = UniMoESparseMoeBlock(32, 64, 4, 2)
    block.experts.config._experts_implementation = implementation
    adapted = get_peft_model(block, LoraConfig(r=2, target_parameters=["experts.down_proj"], init_lora_weights=False))
    block.set_router(NullRouter(32, 4, 2))
    hidden_states = torch.randn(9, 32)
    output = adapted(hidden_states)
    torch.testing.assert_close(adapted.merge_and_unload()(hidden_states), output, rtol=1e-5, atol=1e-5)
    get_peft_model(block, LoraConfig(r=2, target_parameters=["gate.weight"]))
    before = block.gate
    with pytest.raises(TypeError, match="in a ParamWrapper: set another before adding adapters"):
        block.set_router(TopPRouter(32, 4, 2))
    assert block.gate is before


@pytest.mark.parametrize(
    "options, router, error, words",
    [
        ({}, lambda: nn.Linear(32, 4), TypeError, "UniMoETopKRouter, .* got Linear"),
        ({}, lambda: TopPRouter(32, 8, 2), ValueError, r"weight of \[8, 32\], the block needs \[4, 32\]"),
        ({"capacity_factor": 1.0}, lambda: TopPRouter(32, 4, 2), ValueError, "TopPRouter .*capacity_factor"),
    ],
)
def test_routers_that_do_not_fit_are_refused(options, router, error, words):
    block = UniMoESparseMoeBlock(32, 64, 4, 2, **options)
    before = block.gate
    with pytest.raises(error, match=words):
        block.set_router(router())
    assert block.gate is before
