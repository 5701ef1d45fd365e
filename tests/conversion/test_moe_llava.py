"""Converted MoE-LLaVA checkpoints against what the original computed: one test a recorded case."""

import json

import numpy as np
import pytest
import torch
from llava_sets import (
    IGNORED,
    close,
    convert,
    expand,
    expand_labels,
    load_model,
    messages_of,
    read_tensors,
    set_folder,
)
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
    experts = [expert_parts(weights, f"deepspeed_moe.experts.deepspeed_experts.{e}.", kind) for e in range(count)]
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
    weights_TK = block.capacity.apply(weights_TK, index_TK, block.training)
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


def checkpoint_cases():
    found = []
    for variant in final_checkpoints():
        found += [(variant, case) for case in read_json(f"cases_{variant}.json")["cases"]]
    return found


def tower_of(checkpoint):
    return SET / json.loads((checkpoint / "config.json").read_text())["mm_image_tower"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folders = {}

    def find(name):
        if name not in folders:
            output = tmp_path_factory.mktemp("moe_llava") / name
            checkpoint = SET / name
            folders[name] = convert("moe-llava", output, checkpoint=checkpoint, vision_tower=tower_of(checkpoint))
        return folders[name]

    return find


@pytest.fixture(scope="module")
def loaded(converted):
    parts = {}

    def find(name):
        if name not in parts:
            parts[name] = (load_model(converted(name)), read_tensors(SET / f"cases_{name}.safetensors"))
        return parts[name]

    return find


def set_noise(model, noise):
    model.config.text_sparsity.router_noise = noise
    for module in model.modules():
        if isinstance(module, UniMoETopKRouter):
            module.noise = noise


def layers_of(tensors):
    """Recorded tensors of the sparse layers, in order."""
    count = len({name.split("/")[0] for name in tensors if name.startswith("moe") and "/" in name})
    return [
        {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"moe{i}/")}
        for i in range(count)
    ]


def encode_images(model, tensors, counts):
    """The images' embeddings. A row without an image has a blank one of its own in the list, which is passed over."""
    encoded = model.model.encode_media(pixel_values=tensors["pixel_values"])
    close(encoded["image"].last_hidden_state, tensors["vision_features"], 5e-5, "vision features")
    close(encoded["image"].pooler_output, tensors["projector_output"], 5e-5, "projector output")
    placed, image = [], 0
    for count in counts:
        placed += range(image, image + count)
        image += max(count, 1)
    encoded["image"].pooler_output = encoded["image"].pooler_output[placed]
    return {"mm_encoder_outputs": encoded}


