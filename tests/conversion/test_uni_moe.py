"""Converted Uni-MoE releases against what the originals computed: one test a recorded case, from stored tensors and from the
raw files."""

import json

import pytest
import torch
from uni_moe_sets import (
    BY_NAME,
    VARIANTS,
    case_tensors,
    expand,
    find_set,
    is_there,
    read_cases,
    render,
    router_choices,
)

CASES = [(variant.name, case) for variant in VARIANTS for case in read_cases(variant)]
# The reference's own bug: a video without its flag is read as the text "<video>"; here it is refused instead.
PROMPTS = [(name, case) for name, case in CASES if not case.startswith(("train_", "batch_")) and "gumbel" not in case]
BATCHES = [(name, case) for name, case in CASES if case.startswith(("train_", "batch_")) and "unmerged" not in case]
FEATURES_ATOL = 1e-4
GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}

pytestmark = [
    pytest.mark.skipif(not CASES, reason="no golden set of Uni-MoE is there"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first(tensors, *names):
    return next((tensors[name] for name in names if name in tensors), None)


def close(found, expected, atol, what):
    difference = (found.float() - expected.float()).abs().max().item()
    assert difference <= atol, f"{what}: off by {difference:.1e}"


def check_router(outputs, tensors, model, atol, valid):
    """Logits and choices of every sparse layer, at real tokens."""
    sparsity = model.config.text_sparsity
    layers = sparsity.layer_indices(model.config.text_config.num_hidden_layers)
    assert len(outputs.router_logits) == len(layers)
    for layer, logits in zip(layers, outputs.router_logits):
        expected = first(tensors, f"router_logits.layer{layer}", f"router_logits.{layer}")
        close(logits[valid], expected[valid], atol, f"router logits of layer {layer}")
        chosen = first(tensors, f"router_topk_index.layer{layer}", f"topk_experts.{layer}")
        assert torch.equal(router_choices(logits, sparsity.top_k)[valid], chosen[valid].long())


def spliced_mask(tensors):
    mask = first(tensors, "attention_mask_after_splice", "attention_mask_spliced")
    return torch.ones(tensors["inputs_embeds"].shape[:2], dtype=torch.long) if mask is None else mask.long()


@pytest.mark.parametrize("name, case", PROMPTS + BATCHES)
def test_stored_embeddings_give_the_recorded_logits(loaded, name, case):
    """The decoder alone: stored spliced embeddings in; logits, router choices, loss and greedy ids out."""
    model, _, recorded = loaded(name)
    tensors = case_tensors(recorded, case)
    mask = spliced_mask(tensors)
    labels = first(tensors, "labels_after_splice", "labels_spliced")
    with torch.no_grad():
        outputs = model(
            inputs_embeds=tensors["inputs_embeds"], attention_mask=mask, labels=labels, output_router_logits=True
        )
    valid = mask.bool()
    close(outputs.logits[valid], tensors["logits"][valid], BY_NAME[name].logits_atol, "logits")
    check_router(outputs, tensors, model, BY_NAME[name].logits_atol, valid.flatten())
    if labels is not None:
        shifted = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        facts = read_cases(BY_NAME[name])[case]
        expected = facts.get("losses", {}).get("ce", facts.get("loss"))
        expected = tensors["loss"].item() if expected is None else expected
        if labels.ne(-100).any():
            assert shifted.item() == pytest.approx(expected, abs=1e-4)
    greedy = first(tensors, "greedy_ids", "generated_ids")
    if greedy is not None:
        generated = model.generate(
            inputs_embeds=tensors["inputs_embeds"], attention_mask=mask, max_new_tokens=greedy.numel(), **GREEDY
        )
        assert generated[0].tolist()[: greedy.numel()] == greedy.flatten().tolist()


@pytest.mark.parametrize("name, case", [pair for pair in PROMPTS if "text" not in pair[1]])
def test_stored_features_give_the_recorded_answer(loaded, name, case):
    """Towers, connectors and splice: stored pixels and log-mels in; embeddings, logits and greedy ids out."""
    variant = BY_NAME[name]
    model, _, recorded = loaded(name)
    tensors = case_tensors(recorded, case)
    ids = tensors["input_ids"][0].tolist()
    if -300 in ids and "input_features" not in tensors:
        pytest.skip("the set holds only parts of this case's sound features")
    row = expand(ids, item_lengths(ids, tensors, model.config, variant), model.config, variant.sound)
    inputs = {"input_ids": torch.tensor([row])}
    if -200 in ids:
        inputs["pixel_values"] = tensors["pixel_values"]
    if -400 in ids:
        inputs["pixel_values_videos"] = tensors["video_pixel_values"]
    if -300 in ids:
        inputs["input_features"] = tensors["input_features"].flatten(0, 1)
    with torch.no_grad():
        outputs = model(**inputs)
    close(outputs.logits, tensors["logits"], variant.logits_atol, "logits")
    check_item_features(outputs, tensors)
    greedy = first(tensors, "greedy_ids", "generated_ids").flatten().tolist()
    generated = model.generate(**inputs, max_new_tokens=len(greedy), **GREEDY)
    assert generated[0, len(row) :].tolist() == greedy


@pytest.mark.parametrize("name, case", PROMPTS)
def test_raw_files_give_the_recorded_answer(loaded, name, case):
    """The whole way: a chat with files through the template, the processor and the model."""
    variant = BY_NAME[name]
    model, processor, recorded = loaded(name)
    tensors, facts = case_tensors(recorded, case), read_cases(variant)[case]
    ids = tensors["input_ids"][0].tolist()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content_of(variant, facts, ids)}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert inputs["input_ids"][0].tolist() == expand(
        ids, item_lengths(ids, tensors, model.config, variant), model.config, variant.sound
    )
    check_features(inputs, tensors)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    hook.remove()
    close(seen["inputs_embeds"], tensors["inputs_embeds"], FEATURES_ATOL, "spliced embeddings")
    check_item_features(outputs, tensors)
    close(outputs.logits, tensors["logits"], 1e-3, "logits")
    check_router(outputs, tensors, model, 1e-3, torch.ones(outputs.logits.shape[1], dtype=torch.bool))
    greedy = first(tensors, "greedy_ids", "generated_ids").flatten().tolist()
    generated = model.generate(**inputs, max_new_tokens=len(greedy), **GREEDY)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == greedy


def content_of(variant, facts, ids):
    """A case's query and files as the content of a user's message."""
    folder = find_set(variant.golden)
    media = facts.get("media", facts.get("inputs"))
    query = facts.get("query", facts.get("inputs", {}).get("query"))
    sounds = first(media, "voice", "speech", "audio")
    sounds = [] if sounds is None else sounds if isinstance(sounds, list) else [sounds]
    content = []
    if "image" in media:
        content.append({"type": "image", "path": str(folder / media["image"])})
    # The originals read every file they are given, but write one placeholder.
    for sound in sounds[: ids.count(-300)]:
        content.append({"type": variant.sound, "path": str(folder / sound)})
    if "video" in media:
        video = media["video"]
        video = [str(folder / frame) for frame in video] if isinstance(video, list) else str(folder / video)
        content.append({"type": "video", "video": video})
    return [*content, {"type": "text", "text": query}] if query else content


def item_lengths(ids, tensors, config, variant, row=0):
    """How many embeddings stand for each sentinel of a row."""
    chunks = tensors["features_mask"][row].tolist() if "features_mask" in tensors else []
    per_chunk = getattr(config, f"num_{variant.sound}_tokens")
    files = iter(sorted({int(number) for number in chunks if number > 0}))
    lengths = []
    for token in ids:
        if token in (-200, -400):
            lengths.append(config.num_image_tokens)
        elif token == -300:
            lengths.append(per_chunk * chunks.count(next(files)))
    return lengths


def check_features(inputs, tensors):
    """Pixels, filterbanks and log-mels."""
    for ours, theirs in (("pixel_values", "pixel_values"), ("pixel_values_videos", "video_pixel_values")):
        if ours in inputs and theirs in tensors:
            # The order of frames is that of the folder's listing, and nothing depends on it.
            found, expected = inputs[ours], tensors[theirs]
            if found.ndim == 5:
                found, expected = found.mean(1), expected.mean(1)
            close(found, expected, 1e-5, ours)
    if "input_values" in inputs:
        values = inputs["input_values"]
        close(values.mean(-1), tensors["fbank_row_means"], FEATURES_ATOL, "means of the filterbank's rows")
        close(values[:, -1], tensors["fbank_last_row"], FEATURES_ATOL, "last row of the filterbank")
        if "fbank_first_rows" in tensors:
            rows = tensors["fbank_first_rows"]
            close(values[:, : rows.shape[1]], rows, FEATURES_ATOL, "first rows of the filterbank")
    if "input_features" in inputs:
        expected = first(tensors, "input_features", "input_features_head").flatten(0, 1)
        count = len(inputs["input_features"])
        close(inputs["input_features"][..., : expected.shape[-1]], expected[:count], FEATURES_ATOL, "log-mel")


def check_item_features(outputs, tensors):
    """What every item becomes, before the splice."""
    if outputs.image_hidden_states is not None:
        close(
            outputs.image_hidden_states,
            first(tensors, "image_features", "projector_out"),
            FEATURES_ATOL,
            "image features",
        )
    sounds = outputs.audio_hidden_states if outputs.audio_hidden_states is not None else outputs.speech_hidden_states
    if sounds is not None:
        if "aligner_out" in tensors:
            expected = tensors["aligner_out"]
        else:
            expected = torch.cat([tensors[key] for key in sorted(tensors) if key.startswith("audio_aligner_output.")])
        close(sounds, expected[: len(sounds)], FEATURES_ATOL, "sound features")


def samples_of(variant, case, facts):
    """The samples of a labelled batch: in the facts, or by their letters in a file of samples."""
    if "samples" in facts and isinstance(facts["samples"][0], dict):
        return facts["samples"]
    stored = json.loads((find_set(variant.golden) / "inputs" / "train_samples.json").read_text())
    by_id = {sample["id"]: sample for sample in stored}
    wanted = facts.get("samples") or facts.get("ids")
    return [by_id[name] for name in wanted] if wanted else None


@pytest.mark.parametrize("name, case", BATCHES)
def test_raw_files_give_the_recorded_loss(loaded, name, case):
    """A labelled batch from its files: ids of every row, features, and the cross entropy."""
    variant = BY_NAME[name]
    model, processor, recorded = loaded(name)
    tensors, facts = case_tensors(recorded, case), read_cases(variant)[case]
    rows = [row[keep.bool()].tolist() for row, keep in zip(tensors["input_ids"], tensors["attention_mask"])]
    if "bug" in case:
        pytest.skip("the reference's bug, which takes <video> for text, is not imitated")
    samples = samples_of(variant, case, facts)
    texts = [render(sample["conversations"]) for sample in samples]
    folder = find_set(variant.golden)
    media = {"image": [], "video": [], "voice": []}
    for sample in samples:
        for kind, items in media.items():
            value = sample.get(kind)
            if kind == "video" and value:
                items.append([[str(folder / frame) for frame in value]])
            else:
                value = [] if value is None else value if isinstance(value, list) else [value]
                items.append([str(folder / item) for item in value])
    given = {key: items for key, items in zip(("images", "videos", variant.sound), media.values()) if any(items)}
    inputs = processor(text=texts, **given, padding=True, padding_side="right", return_tensors="pt")
    for i, ids in enumerate(rows):
        keep = inputs["attention_mask"][i].bool()
        expected = expand(ids, item_lengths(ids, tensors, model.config, variant, i), model.config, variant.sound)
        assert inputs["input_ids"][i][keep].tolist() == expected
    labels = first(tensors, "labels_after_splice", "labels_spliced")
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        outputs = model(**inputs)
    valid = inputs["attention_mask"].bool()
    close(outputs.logits[valid], tensors["logits"][:, :width][valid], 1e-3, "logits")
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:width].flatten())
    expected = facts.get("losses", {}).get("ce", facts.get("loss"))
    expected = tensors["loss"].item() if expected is None else expected
    if labels.ne(-100).any():
        assert loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("golden_set", sorted({variant.golden for variant in VARIANTS}))
