"""The router of the eight-expert Uni-MoE: noise, modality maps and losses, against its recorded values."""

import copy
import json
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file

from unimoe import UniMoESparseMoeBlock, UniMoESparsityConfig
from unimoe.modeling_unimoe.modality_routing import TOKEN_TYPES, TokenTypes, UniMoEModalityMaps, token_types_of
from unimoe.modeling_unimoe.router import UniMoETopKRouter, fused_topk_router
from unimoe.modeling_unimoe.router_losses import load_balancing_loss, modality_divergence_loss, modality_expert_loss


@pytest.fixture(scope="module")
def recorded(golden):
    folder = golden("unimoe_8e")
    tensors = {name: value.clone() for name, value in load_file(folder / "cases_dense.safetensors").items()}
    return tensors, json.loads((folder / "cases_dense.json").read_text())


@pytest.fixture(scope="module")
def lora_scale(golden):
    config = json.loads((golden("unimoe_8e") / "checkpoint" / "Uni-MoE-speech-base" / "8config.json").read_text())
    return config["lora_alpha"] / config["lora_r"]


def types_of_spans(spans, length):
    """Recorded spans of each modality as token types; the original's audio is speech."""
    types = torch.zeros(len(spans["text"]), length, dtype=torch.long)
    for name, rows in spans.items():
        name = "speech" if name == "audio" else name
        for row, stretches in enumerate(rows):
            for start, end in stretches if name != "text" else ():
                types[row, start:end] = TOKEN_TYPES.index(name)
    return types


def part(tensors, start):
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def block_of(weights, scale):
    """A sparse block with merged experts from the original's names."""
    start = "deepspeed_moe.experts.deepspeed_experts."
    count = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith(start))

    def merged(expert, name):
        a, b = (weights[f"{start}{expert}.{name}_proj_lora_{side}.weight"] for side in "AB")
        return weights[f"{start}{expert}.{name}_proj.weight"] + scale * b @ a

    gate = weights["deepspeed_moe.gate.wg.weight"]
    block = UniMoESparseMoeBlock(gate.shape[1], merged(0, "gate").shape[0], count, 2, router_dtype="float32")
    with torch.no_grad():
        block.gate.weight.copy_(gate)
        for expert in range(count):
            block.experts.gate_up_proj[expert] = torch.cat([merged(expert, "gate"), merged(expert, "up")])
            block.experts.down_proj[expert] = merged(expert, "down")
    return block