@pytest.mark.parametrize("variant, case", checkpoint_cases())
def test_checkpoint(loaded, monkeypatch, variant, case):
    """From ids and pixels to gate logits, choices, combination weights, losses, gradients, logits and greedy ids."""
    model, recorded = loaded(variant)
    facts, tensors = read_json(f"cases_{variant}.json")["cases"][case], recorded[case]
    if "solo_logits" in tensors:
        # The original takes a batch of three rows for something else and computes nonsense; each row alone is right.
        with torch.no_grad():
            close(model(tensors["input_ids"]).logits, tensors["solo_logits"], 1e-4, "logits")
        return
    config, training = model.config, facts["mode"] == "train"
    mask = tensors.get("attention_mask")
    side = "left" if "left" in case else "right"
    ids, spliced_mask = expand(tensors["input_ids"], mask, config.num_image_tokens, config.image_token_id, 0, side)
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": spliced_mask})
    if "labels" in tensors:
        real = torch.ones_like(tensors["input_ids"]) if mask is None else mask
        inputs["labels"] = expand_labels(tensors["labels"], tensors["input_ids"], real, config.num_image_tokens)
        assert torch.equal(inputs["labels"], tensors["spliced_labels"])
    noisy = facts["noise"] == "real"
    set_noise(model, "gumbel_choice" if noisy else None)
    layers = layers_of(tensors)
    play_back(monkeypatch, [layer["gumbel"] for layer in layers] if noisy else None)
    combined = record_combinations(model, monkeypatch)
    valid = spliced_mask.bool()
    model.train(training)
    model.zero_grad()
    try:
        with torch.set_grad_enabled(training):
            if "pixel_values" in tensors:
                inputs |= encode_images(model, tensors, (tensors["input_ids"] == -200).sum(dim=1).tolist())
            outputs = model(**inputs, output_router_logits=True, output_hidden_states=True)
    finally:
        model.eval()
        set_noise(model, None)
    for i, (layer, logits) in enumerate(zip(layers, outputs.router_logits, strict=True)):
        rows = valid.flatten()
        close(logits[rows], layer["gate_logits"][rows], 2e-5, f"gate logits {i}")
        weights_TE, index_TK = combined[i]
        assert torch.equal(index_TK[rows, 0], layer["index1"][rows].long())
        if "index2" in layer:
            assert torch.equal(index_TK[rows, 1], layer["index2"][rows].long())
        close(weights_TE[rows], layer["combine_sum"][rows], 2e-5, f"combination weights {i}")
    close(outputs.logits[valid], tensors["logits"][valid], 1e-4, "logits")
    for i, states in enumerate(outputs.hidden_states):
        close(states[valid], tensors[f"hidden/{i}"][valid], 1e-4, f"hidden states {i}")
    # Rows of nothing but padding attend differently since; they count in this loss alone.
    if "moe_loss" in tensors and side == "right":
        moe_loss = config.text_sparsity.router_aux_loss_coef * outputs.aux_loss
        assert moe_loss.item() == pytest.approx(tensors["moe_loss"].item(), abs=1e-6)
    if "loss" in tensors:
        assert outputs.loss.item() == pytest.approx(tensors["loss"].item(), abs=1e-4)
    if any(name.startswith("grad/") for name in tensors):
        outputs.loss.backward()
        check_gradients(model, tensors)
    # Phi's cached positions are wrong in the original where padding is on the left.
    if "greedy_ids" in tensors and not (side == "left" and config.text_config.model_type == "phi"):
        inputs.pop("labels", None)
        count = tensors["greedy_ids"].shape[-1]
        generated = model.generate(**inputs, max_new_tokens=count, **GREEDY)
        assert torch.equal(generated[:, ids.shape[1] :], tensors["greedy_ids"].reshape(len(ids), count))


def record_combinations(model, monkeypatch):
    """Of every sparse layer of a forward pass: weights [T, E] as they are applied, and choices [T, K]."""
    seen = []
    apply = ExpertCapacity.apply

    def recorded(self, weights_TK, index_TK, *args):
        weights_TK = apply(self, weights_TK, index_TK, *args)
        zeros_TE = torch.zeros(len(index_TK), self.num_experts)
        seen.append((zeros_TE.scatter_add(1, index_TK, weights_TK.detach()), index_TK))
        return weights_TK

    monkeypatch.setattr(ExpertCapacity, "apply", recorded)
    return seen


def check_gradients(model, tensors):
    parameters = dict(model.named_parameters())
    for name, expected in tensors.items():
        if not name.startswith("grad/"):
            continue
        name = name.removeprefix("grad/").removeprefix("model.").removeprefix("transformer.")
        index = None
        if "image_spatial_proj." in name:
            layer, kind = name.split(".")[-2:]
            found = parameters[f"model.vision_connector.layers.{int(layer) // 2}.{kind}"].grad
        elif name == "lm_head.weight":
            found = parameters[name].grad
        else:
            fields = name.replace("h.", "layers.", 1).split(".") if name.startswith("h.") else name.split(".")
            mlp = f"model.language_model.layers.{fields[1]}.mlp"
            if "wg" in fields:
                found = parameters[f"{mlp}.gate.weight"].grad
            else:
                index, part, kind = int(fields[-3]), fields[-2], fields[-1]
                suffix = "_bias" if kind == "bias" else ""
                halves = {"gate_proj": 0, "w2": 0, "up_proj": 1, "w1": 1}
                if part in halves:
                    found = parameters[f"{mlp}.experts.gate_up_proj"].grad[index].chunk(2)[halves[part]]
                else:
                    target = "up_proj" if part == "fc1" else "down_proj"
                    found = parameters[f"{mlp}.experts.{target}{suffix}"].grad[index]
        close(found, expected, 1e-5, name, rtol=1e-3)


@pytest.mark.parametrize(
    "name", sorted(file.stem.removeprefix("cases_") for file in SET.glob("cases_*_stage2.safetensors"))
)
def test_second_stage(converted, name):
    model = load_model(converted(name))
    assert model.config.text_sparsity is None
    for case, tensors in read_tensors(SET / f"cases_{name}.safetensors").items():
        ids, _ = expand(tensors["input_ids"], None, model.config.num_image_tokens, model.config.image_token_id, 0)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=tensors.get("pixel_values")).logits
        close(logits, tensors["logits"], 1e-4, f"logits of {case}")


