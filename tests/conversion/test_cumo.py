"""Converted CuMo checkpoints against what the original computed: one test a recorded case."""

import json

import pytest
import torch
from llava_sets import (
    IGNORED,
    SYSTEM,
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
from transformers import AutoProcessor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConnectorConfig
from unimoe.modeling_unimoe.connectors import build_connector, connector_router_logits
from unimoe.modeling_unimoe.multi_scale import resize_and_tile
from unimoe.modeling_unimoe.router_losses import load_balancing_loss, router_z_loss
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock

SET = set_folder("cumo")
FINAL = {"mistral": "CuMo-mistral-7b", "mixtral": "CuMo-mixtral-8x7b"}
STAGE_2 = "cumo-mistral-7b-pft"
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}
ROUTERS = {"vision": "vision_router_logits", "projector": "connector_router_logits", "llm": "router_logits"}

pytestmark = pytest.mark.skipif(not SET.is_dir(), reason="no golden set of CuMo is there")


def read_json(name):
    return json.loads((SET / name).read_text()) if SET.is_dir() else {}


def cases(kind):
    found = []
    for decoder in FINAL:
        facts = read_json(f"{decoder}_cases.json").get("cases", {})
        found += [(decoder, name) for name in facts if facts[name]["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folders = {}

    def find(name):
        if name not in folders:
            tower = SET / json.loads((SET / name / "config.json").read_text())["mm_vision_tower"]
            folders[name] = convert(
                "cumo", tmp_path_factory.mktemp("cumo") / name, checkpoint=SET / name, vision_tower=tower
            )
        return folders[name]

    return find


@pytest.fixture(scope="module")
def loaded(converted):
    parts = {}

    def find(decoder):
        if decoder not in parts:
            folder = converted(FINAL[decoder])
            facts = read_json(f"{decoder}_cases.json")["cases"]
            tensors = read_tensors(SET / f"{decoder}_cases.safetensors", ".")
            parts[decoder] = (load_model(folder), AutoProcessor.from_pretrained(folder), facts, tensors)
        return parts[decoder]

    return find


@pytest.fixture(scope="module")
def components():
    return read_tensors(SET / "components.safetensors", ".")


def check_routers(outputs, tensors, real):
    """Every recorded router's logits; those of the decoder at real tokens alone."""
    recorded = {"vision": [], "projector": [], "llm": []}
    for name in sorted(name for name in tensors if name.endswith("router_logits")):
        recorded[name.split(".")[0]].append(tensors[name])
    for part, expected in recorded.items():
        found = getattr(outputs, ROUTERS[part]) or ()
        assert len(found) == len(expected), part
        for i, (ours, theirs) in enumerate(zip(found, expected)):
            if part == "llm":
                ours, theirs = ours[real], theirs[real]
            close(ours, theirs, 2e-5, f"router logits {i} of {part}")


@pytest.mark.parametrize("decoder, case", cases("inference"))
def test_raw_files_give_the_recorded_answer(loaded, decoder, case):
    model, processor, facts, tensors = loaded(decoder)
    facts, tensors = facts[case], tensors[case]
    message = facts["prompt"].split("<</SYS>>\n\n")[-1].removeprefix("<s>[INST] ").removesuffix(" [/INST]")
    images = [SET / "images" / f"{name}.png" for name in facts.get("images") or []]
    system = None if SYSTEM in facts["prompt"] else ""
    messages = messages_of([{"from": "human", "value": message}], images, system)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == facts["prompt"]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    config = model.config
    ids, mask = expand(tensors["input_ids"], None, config.num_image_tokens, config.image_token_id, 0)
    assert torch.equal(inputs["input_ids"], ids)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True, output_hidden_states=True)
    hook.remove()
    if images:
        close(seen["inputs_embeds"], tensors["inputs_embeds"], 1e-5, "spliced embeddings")
        recorded = loaded(decoder)[3]["pixel_values"]
        close(inputs["pixel_values"], torch.cat([recorded[name] for name in facts["images"]]), 1e-6, "pixels")
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        close(features, tensors["tower_features"], 1e-5, "tower features")
        close(outputs.image_hidden_states, tensors["projector_out"], 1e-5, "projector output")
    check_routers(outputs, tensors, mask.flatten().bool())
    for i in range(len(outputs.hidden_states)):
        if f"hidden.{i}" in tensors:
            close(outputs.hidden_states[i], tensors[f"hidden.{i}"], 1e-4, f"hidden states {i}")
    close(outputs.logits, tensors["logits"], 1e-4, "logits")
    expected = tensors["greedy_ids"].flatten().tolist()
    generated = model.generate(
        **inputs, max_new_tokens=len(expected), output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert generated.sequences[0, ids.shape[1] :].tolist() == expected
    close(torch.stack(generated.logits, dim=1), tensors["greedy_step_logits"], 1e-4, "logits of the steps")


def component_block(weights, facts):
    """A connector from the original's tensors."""
    num_experts, top_k = facts["num_experts"], facts["top_k"]
    first, second = weights["experts.0.0.weight"], weights["experts.0.2.weight"]
    connector = build_connector(
        UniMoEConnectorConfig(
            hidden_size=first.shape[0], hidden_act="gelu", sparsity={"num_experts": num_experts, "top_k": top_k}
        ),
        first.shape[1],
        second.shape[0],
    )
    fill(connector, weights, num_experts, ("0", "2"))
    return connector.to(first.dtype)


@torch.no_grad()
def fill(block, weights, num_experts, names):
    block.gate.weight.copy_(weights["gate.weight"])
    for i, target in zip(names, ("up_proj", "down_proj")):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            stacked = torch.stack([weights[f"experts.{e}.{i}.{kind}"] for e in range(num_experts)])
            getattr(block.experts, f"{target}{suffix}").copy_(stacked)


def weights_of(tensors):
    return {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}


def component_names(kind):
    return [name for name, facts in read_json("components.json").items() if facts["kind"] == kind]


def check_probe(tensors, module, gate, hidden, output, logits, loss_scale=(0.1, 0.01)):
    """Losses with per-sample statistics, and the gradients of the recorded objective."""
    balance = load_balancing_loss([logits])
    z = router_z_loss([logits])
    close(balance, tensors["balance_loss"], 1e-5, "balance loss")
    close(z, tensors["z_loss"], 1e-4, "z loss")
    if "grad_probe" not in tensors:
        return
    objective = (output * tensors["grad_probe"]).sum() + loss_scale[0] * balance + loss_scale[1] * z
    gradients = torch.autograd.grad(objective, [hidden, gate])
    close(gradients[0], tensors["grad_input"], 1e-4, "gradient of the input", rtol=1e-4)
    close(gradients[1], tensors["grad_gate"], 1e-4, "gradient of the router", rtol=1e-4)


@pytest.mark.parametrize("name", component_names("connector"))
def test_sparse_connector(components, name):
    facts, tensors = read_json("components.json")[name], components[name]
    connector = component_block(weights_of(tensors), facts)
    hidden = tensors["input"].requires_grad_()
    output = connector(hidden)
    logits = connector_router_logits(connector, hidden)
    loose = hidden.dtype == torch.bfloat16
    close(logits, tensors["router_logits"], 2e-2 if loose else 1e-5, "router logits")
    close(output, tensors["output"], 2e-2 if loose else 1e-5, "output")
    if not loose:
        check_probe(tensors, connector, connector.gate.weight, hidden, output, logits)


@pytest.mark.parametrize("name", component_names("clip_layer"))
def test_sparse_encoder_layer(components, name):
    from transformers import CLIPVisionConfig

    facts, tensors = read_json("components.json")[name], components[name]
    weights = weights_of(tensors)
    config = CLIPVisionConfig(
        hidden_size=facts["hidden"],
        intermediate_size=facts["inter"],
        num_attention_heads=facts["heads"],
        hidden_act=facts["act"],
        layer_norm_eps=facts["eps"],
        attn_implementation="eager",
    )
    layer = CLIPEncoderLayer(config).eval()
    layer.mlp = UniMoESparseMoeBlock.from_dense(layer.mlp, facts["num_experts"], facts["top_k"])
    fill(layer.mlp, weights, facts["num_experts"], ("fc1", "fc2"))
    rest = {key: value for key, value in weights.items() if not key.startswith(("experts.", "gate."))}
    assert not layer.load_state_dict(rest, strict=False).unexpected_keys
    seen = {}
    layer.mlp.register_forward_pre_hook(lambda module, args: seen.update(input=args[0]))
    hidden = tensors["input"].requires_grad_()
    output = layer(hidden, attention_mask=None)
    close(seen["input"], tensors["ffn_input"], 1e-5, "input of the block")
    close(output, tensors["output"], 1e-5, "output")
    logits = layer.mlp.gate(seen["input"])[0].unflatten(0, hidden.shape[:2])
    close(logits, tensors["router_logits"], 1e-5, "router logits")
    check_probe(tensors, layer, layer.mlp.gate.weight, hidden, output, logits)


@pytest.mark.parametrize("name", component_names("mixtral_block"))
def test_decoder_block(components, name):
    """Mixtral's own block, whose statistics are those of the whole batch."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    facts, tensors = read_json("components.json")[name], components[name]
    weights = weights_of(tensors)
    config = MixtralConfig(
        hidden_size=facts["hidden"],
        intermediate_size=facts["inter"],
        num_local_experts=facts["num_experts"],
        num_experts_per_tok=facts["top_k"],
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    experts = range(facts["num_experts"])
    with torch.no_grad():
        block.gate.weight.copy_(weights["gate.weight"])
        for e in experts:
            gate_up = torch.cat([weights[f"experts.{e}.w1.weight"], weights[f"experts.{e}.w3.weight"]])
            block.experts.gate_up_proj[e] = gate_up
            block.experts.down_proj[e] = weights[f"experts.{e}.w2.weight"]
    hidden = tensors["input"].requires_grad_()
    output = block(hidden)
    logits = block.gate(hidden.flatten(0, 1))[0]
    close(output, tensors["native_output"], 1e-5, "output")
    check_probe(tensors, block, block.gate.weight, hidden, output, logits)


@pytest.mark.parametrize("name", component_names("tower"))
def test_tower(converted, components, name):
    facts, tensors = read_json("components.json")[name], components[name]
    model = load_model(converted(facts["checkpoint"]))
    scale = facts["scales"][-1]
    tiles = resize_and_tile(tensors["input"], scale)
    if "tiles" in tensors:
        close(tiles, tensors["tiles"], 1e-5, "tiles")
    with torch.no_grad():
        output = model.get_image_features(tensors["input"], output_router_logits=True)
    close(output.last_hidden_state, tensors["features"], 1e-5, "features")
    if "balance_loss" in tensors:
        count = len(output.router_logits)
        close(load_balancing_loss(output.router_logits) / count, tensors["balance_loss"], 1e-5, "balance loss")
        close(router_z_loss(output.router_logits) / count, tensors["z_loss"], 1e-4, "z loss")
    if "projector_out" in tensors:
        close(output.pooler_output, tensors["projector_out"], 1e-5, "projector output")
    if "logits" in tensors:
        ids, _ = expand(tensors["input_ids"], None, model.config.num_image_tokens, model.config.image_token_id, 0)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=tensors["input"][: (tensors["input_ids"] == -200).sum()]).logits
        close(logits, tensors["logits"], 1e-4, "logits")


@pytest.mark.parametrize("name", [path.stem for path in sorted((SET / "images").glob("*.png"))])
def test_image_rules(loaded, components, name):
    """Padding to a square in the mean colour, and the centre crop of the first stage."""
    processor = loaded("mistral")[1]
    image = Image.open(SET / "images" / f"{name}.png").convert("RGB")
    recorded = components["preprocess"]
    assert processor.image_aspect_ratio == "pad"
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    close(pixels, recorded[f"{name}.pad"], 1e-6, "padded")
    processor.image_aspect_ratio = "square"
    try:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    finally:
        processor.image_aspect_ratio = "pad"
    close(pixels, recorded[f"{name}.centercrop"], 1e-6, "cropped")


def with_one_placeholder(ids, processor):
    """Ids of a text with the originals' sign for an image in the place of its placeholders."""
    kept = []
    for token in ids:
        if token == processor.image_token_id:
            kept += [] if kept and kept[-1] == -200 else [-200]
        else:
            kept.append(token)
    return kept


@pytest.mark.parametrize("name", list(read_json("text_cases.json").get("preprocess", {})))
def test_conversation_tokens_and_labels(loaded, name):
    processor = loaded("mistral")[1]
    facts = read_json("text_cases.json")["preprocess"][name]
    image = SET / "images" / "square.png"
    system = None if name.startswith("mistral_instruct_system/") else ""
    messages = messages_of(facts["conversation"], [image] * 9, system)
    assert processor.apply_chat_template(messages) == facts["prompt"]
    outputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert with_one_placeholder(outputs["input_ids"][0], processor) == facts["input_ids"]
    if facts["warning"]:
        return  # The original leaves such a sample without labels, because it counts tokens another way.
    trained = [token for token, answer in zip(outputs["input_ids"][0], outputs["assistant_masks"][0]) if answer]
    assert trained == [label for label in facts["labels"] if label != IGNORED]


@pytest.mark.parametrize(
    "template", [name for name in read_json("text_cases.json").get("prompts", {}) if "mistral" in name]
)
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_prompt(loaded, template, kind):
    processor = loaded("mistral")[1]
    facts = read_json("text_cases.json")["prompts"][template]
    body = facts[kind].split("<</SYS>>\n\n")[-1].removeprefix("<s>[INST] ")
    turns = []
    for part in body.split("</s>[INST] "):
        question, answer = part.split(" [/INST]")
        turns.append({"from": "human", "value": question})
        if answer:
            turns.append({"from": "gpt", "value": answer.strip()})
    messages = messages_of(turns, [SET / "images" / "square.png"] * 9, None if "system" in template else "")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == facts[kind]
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert with_one_placeholder(ids[0], processor) == facts[f"{kind}_ids"]


@pytest.mark.parametrize("text", list(read_json("text_cases.json").get("tokenize", {})))
def test_tokens(loaded, text):
    processor = loaded("mistral")[1]
    facts = read_json("text_cases.json")["tokenize"][text]
    if not text:
        assert processor.tokenizer(text)["input_ids"] == facts["plain"]
        return
    image = Image.open(SET / "images" / "square.png")
    images = [image] * text.count("<image>") or None
    ids = processor(text=text, images=images)["input_ids"][0]
    assert with_one_placeholder(ids, processor) == facts["with_image"]


def training_inputs(model, facts, tensors):
    """A recorded batch as the model takes it. The image of a sample without a placeholder counts in the losses alone."""
    config, mask = model.config, tensors["attention_mask"]
    num_tokens = config.num_image_tokens
    ids, spliced_mask = expand(tensors["input_ids"], mask, num_tokens, config.image_token_id, 0)
    labels = expand_labels(tensors["labels"], tensors["input_ids"], mask, num_tokens)
    length = facts["max_length"]
    assert (ids[:, length:] != config.image_token_id).all()
    encoded = model.model.encode_media(pixel_values=tensors["images"], output_router_logits=True)
    counts = (tensors["input_ids"] == -200).sum(dim=1)
    placed, image = [], 0
    for count in counts.tolist():
        placed += range(image, image + count)
        image += max(count, 1)
    encoded["image"].pooler_output = encoded["image"].pooler_output[placed]
    rows = {"input_ids": ids, "attention_mask": spliced_mask, "labels": labels}
    return {name: value[:, :length] for name, value in rows.items()} | {"mm_encoder_outputs": encoded}


def our_gradient(model, name):
    """The gradient of the tensor that an original's parameter has become, or is a slice of; None where it got none."""
    inner = name.removeprefix("model.")
    inner = inner.replace("vision_tower.vision_model.", "vision_tower.").replace("mm_projector.", "vision_connector.")
    inner = inner.replace(".block_sparse_moe.gate.", ".mlp.gate.")
    if "vision_tower.encoder" in inner:
        inner = inner.replace(".gate.", ".mlp.gate.").replace(".experts.", ".mlp.experts.")
    parts = inner.split(".experts.")
    parameters = dict(model.named_parameters())
    index = None
    if len(parts) == 2:
        expert, layer, kind = parts[1].split(".")[0], ".".join(parts[1].split(".")[1:-1]), parts[1].split(".")[-1]
        suffix = "_bias" if kind == "bias" else ""
        target = {"0": "up_proj", "fc1": "up_proj", "2": "down_proj", "fc2": "down_proj", "w2": "down_proj"}.get(layer)
        index = int(expert)
        if layer in ("w1", "w3"):
            target = "gate_up_proj"
        prefix = parts[0].replace(".block_sparse_moe", ".mlp")
        inner = f"{prefix}.experts.{target}{suffix}"
    for prefix in ("model.", "model.language_model.", ""):
        if (parameter := parameters.get(f"{prefix}{inner}")) is not None:
            break
    else:
        raise KeyError(f"{name}: {inner}")
    if parameter.grad is None or index is None:
        return parameter.grad
    gradient = parameter.grad[index]
    if layer in ("w1", "w3"):
        gradient = gradient.chunk(2)[0 if layer == "w1" else 1]
    return gradient


@pytest.mark.parametrize("decoder, case", cases("training"))
def test_training_losses_and_gradients(loaded, decoder, case):
    model, _, facts, tensors = loaded(decoder)
    facts, tensors = facts[case], tensors[case]
    inputs = training_inputs(model, facts, tensors)
    model.zero_grad()
    outputs = model(**inputs, output_router_logits=True)
    real = inputs["attention_mask"].bool()
    close(outputs.logits[real], tensors["logits"][real], 1e-4, "logits")
    check_routers(outputs, tensors, real.flatten())
    shifted = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    assert shifted.item() == pytest.approx(facts["losses"]["language"], abs=1e-4)
    assert outputs.loss.item() == pytest.approx(facts["losses"]["total"], abs=1e-4)
    outputs.loss.backward()
    for name, expected in tensors.items():
        if name.startswith("grad."):
            close(our_gradient(model, name.removeprefix("grad.")), expected, 1e-5, name, rtol=1e-3)
    for name, expected in facts["grad_norms"].items():
        gradient = our_gradient(model, name)
        norm = 0.0 if gradient is None else gradient.norm().item()
        assert norm == pytest.approx(expected or 0.0, rel=1e-3, abs=1e-5), name
    for name in facts["no_grad"]:
        gradient = our_gradient(model, name)
        assert gradient is None or not gradient.any(), name


@pytest.mark.parametrize("decoder", FINAL)
def test_saved_again(loaded, tmp_path, decoder):
    model = loaded(decoder)[0]
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config.text_sparsity is None if decoder == "mistral" else again.config.text_sparsity.num_experts
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "moe_llava_phi", "scales": None, "mm_image_tower": "x"}, "unimoe convert moe-llava"),
        ({"mm_audio_tower": "x", "scales": None}, "unimoe convert uni-moe"),
        ({"mm_hidden_size": 1024}, "of width 1024"),
        ({"scales": [1, 1.5]}, "scales"),
        ({"num_experts": 3}, "of another shape than"),
    ],
)
def test_refusals(tmp_path, capsys, change, words):
    """One line that names the input, and nothing is left behind."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "output"
    checkpoint.mkdir()
    source = SET / FINAL["mistral"]
    for file in source.iterdir():
        (checkpoint / file.name).symlink_to(file)
    config = {**read_json(f"{FINAL['mistral']}/config.json"), **change}
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    tower = SET / read_json(f"{FINAL['mistral']}/config.json")["mm_vision_tower"]
    from unimoe.cli import main

    args = ["convert", "cumo", "--checkpoint", str(checkpoint), "--vision-tower", str(tower), "--output", str(output)]
    assert main(args) == 1
    assert words.replace("of another shape than", "another shape") in capsys.readouterr().err
    assert not output.exists()


def test_dry_run_card_and_default_dtype(tmp_path, capsys):
    from unimoe.cli import main

    source, output = SET / FINAL["mixtral"], tmp_path / "output"
    tower = SET / json.loads((source / "config.json").read_text())["mm_vision_tower"]
    args = ["convert", "cumo", "--checkpoint", str(source), "--vision-tower", str(tower), "--output", str(output)]
    assert main([*args, "--dry-run"]) == 0
    assert "reads:" in capsys.readouterr().out
    assert not output.exists()
    assert main(args) == 0
    card = (output / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "CC BY-NC 4.0" in card
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