def test_modality_maps(recorded, lora_scale):
    """Relative tolerance: the recorded outputs are large."""
    tensors, facts = recorded
    case = part(tensors, "fm_block.")
    block = block_of(part(case, "weights."), lora_scale)
    shared = TokenTypes()
    maps = UniMoEModalityMaps(case["input"].shape[-1], ("image", "video", "speech"), shared)
    with torch.no_grad():
        for name, theirs in (("text", "text"), ("image", "image"), ("video", "video"), ("speech", "audio")):
            weight = case[f"weights.deepspeed_moe.fm_{theirs}.weight"]
            maps.maps[name].weight.copy_(weight.reshape(weight.shape[:2]))
            maps.maps[name].bias.copy_(case[f"weights.deepspeed_moe.fm_{theirs}.bias"])
    block.gate.modality_maps = maps
    for suffix, types in (
        ("_all_text", None),
        ("", types_of_spans(facts["fm_block"]["spans"], case["input"].shape[1])),
    ):
        shared.value_BS = types
        with torch.no_grad():
            logits, _, _ = block.gate(case["input"])
            output = block(case["input"])
        torch.testing.assert_close(logits, case[f"router_logits{suffix}"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output, case[f"output{suffix}"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(load_balancing_loss([logits]), case["l_aux"], rtol=1e-5, atol=1e-5)


def test_recorded_noise_gives_the_recorded_choice(recorded):
    tensors, _ = recorded
    case = part(tensors, "text_with_gumbel.")
    layers = sorted(int(name.split(".")[1]) for name in case if name.startswith("gumbel_noise."))
    assert layers
    for layer in layers:
        noise, reported = case[f"gumbel_noise.{layer}"], case[f"router_logits.{layer}"]
        # With the identity as weight, hidden states are the clean logits.
        clean = reported - noise
        logits, weights, index = fused_topk_router(clean, torch.eye(clean.shape[1]), 2, noise=noise)
        torch.testing.assert_close(logits, reported, atol=1e-5, rtol=0)
        first, probabilities = clean.argmax(-1), clean.softmax(-1)
        others = reported.clone().scatter(-1, first[:, None], -torch.inf)
        second = others.argmax(-1)
        assert torch.equal(index, torch.stack([first, second], -1))
        chosen = probabilities.gather(-1, index)
        torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_noise_is_float32_by_any_default():
    router = UniMoETopKRouter(8, 4, 2, noise="gumbel")
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert router.sample_noise(3).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_is_off_unless_asked_for():
    torch.manual_seed(0)
    hidden_states = torch.randn(200, 8)
    quiet, loud = UniMoETopKRouter(8, 4, 2), UniMoETopKRouter(8, 4, 2, noise="gumbel")
    for router in (quiet, loud):
        torch.nn.init.normal_(router.weight)
        router.eval()
    assert torch.equal(quiet(hidden_states)[2], quiet(hidden_states)[2])
    one, two = loud(hidden_states)[2], loud(hidden_states)[2]
    assert torch.equal(one[:, 0], two[:, 0]) and not torch.equal(one[:, 1], two[:, 1])
    assert (one[:, 0] != one[:, 1]).all()
    assert loud(torch.empty(0, 8))[2].shape == (0, 2)
    with pytest.raises(ValueError, match="noise must be one of"):
        UniMoETopKRouter(8, 4, 2, noise="normal")


@pytest.mark.parametrize("case", ["batch_image_speech_and_text", "batch_video_speech"])
def test_losses_are_the_recorded_ones(recorded, case):
    """Each loss, with its coefficient, is what it added to the recorded cross entropy."""
    tensors, content = recorded
    facts = content["cases"][case]
    tensors = part(tensors, f"{case}.")
    logits = [tensors[name] for name in sorted(tensors) if name.startswith("router_logits.")]
    types = types_of_spans(facts["modality_spans"], tensors["inputs_embeds"].shape[1])
    names = {"image": "image", "audio": "speech", "video": "video"}
    experts = {names[name]: indices for name, indices in facts["expert_indices"].items()}
    found = {
        "balance": load_balancing_loss(logits),
        "multimodal": modality_expert_loss(logits, types, experts),
        "kl": modality_divergence_loss(logits, types),
    }
    losses = facts["losses"]
    for name, value in found.items():
        expected = losses[f"ce+{name}"] - losses["ce"]
        assert (facts["aux_coef"][name] * value).item() == pytest.approx(expected, abs=1e-5)
    total = sum(facts["aux_coef"][name] * value for name, value in found.items())
    assert losses["ce"] + total.item() == pytest.approx(losses["all"], abs=1e-5)


def test_losses_have_gradients_and_take_texts_alone():
    logits = [torch.randn(6, 4, requires_grad=True)]
    types = torch.tensor([[0, 1, 1], [0, 0, 0]])
    loss = modality_expert_loss(logits, types, {"image": [1]}) + modality_divergence_loss(logits, types)
    loss.backward()
    assert logits[0].grad[:3].abs().sum() > 0 and not logits[0].grad[3:].any()
    assert modality_divergence_loss(logits, types * 0) == 0
    assert modality_expert_loss(logits, types * 0, {"image": [1]}) == 0


def test_token_types():
    ids = torch.tensor([[5, 90, 90, 6], [92, 91, 7, 5]])
    types = token_types_of(ids, {"image": 90, "video": 91, "speech": 92})
    assert types.tolist() == [[0, 1, 1, 0], [4, 2, 0, 0]]


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_each_thread_has_its_own_token_types():
    types, mine, others = TokenTypes(), torch.tensor([[1]]), torch.tensor([[2]])
    types.value_BS = mine
    assert in_another_thread(lambda: types.value_BS) is mine, "autograd's threads write nothing"

    def write():
        types.value_BS = others
        return types.value_BS

    assert in_another_thread(write) is others and types.value_BS is mine
    for copied in (copy.deepcopy(types), pickle.loads(pickle.dumps(types))):
        assert copied.value_BS is None


def test_two_threads_use_a_model_at_once():
    from tiny_models import tiny_config, tiny_inputs

    from unimoe import UniMoEForConditionalGeneration

    torch.manual_seed(0)
    sparsity = {"num_experts": 4, "top_k": 2, "layers": "all", "router_modality_maps": True}
    model = copy.deepcopy(UniMoEForConditionalGeneration(tiny_config(text_sparsity=sparsity)).eval())
    inputs = tiny_inputs(model.config)

    @torch.no_grad()
    def logits_of_a_text():
        return model(input_ids=inputs["input_ids"].clamp(max=9)).logits

    with torch.no_grad():
        expected = model(**inputs).logits
    started = []

    def ask_meanwhile(*_):
        if not started:
            started.append(True)
            in_another_thread(logits_of_a_text)

    model.model.language_model.layers[0].register_forward_pre_hook(ask_meanwhile)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected) and started


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"router_noise": "normal"}, "router_noise"),
        ({"router_modality_loss_coef": -1.0}, "router_modality_loss_coef"),
        ({"router_modality_loss_coef": 0.1}, "needs `modality_experts`"),
        ({"modality_experts": {"image": [4]}}, "below 4"),
        ({"modality_experts": {"smell": [1]}}, "modality_experts"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        UniMoESparsityConfig(num_experts=4, **fields)


def test_losses_inside_a_model():
    """Their weights change the training loss; without ids the modalities are unknown, which is said."""
    from tiny_models import tiny_config

    from unimoe import UniMoEForConditionalGeneration

    torch.manual_seed(0)
    config = tiny_config()
    model = UniMoEForConditionalGeneration(config).eval()
    sparsity = config.text_sparsity
    ids = torch.tensor([[1, 5, *[config.image_token_id] * config.num_image_tokens, 7, 9]])
    size = config.vision_config.image_size
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size), "labels": ids.clamp(max=9)}
    with torch.no_grad():
        plain = model(**inputs, output_router_logits=True)
        sparsity.modality_experts = {"image": [0]}
        sparsity.router_modality_loss_coef, sparsity.router_divergence_loss_coef = 0.5, 0.25
        weighted = model(**inputs).loss
        types = model.model.token_types(ids)
        expected = 0.5 * modality_expert_loss(plain.router_logits, types, {"image": [0]})
        expected += 0.25 * modality_divergence_loss(plain.router_logits, types)
        torch.testing.assert_close(weighted - plain.loss, expected, atol=1e-5, rtol=1e-4)
        embeds = model.get_input_embeddings()(ids.clamp(max=9))
        with pytest.raises(ValueError, match="need `input_ids`"):
            model(inputs_embeds=embeds, labels=inputs["labels"])