@pytest.mark.parametrize("folder", sorted(SET.glob("*_stage1")), ids=lambda folder: folder.name)
def test_first_stage(tmp_path, folder):
    """The projector of the first stage on a decoder of its own; here the second stage's stands in for it."""
    base = SET / folder.name.replace("_stage1", "_stage2")
    output = convert("moe-llava", tmp_path / "converted", checkpoint=folder, base=base, vision_tower=tower_of(folder))
    state = load_model(output).state_dict()
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert projector
    for name, value in projector.items():
        layer, kind = name.split(".")[-2:]
        assert torch.equal(state[f"model.vision_connector.layers.{int(layer) // 2}.{kind}"], value.float())


IMAGE_PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}


def image_cases():
    return sorted(read_tensors(SET / "image_preprocess.safetensors")) if SET.is_dir() else []


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("case", image_cases())
def test_image_rules(case, kind):
    tensors = read_tensors(SET / "image_preprocess.safetensors")[case]
    folders = [file.parent for file in SET.glob("*/*/preprocessor_config.json")]
    folder = next(folder for folder in folders if kind in folder.name)
    processor = IMAGE_PROCESSORS[kind].from_pretrained(folder)
    image = Image.fromarray(tensors["image_u8"].numpy().astype(np.uint8))
    for pad in (True, False):
        pixels = torch.from_numpy(image_pixels(processor, [image], pad, {}))[0]
        close(pixels, tensors[f"{kind}_{'pad' if pad else 'nopad'}"], 1e-6, f"pad={pad}")


# The tokenizer of each conversation: modes whose end token is its own. Others belong to decoders without fixtures.
MODES = {"phi": "phi", "qwen": "qwen", "stablelm": "stablelm"}


@pytest.fixture(scope="module")
def processors():
    """A function from a tokenizer's name to a processor with the family's template and one token an image."""
    from unimoe.conversion.family import Conversion
    from unimoe.conversion.plan import Plan
    from unimoe.conversion.tokenizer import load_tokenizer
    from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConfig
    from unimoe.processing.chat_template import MOE_LLAVA_CHAT_TEMPLATE
    from unimoe.processing.processing_unimoe import UniMoEProcessor

    found = {}

    def find(name):
        if not (SET / f"tokenizer-{name}").is_dir():
            pytest.skip(f"the set has no tokenizer of {name}")
        if name not in found:
            config = UniMoEConfig(
                text_config={"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1}
            )
            conversion = Conversion(config, Plan({}), "", {}, "", tokenizer_folder=SET / f"tokenizer-{name}")
            image_processor = CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14})
            found[name] = UniMoEProcessor(
                image_processor, load_tokenizer(conversion), num_image_tokens=1, chat_template=MOE_LLAVA_CHAT_TEMPLATE
            )
        return found[name]

    return find


def prompts():
    found = read_json("prompts_tokens.json").get("prompts", [])
    return [(entry["conv_mode"], entry["case"]) for entry in found if entry["conv_mode"] in MODES]


def turns_of(prompt, stop):
    """A recorded prompt of this family taken apart again."""
    turns = []
    for part in prompt.split("USER: ")[1:]:
        question, answer = part.split(" ASSISTANT:")
        turns.append({"from": "human", "value": question})
        if answer:
            turns.append({"from": "gpt", "value": answer.removesuffix(stop).strip()})
    return turns


def with_sign(ids, processor):
    return [-200 if token == processor.image_token_id else token for token in ids]


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "image.png"
    Image.new("RGB", (20, 14), (200, 30, 30)).save(file)
    return file


@pytest.mark.parametrize("mode, case", prompts())
def test_prompt(processors, image_file, mode, case):
    processor = processors(MODES[mode])
    entries = read_json("prompts_tokens.json")["prompts"]
    entry = next(entry for entry in entries if (entry["conv_mode"], entry["case"]) == (mode, case))
    messages = messages_of(turns_of(entry["prompt"], entry["stop_str"]), [image_file] * 9)
    is_open = entry["prompt"].endswith("ASSISTANT:")
    assert processor.apply_chat_template(messages, add_generation_prompt=is_open) == entry["prompt"]
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=is_open)
    assert with_sign(ids[0], processor) == entry["ids"][MODES[mode]]


