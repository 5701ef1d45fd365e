"""Dense models made sparse: the recorded initialisation of CuMo, any backbone, the command, and stock models trained on."""

import pytest
import torch
from tiny_models import tiny_config, tiny_text_config
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from unimoe import UniMoEForConditionalGeneration, UniMoESparsityConfig, load_sparsified, sparsify, upcycle
from unimoe.cli import main

COUNTS = {"num_experts": 3, "top_k": 2}
BACKBONES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "stablelm": {},
    "phi": {"hidden_act": "gelu_new"},
}


def dense_model(backbone="llama", **text):
    torch.manual_seed(0)
    config = tiny_config(
        text_config=tiny_text_config(model_type=backbone, **{**BACKBONES[backbone], **text}),
        text_sparsity=None,
        audio_config=None,
        audio_connector_config=None,
        speech_config=None,
        speech_connector_config=None,
    )
    return UniMoEForConditionalGeneration(config).eval()


def answer(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    side = config.vision_config.image_size
    ids = [5, *[config.image_token_id] * config.num_image_tokens, 7, 8, 9]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), pixel_values=torch.randn(1, 3, side, side, generator=generator)
        ).logits


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_part_is_copied_exactly(backbone, tmp_path):
    model = dense_model(backbone)
    expected = answer(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    upcycle(model, text={"layers": "even", **COUNTS}, vision={"layers": "all", **COUNTS}, connector=COUNTS)
    torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-5)
    first = dense["model.vision_connector.layers.0.weight"]
    for expert in model.model.vision_connector.experts.up_proj:
        assert torch.equal(expert, first)
    state = model.state_dict()
    for layer in (0, 2):
        down = {"phi": "fc2"}.get(backbone, "down_proj")
        copy = dense[f"model.language_model.layers.{layer}.mlp.{down}.weight"]
        assert all(torch.equal(e, copy) for e in state[f"model.language_model.layers.{layer}.mlp.experts.down_proj"])
        assert state[f"model.language_model.layers.{layer}.mlp.gate.weight"].std() > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.text_sparsity.layers == "even"
    torch.testing.assert_close(answer(loaded), answer(model))


def test_recorded_start_of_cumos_third_stage(golden, tmp_path):
    """Every tensor but the routers, which are drawn at random."""
    from safetensors.torch import load_file

    folder = golden("cumo")
    stage_2 = next(path for path in folder.iterdir() if path.name.endswith("-pft"))
    tower = next((folder / "openai").iterdir())
    args = ["convert", "cumo", "--checkpoint", str(stage_2), "--vision-tower", str(tower), "--dtype", "float32"]
    assert main([*args, "--output", str(tmp_path / "dense")]) == 0
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense")
    recorded = load_file(folder / "upcycled_stage3_init.safetensors")
    count = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in recorded if ".experts." in name)
    sparsity = {"num_experts": count, "top_k": 2}
    upcycle(model, vision={"layers": "all", **sparsity}, connector=sparsity)
    state = model.state_dict()
    for name, value in recorded.items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "mm_projector.", "vision_connector."
        )
        if name.endswith("gate.weight"):
            continue
        if ".experts." not in name:
            assert torch.equal(state[name], value), name
            continue
        prefix, expert = name.split(".experts.")
        index, layer, kind = expert.split(".")
        prefix += ".mlp" if "vision_tower" in prefix else ""
        target = f"{'up' if layer in ('0', 'fc1') else 'down'}_proj{'_bias' if kind == 'bias' else ''}"
        assert torch.equal(state[f"{prefix}.experts.{target}"][int(index)], value), name


def test_command(tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    model = dense_model()
    model.save_pretrained(dense)
    args = [
        "upcycle",
        str(dense),
        "--output",
        str(sparse),
        "--parts",
        "text",
        "vision",
        "connector",
        "--num-experts",
        "3",
    ]
    assert main([*args, "--layers", "0,2"]) == 0
    loaded = AutoModelForMultimodalLM.from_pretrained(sparse).eval()
    assert loaded.config.text_sparsity.layers == [0, 2]
    assert loaded.config.vision_sparsity.num_experts == loaded.config.vision_connector_config.sparsity.num_experts == 3
    torch.testing.assert_close(answer(loaded), answer(model), rtol=1e-4, atol=1e-5)
    assert main(args) == 1, "the output exists already"


def test_command_with_experts_of_their_own(tmp_path, capsys):
    """Uni-MoE's way: expert e is the FFN of the e-th checkpoint."""
    folders = []
    for i in range(2):
        model = dense_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".language_model." in name and ".mlp." in name:
                    parameter.mul_(1 + i)
        folders.append(tmp_path / f"dense{i}")
        model.save_pretrained(folders[-1])
    args = ["upcycle", str(folders[0]), "--output", str(tmp_path / "sparse")]
    assert main([*args, "--expert", str(folders[0]), "--expert", str(folders[1])]) == 0
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "sparse")
    experts = loaded.model.language_model.layers[0].mlp.experts
    torch.testing.assert_close(experts.down_proj[1], 2 * experts.down_proj[0])


@pytest.fixture
def dense_folder(tmp_path):
    dense_model().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("way", ["same", "dotted", "link"])