def test_token_cases(loaded, golden_set):
    """Every text of a set with its recorded ids, split at placeholders and as a whole."""
    variant = next(variant for variant in VARIANTS if variant.golden == golden_set)
    if not is_there(variant):
        pytest.skip("the set is not there")
    content = json.loads((find_set(golden_set) / f"{variant.cases}.json").read_text())
    probes = content.get("component_tokenizer") or content.get("tokenizer_probes") or []
    if not probes:
        pytest.skip("the set has no token cases")
    model, processor, _ = loaded(variant.name)
    from unimoe.processing.prompting import split_prompt, tokenize_pieces

    sentinels = {"image": [-200], "video": [-400], "audio": [-300], "speech": [-300]}
    for probe in probes:
        pieces = split_prompt(probe["text"], processor.placeholders)
        segments = tokenize_pieces(processor.tokenizer, pieces)
        ids = [token for segment in segments for token in (sentinels[segment.kind] if segment.kind else segment.ids)]
        assert ids == probe.get("multimodal_ids", probe.get("ids")), probe["text"]
        if "<image>" not in probe["text"] and "<audio>" not in probe["text"] and "plain_ids" in probe:
            assert processor.tokenizer(probe["text"])["input_ids"] == probe["plain_ids"]


def dense_eight_experts():
    variant = BY_NAME["unimoe_8e-cases_dense"]
    if not is_there(variant):
        pytest.skip("the set is not there")
    return variant