@pytest.mark.parametrize("name", list(MODES))
def test_tokens(processors, image_file, name):
    processor = processors(name)
    stored = read_json("prompts_tokens.json")
    facts = stored["tokenizers"][name]["eval_reload"]
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (facts["eos_id"], facts["pad_id"])
    for entry in stored["texts"]:
        assert tokenizer(entry["text"])["input_ids"] == entry["plain_ids"][name] or "<image>" in entry["text"]
        images = [Image.open(image_file)] * entry["text"].count("<image>") or None
        ids = processor(text=entry["text"], images=images)["input_ids"][0]
        assert with_sign(ids, processor) == entry["ids"][name], entry["text"]
    # What decodes differently in the CodeGen tokenizer is spaces around tokens that its slow version adds.
    if name != "phi":
        for entry in stored["texts"]:
            assert tokenizer.decode(entry["plain_ids"][name], skip_special_tokens=True) == entry["decoded"][name]


def label_cases():
    found = read_json("prompts_tokens.json").get("training_labels", [])
    return [(entry["tokenizer"], entry["case"]) for entry in found if entry["version"] in MODES]


@pytest.mark.parametrize("name, case", label_cases())
def test_labels(processors, image_file, name, case):
    processor = processors(name)
    entries = read_json("prompts_tokens.json")["training_labels"]
    entry = next(e for e in entries if (e["tokenizer"], e["case"]) == (name, case) and e["version"] in MODES)
    outputs = processor.apply_chat_template(
        messages_of(entry["conversations"], [image_file] * 9),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert with_sign(outputs["input_ids"][0], processor) == entry["input_ids"]
    labels = [
        token if answer else IGNORED for token, answer in zip(outputs["input_ids"][0], outputs["assistant_masks"][0])
    ]
    assert labels == entry["labels"]


def with_tokenizer():
    return [
        name
        for name in final_checkpoints()
        if any((SET / name / file).is_file() for file in ("merges.txt", "tokenizer.model"))
    ]


@pytest.mark.parametrize("name", with_tokenizer())
def test_converted_folder_answers_a_chat(converted, loaded, image_file, name):
    """Template, tokenizer, image rules and model of the folder go together; placeholders lie behind the vocabulary."""
    from transformers import AutoProcessor

    processor, model = AutoProcessor.from_pretrained(converted(name)), loaded(name)[0]
    assert processor.image_token_id == model.config.image_token_id >= model.config.text_config.vocab_size
    assert processor.image_aspect_ratio == "pad"
    content = [{"type": "image", "path": str(image_file)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == model.config.num_image_tokens
    generated = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scales": [1, 3]}, "unimoe convert cumo"),
        ({"mm_audio_tower": "x"}, "unimoe convert uni-moe"),
        ({"model_type": "moe_llava_minicpm"}, "supported decoders"),
        ({"mm_hidden_size": 1024}, "of width 1024"),
        ({"mm_video_tower": "LanguageBind_Video_merge"}, "mm_video_tower"),
        ({"image_projector_type": "qformer2_64"}, "image_projector_type"),
        ({"moe": None}, "num_experts"),
        ({"num_hidden_layers": 99}, "are in none of the files"),
    ],
)
def test_refusals(tmp_path, capsys, change, words):
    """One line that names the input, and nothing is left behind."""
    from unimoe.cli import main

    source = SET / final_checkpoints()[0]
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "output"
    checkpoint.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (checkpoint / file.name).symlink_to(file)
    config = {**json.loads((source / "config.json").read_text()), **change}
    (checkpoint / "config.json").write_text(json.dumps(config))
    args = ["convert", "moe-llava", "--checkpoint", str(checkpoint), "--vision-tower", str(tower_of(source))]
    assert main([*args, "--output", str(output)]) == 1
    assert words in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("folder", sorted(SET.glob("*_stage1")), ids=lambda folder: folder.name)
def test_a_projector_alone_asks_for_its_decoder(tmp_path, capsys, folder):
    from unimoe.cli import main

    args = ["convert", "moe-llava", "--checkpoint", str(folder), "--vision-tower", str(tower_of(folder))]
    assert main([*args, "--output", str(tmp_path / "output")]) == 1
    assert "--base" in capsys.readouterr().err
