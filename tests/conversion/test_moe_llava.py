"""Converted MoE-LLaVA checkpoints against what the original computed: one test a recorded case."""

import json

import numpy as np
import pytest
import torch
from llava_sets import IGNORED, close, convert, expand, expand_labels, load_model, messages_of, read_tensors, set_folder
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from unimoe.modeling_unimoe.capacity import ExpertCapacity
from unimoe.modeling_unimoe.router import UniMoETopKRouter
from unimoe.modeling_unimoe.router_losses import load_balancing_loss
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock
from unimoe.processing.media_features import image_pixels

SET = set_folder("moellava")
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}

pytestmark = pytest.mark.skipif(not SET.is_dir(), reason="no golden set of MoE-LLaVA is there")


def read_json(name):
    return json.loads((SET / name).read_text()) if SET.is_dir() else {}


def final_checkpoints():
    return sorted(file.stem.removeprefix("cases_") for file in SET.glob("cases_*.json"))


def layer_settings():
    return list(read_json("moe_layer.json"))


def expert_parts(weights, prefix, kind):
    """An expert's tensors as the stacks of the sparse block take them: (name, tensor)."""
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if kind == "phi":
        return {
            "up_proj": part["fc1.weight"],
            "up_proj_bias": part["fc1.bias"],
            "down_proj": part["fc2.weight"],
            "down_proj_bias": part["fc2.bias"],
        }
    gate, up, down = ("w2", "w1", "c_proj") if kind == "qwen" else ("gate_proj", "up_proj", "down_proj")
    gate_up = torch.cat([part[f"{gate}.weight"], part[f"{up}.weight"]])
    return {"gate_up_proj": gate_up, "down_proj": part[f"{down}.weight"]}


def build_block(facts, weights):
    """The sparse block of a setting of the layer alone."""
    kind, count = facts["expert"], facts["num_experts"]
    experts = [
        expert_parts(weights, f"deepspeed_moe.experts.deepspeed_experts.{e}.", kind) for e in range(count)
    ]
    block = UniMoESparseMoeBlock(
        facts["hidden"],
        experts[0]["down_proj"].shape[1],
        count,
        facts["k"],
        hidden_act="gelu_new" if kind == "phi" else "silu",
        gated=kind != "phi",
        bias=kind == "phi",
        norm_topk_prob=facts["k"] > 1,
        router_dtype="float32",
        capacity_factor=facts["capacity_factor"],
        eval_capacity_factor=facts["eval_capacity_factor"],
        min_capacity=facts["min_capacity"],
        random_token_selection=facts["k"] == 1,
        residual=facts["use_residual"],
    )
    with torch.no_grad():
        block.gate.weight.copy_(weights["deepspeed_moe.gate.wg.weight"])
        for name in experts[0]:
            getattr(block.experts, name).copy_(torch.stack([expert[name] for expert in experts]))
        if facts["use_residual"]:
            for name, value in expert_parts(weights, "mlp.", kind).items():
                getattr(block.residual.experts, name)[0] = value
            block.residual.coefficient.weight.copy_(weights["coefficient.weight"])
            block.residual.coefficient.bias.copy_(weights["coefficient.bias"])
    block.gate.noise = "gumbel_choice" if "gumbel added" in facts["noise"] else None
    return block.train(facts["mode"] == "train")


def play_back(monkeypatch, gumbel=None, uniform=None):
    """Gives routers and capacities the recorded random numbers, in the order of their calls."""
    noises, uniforms = iter(gumbel or []), iter(uniform or [])
    monkeypatch.setattr(UniMoETopKRouter, "sample_noise", lambda self, num_tokens: next(noises, None))

    def priority(self, index_TK):
        sample = next(uniforms, None)
        return None if sample is None else sample.gather(1, index_TK)[:, 0]

    monkeypatch.setattr(ExpertCapacity, "sample_priority", priority)


@pytest.mark.parametrize("name", layer_settings())
def test_layer_alone(monkeypatch, name):
    """Choices, dropping, combination, auxiliary loss and gradients of DeepSpeed's layer."""
    facts = read_json("moe_layer.json")[name]
    tensors = read_tensors(SET / "moe_layer.safetensors")[name]
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    block = build_block(facts, weights)
    play_back(
        monkeypatch,
        [tensors["gumbel"]] * 2 if "gumbel" in tensors else None,
        [tensors["rts_uniform"]] * 2 if "rts_uniform" in tensors else None,
    )
    hidden = tensors["input"].requires_grad_()
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits, weights_TK, index_TK = block.gate(flat)
    close(logits, tensors["gate_logits"], 1e-5, "gate logits")
    weights_TK = block.capacity.apply(weights_TK, index_TK, facts["k"] > 1, block.training)
    combined = torch.zeros_like(logits).scatter_add(1, index_TK, weights_TK)
    close(combined, tensors["combine_weights"].sum(dim=-1), 1e-5, "combination weights")
    play_back(
        monkeypatch,
        [tensors["gumbel"]] if "gumbel" in tensors else None,
        [tensors["rts_uniform"]] if "rts_uniform" in tensors else None,
    )
    output = block(hidden)
    close(output, tensors["output"].reshape(output.shape), 1e-5, "output")
    aux = load_balancing_loss([logits])
    close(aux, tensors["l_aux"].reshape(()), 1e-6, "auxiliary loss")
    counts = torch.bincount(logits.argmax(dim=-1), minlength=facts["num_experts"])
    assert counts.tolist() == tensors["exp_counts"].tolist()
    objective = (output * tensors["loss_weight"].reshape(output.shape)).sum() + 0.5 * aux
    objective.backward()
    close(hidden.grad, tensors["grad/input"], 1e-4, "gradient of the input", rtol=1e-4)
    recorded = {key.removeprefix("grad/"): value for key, value in tensors.items() if key.startswith("grad/")}
    close(block.gate.weight.grad, recorded["deepspeed_moe.gate.wg.weight"], 1e-4, "gradient of the router", rtol=1e-4)
    for e in range(facts["num_experts"]):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{e}."
        if not any(key.startswith(prefix) for key in recorded):
            continue
        for part, expected in expert_parts(recorded, prefix, facts["expert"]).items():
            close(getattr(block.experts, part).grad[e], expected, 1e-4, f"gradient of expert {e}'s {part}", rtol=1e-4)