def test_gumbel_noise_as_recorded(loaded, monkeypatch):
    """Asked for by the configuration, and given the recorded noise, the routers choose as recorded."""
    variant = dense_eight_experts()
    model, _, recorded = loaded(variant.name)
    tensors = case_tensors(recorded, "text_with_gumbel")
    layers = model.config.text_sparsity.layer_indices(model.config.text_config.num_hidden_layers)
    for layer in layers:
        gate = model.model.language_model.layers[layer].mlp.gate
        monkeypatch.setattr(gate, "sample_noise", lambda count, noise=tensors[f"gumbel_noise.{layer}"]: noise)
    with torch.no_grad():
        outputs = model(inputs_embeds=tensors["inputs_embeds"], output_router_logits=True)
    close(outputs.logits, tensors["logits"], variant.logits_atol, "logits")
    for layer, logits in zip(layers, outputs.router_logits):
        close(logits, tensors[f"router_logits.{layer}"], variant.logits_atol, f"router logits of layer {layer}")


def test_gumbel_noise_is_off_unless_asked_for(converted):
    from transformers import AutoConfig, AutoModelForMultimodalLM

    folder = converted(dense_eight_experts().name)
    config = AutoConfig.from_pretrained(folder)
    assert config.text_sparsity.router_noise is None
    config.text_sparsity.router_noise = "gumbel"
    noisy = AutoModelForMultimodalLM.from_pretrained(folder, config=config).eval()
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