def test_command_leaves_its_inputs_alone(way, dense_folder, tmp_path, capsys):
    (tmp_path / "link").symlink_to(dense_folder)
    output = {"same": dense_folder, "dotted": tmp_path / "link" / ".." / "dense", "link": tmp_path / "link"}[way]
    before = {path: path.read_bytes() for path in dense_folder.iterdir()}
    assert main(["upcycle", str(dense_folder), "--output", str(output), "--overwrite"]) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in dense_folder.iterdir()} == before


def test_command_does_not_overwrite_an_experts_checkpoint(dense_folder, tmp_path, capsys):
    dense_model().save_pretrained(tmp_path / "expert")
    args = ["upcycle", str(dense_folder), "--output", str(tmp_path / "expert"), "--overwrite"]
    assert main([*args, "--expert", str(dense_folder), "--expert", str(tmp_path / "expert")]) == 1
    assert "choose another --output" in capsys.readouterr().err


def test_command_refuses_two_numbers_of_experts(dense_folder, tmp_path, capsys):
    args = ["upcycle", str(dense_folder), *["--expert", str(dense_folder)] * 3]
    assert main([*args, "--output", str(tmp_path / "no"), "--num-experts", "8"]) == 1
    error = capsys.readouterr().err
    assert "--num-experts 8: --expert is given 3 times" in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()
    assert main([*args, "--output", str(tmp_path / "yes"), "--num-experts", "3"]) == 0
    # Beside other parts the number is theirs.
    parts = ["--parts", "text", "connector", "--num-experts", "2"]
    assert main([*args, "--output", str(tmp_path / "both"), *parts]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "both")
    assert (config.text_sparsity.num_experts, config.vision_connector_config.sparsity.num_experts) == (3, 2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "name a part"),
        ({"text": {"num_experts": 4, "norm_topk_prob": False}}, "norm_topk_prob"),
        ({"text": {"layers": [9]}}, "9"),
        (
            {"text": {"num_expert": 8, "router_aux_loss_coeff": 0.5}},
            "text: .* num_expert, router_aux_loss_coeff; known are .*num_experts",
        ),
        ({"vision": {1: 2}}, "vision: unknown fields 1;"),
        ({"text": "all"}, "text must be a UniMoESparsityConfig or a mapping .* got 'all'"),
        ({"vision": [1]}, r"vision must be a UniMoESparsityConfig or a mapping .* got \[1\]"),
        ({"connector": SiglipVisionConfig()}, "connector must be a UniMoESparsityConfig"),
        ({"text": {"num_experts": "8"}}, "text: .*'num_experts' expected int, got str"),
        ({"text": {"top_k": 9}}, "text: `top_k`"),
    ],
)
def test_refusals(arguments, words):
    model = dense_model()
    with pytest.raises(ValueError, match=words):
        upcycle(model, **arguments)
    assert model.config.text_sparsity is None


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"vision": {"layers": [7]}}, "vision: .*holds 7"),
        ({"connector": {"num_experts": [4, 4]}}, "connector: num_experts must be a positive integer"),
        ({"vision": {"layers": "all", "num_experts": [4]}}, "vision: num_experts has 1 entries"),
    ],
)
def test_a_part_that_is_refused_leaves_the_others_dense(bad, words):
    """So that the corrected call is not told that they are sparse already."""
    model = dense_model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        upcycle(model, text={}, **bad)
    assert {name: type(module) for name, module in model.named_modules()} == before
    upcycle(model, text={}, **dict.fromkeys(bad, COUNTS))


def test_a_quantised_part_is_refused_before_any_other_is_changed():
    model = dense_model()
    layer = model.model.vision_tower.encoder.layers[1]
    layer.mlp.fc1 = type("Linear8bitLt", (torch.nn.Linear,), {})(8, 8)
    with pytest.raises(ValueError, match="vision: layer 1 .*Linear8bitLt"):
        upcycle(model, text={}, vision={})
    assert model.config.text_sparsity is None


def test_the_settings_of_another_model_serve_as_they_were_saved():
    saved = UniMoESparsityConfig(layers="odd", num_experts=3, eval_capacity_factor=2.0)
    for settings in (saved, saved.to_dict()):
        block = upcycle(dense_model(), text=settings).model.language_model.layers[1].mlp
        assert block.gate.num_experts == 3 and block.options == {"eval_capacity_factor": 2.0}


def test_a_sparse_part_is_refused():
    model = upcycle(dense_model(), connector=COUNTS)
    with pytest.raises(ValueError, match="sparse already"):
        upcycle(model, connector=COUNTS)


def stock_llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def stock_siglip():
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


@pytest.mark.parametrize("build", [stock_llama, stock_siglip])
def test_stock_models_are_trained_saved_and_loaded(build, tmp_path):
    """The block is a drop-in: a plain model with it learns, and comes back from disk."""
    torch.manual_seed(0)
    model = sparsify(build(), "all", 4, 2).train()
    is_text = isinstance(model, LlamaForCausalLM)
    inputs = {"input_ids": torch.arange(12).unsqueeze(0)} if is_text else {"pixel_values": torch.randn(2, 3, 16, 16)}

    def loss():
        if is_text:
            return model(**inputs, labels=inputs["input_ids"]).loss
        return (model(**inputs).last_hidden_state - 1).square().mean()

    routers = [layer for layer in model.modules() if hasattr(layer, "experts")]
    start = [block.gate.weight.clone() for block in routers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first
    assert not any(torch.equal(block.gate.weight, before) for block, before in zip(routers, start))
    model.eval().save_pretrained(tmp_path)
    loaded = load_sparsified(str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0])