@pytest.mark.parametrize("case", [case for name, case in BATCHES if "8e-cases_dense" in name])
def test_training_loss_with_auxiliary_losses(loaded, monkeypatch, case):
    """The model's own loss is the recorded one, for each auxiliary loss and for all of them."""
    variant = dense_eight_experts()
    model, _, recorded = loaded(variant.name)
    tensors, facts = case_tensors(recorded, case), read_cases(variant)[case]
    labels, mask = tensors["labels_spliced"], tensors["attention_mask_spliced"].long()
    sparsity = model.config.text_sparsity
    assert sparsity.router_aux_loss_coef == facts["aux_coef"]["balance"]
    experts = {"speech" if name == "audio" else name: value for name, value in facts["expert_indices"].items()}
    assert sparsity.modality_experts == experts
    # The recorded padding is zero vectors, which only embeddings can be; the ids tell the modalities.
    config, rows = model.config, []
    for i, (ids, keep) in enumerate(zip(tensors["input_ids"], tensors["attention_mask"])):
        row = ids[keep.bool()].tolist()
        row = expand(row, item_lengths(row, tensors, config, variant, i), config, variant.sound)
        rows.append(row + [0] * (mask.shape[1] - len(row)))
    real_types = model.model.token_types(torch.tensor(rows))
    monkeypatch.setattr(model, "_token_types", lambda input_ids: real_types)
    fields = {
        "balance": "router_aux_loss_coef",
        "multimodal": "router_modality_loss_coef",
        "kl": "router_divergence_loss_coef",
    }
    wanted = {"ce": [], "ce+multimodal": ["multimodal"], "ce+kl": ["kl"]}
    if mask.all():
        # Here padding does not count for the balance, in the original it does; so only full rows are comparable.
        wanted |= {"ce+balance": ["balance"], "all": list(fields)}
    for recorded_name, names in wanted.items():
        for name, field in fields.items():
            monkeypatch.setattr(sparsity, field, facts["aux_coef"][name] if name in names else 0.0)
        with torch.no_grad():
            loss = model(inputs_embeds=tensors["inputs_embeds"], attention_mask=mask, labels=labels).loss
        assert loss.item() == pytest.approx(facts["losses"][recorded_name], abs=1e-4), recorded_name
