"""The stages through `unimoe train`, each fed by the one before; refusals; kill and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_records import RECORDS, turn
from transformers import LlamaConfig
from transformers.integrations import integration_utils

from unimoe import UniMoEForConditionalGeneration
from unimoe.cli import main
from unimoe.modeling_unimoe.configuration_unimoe import LAYER_PATTERNS
from unimoe.training.parts import part_of
from unimoe.training.recipe import Recipe
from unimoe.training.stages import last_whole_checkpoint

TRAINER = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": "1e-2",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "save_steps": 1,
}


@pytest.fixture
def write_recipe(tmp_path):
    """A function that writes a recipe with its output under `tmp_path`; returns the file."""

    def write(name, **fields):
        content = {"output": str(tmp_path / name), **fields, "trainer": {**TRAINER, **fields.get("trainer", {})}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


def changed_parts(before, after):
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {part_of(name) for name in old if not torch.equal(old[name], new[name])}


CONNECTORS = {"vision_connector", "audio_connector", "speech_connector"}


def test_three_stages(model_folder, data_file, write_recipe, tmp_path, capsys):
    base, data = str(model_folder("dense", text_sparsity=None)), str(data_file())
    assert (
        main(["train", write_recipe("one", model=base, data=data, train=["connectors"], trainer={"max_steps": 5})])
        == 0
    )
    printed = capsys.readouterr().out
    assert "attention                      9,216          frozen" in printed and "memory without" in printed
    stage1 = tmp_path / "one" / "model"
    # A connector is trained by the data that goes through it.
    assert changed_parts(base, stage1) <= CONNECTORS and len(changed_parts(base, stage1)) >= 1

    lora = {"r": 4, "alpha": 4, "attention": False, "connectors": False}
    for name in ("two_a", "two_b"):
        fields = {"model": str(stage1), "data": data, "lora": lora, "trainer": {"seed": len(name) + ord(name[-1])}}
        assert main(["train", write_recipe(name, **fields)]) == 0
        assert changed_parts(stage1, tmp_path / name / "model") == {"ffn"}
    full = {"model": str(stage1), "data": data, "train": ["ffn", "audio_connector"]}
    assert main(["train", write_recipe("two_c", **full)]) == 0
    assert "ffn" in changed_parts(stage1, tmp_path / "two_c" / "model")

    tuned = [str(tmp_path / name / "model") for name in ("two_a", "two_b", "two_c")]
    experts = {"from": tuned, "layers": "even", "top_k": 2, "connectors": {"audio_connector": tuned[2]}}
    lora = {"r": 4, "alpha": 8, "routers": True}
    assert main(["train", write_recipe("three", model=str(stage1), data=data, experts=experts, lora=lora)]) == 0
    assembled = load_file(tmp_path / "three" / "assembled" / "model.safetensors")
    for expert, folder in enumerate(tuned):
        dense = load_file(Path(folder) / "model.safetensors")
        prefix = "model.language_model.layers.2.mlp."
        assert torch.equal(assembled[f"{prefix}experts.down_proj"][expert], dense[f"{prefix}down_proj.weight"])
    changed = changed_parts(tmp_path / "three" / "assembled", tmp_path / "three" / "model")
    assert (
        {"attention", "experts", "routers", "ffn"}
        <= changed
        <= {"attention", "experts", "routers", "ffn"} | CONNECTORS
    )
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "three" / "model")
    assert model.config.text_sparsity.num_experts == 3 and model.config.text_sparsity.router_aux_loss_coef == 0
    assert (tmp_path / "three" / "adapter" / "adapter_config.json").is_file()


def test_moe_tuning_of_moe_llava(model_folder, data_file, write_recipe, tmp_path):
    experts = {"copies": 4, "layers": "even", "top_k": 2, "router_aux_loss_coef": 0.01, "router_dtype": "float32"}
    fields = {"experts": experts, "train": ["experts", "routers", "ffn"], "trainer": {"max_steps": 1}}
    base = str(model_folder("dense", text_sparsity=None))
    assert main(["train", write_recipe("tuning", model=base, data=str(data_file()), **fields)]) == 0
    folder = tmp_path / "tuning"
    assert changed_parts(folder / "assembled", folder / "model") == {"experts", "routers", "ffn"}
    state = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
    assert any(key.startswith("expert_load/") for key in state["log_history"][0])


def test_third_stage_of_cumo(model_folder, data_file, write_recipe, tmp_path):
    experts = {"num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    sparse = {"vision": {**experts, "layers": "all", "router_loss_scope": "sample"}, "connector": experts}
    base, data = str(model_folder("dense", text_sparsity=None)), str(data_file())
    fields = {"model": base, "data": data, "upcycle": sparse, "train": ["all"], "trainer": {"max_steps": 5}}
    assert main(["train", write_recipe("cumo", **fields)]) == 0
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "cumo" / "model")
    assert model.config.vision_sparsity.num_experts == model.config.vision_connector_config.sparsity.num_experts == 4
    changed = changed_parts(tmp_path / "cumo" / "assembled", tmp_path / "cumo" / "model")
    assert {"vision_tower", "vision_connector", "attention", "ffn"} <= changed


def test_refusals(model_folder, data_file, write_recipe, tmp_path, capsys, monkeypatch):
    dense, sparse = str(model_folder("dense", text_sparsity=None)), str(model_folder("sparse"))
    data, empty = str(data_file()), str(data_file([], "empty.json"))
    good = {"model": dense, "data": data, "train": ["connectors"], "trainer": {"max_steps": 1}}
    assert main(["train", write_recipe("done", **good)]) == 0
    capsys.readouterr()
    # Whether it is installed or not.
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    cut, other = tmp_path / "cut", tmp_path / "other"
    shutil.copytree(dense, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    LlamaConfig().save_pretrained(other)
    wrong = [
        ({**good, "model": "absent"}, [], "absent"),
        ({**good, "train": []}, [], "either 'train'"),
        ({**good, "train": ["hands"]}, [], "hands"),
        ({**good, "train": ["experts"]}, [], "no experts"),
        ({**good, "colour": 1}, [], "colour"),
        ({**good, "data": empty}, [], "no records"),
        ({**good, "trainer": {"speed": 1}}, [], "speed"),
        ({**good, "experts": {"copies": 4, "from": [dense]}}, [], "either 'from'"),
        ({**good, "upcycle": {"audio": {}}}, [], "'audio' is unknown"),
        ({**good, "experts": {"from": [dense, sparse]}}, [], "does not match the base"),
        ({**good, "model": sparse, "experts": {"copies": 4}}, [], "sparse already"),
        ({**good, "model": sparse, "experts": {"copies": 1}}, [], "at least two"),
        ({**good, "train": [], "lora": {"r": 0}}, [], "positive"),
        ({**good, "trainer": {"per_device_train_batch_size": 0}}, [], "batch_size"),
        ({**good, "trainer": {"eval_strategy": "steps"}}, [], "eval"),
        ({**good, "trainer": {"label_smoothing_factor": 0.1}}, [], "label_smoothing_factor"),
        ({**good, "trainer": {"report_to": "wandb"}}, [], "report_to: WandbCallback requires wandb"),
        ({**good, "trainer": {"log_level": "loud"}}, [], "'log_level' must be one of detail, debug"),
        ({**good, "trainer": {"accelerator_config": {"x": 1}}}, [], "unexpected keyword argument 'x'"),
        ({**good, "trainer": {"lr_scheduler_kwargs": {"x": 1}}}, [], "unexpected keyword argument 'x'"),
        ({**good, "max_length": 0}, [], "max_length"),
        ({**good, "model": str(other)}, [], "is a 'llama' checkpoint"),
        ({**good, "model": str(cut)}, [], "model.safetensors: not a whole safetensors file"),
        ({**good, "experts": {"from": [dense, str(cut)]}}, [], "model.safetensors: not a whole safetensors file"),
        ({**good, "output": str(tmp_path / "done")}, [], "--resume"),
        ({**good, "output": str(tmp_path / "done"), "max_length": 99}, ["--resume"], "max_length"),
        ({**good, "output": str(tmp_path)}, [], "not empty"),
    ]
    for number, (fields, options, words) in enumerate(wrong):
        assert main(["train", write_recipe(f"wrong{number}", **fields), *options]) == 1, words
        refusal = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unimoe train")]
        assert len(refusal) == 1 and words in refusal[0], (words, refusal)
        assert not list((tmp_path / f"wrong{number}").glob("*")), "a corrected recipe could not be run"


def test_schedules_with_options_of_their_own(model_folder, data_file, write_recipe):
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5e-3}}
    fields = {"model": str(model_folder("sparse")), "data": str(data_file()), "train": ["routers"]}
    assert main(["train", write_recipe("schedule", **fields, trainer={**schedule, "max_steps": 1})]) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_told_from_workers_too(model_folder, data_file, write_recipe, capsys, workers):
    file = data_file(RECORDS[:1])
    (file.parent / "image0.png").unlink()
    (file.parent / "image0.png").write_bytes(b"not an image")
    fields = {"model": str(model_folder("sparse")), "data": str(file), "train": ["routers"], "on_unreadable": "stop"}
    assert main(["train", write_recipe("broken", **fields, trainer={"dataloader_num_workers": workers})]) == 1
    assert "unimoe train: data.json[0]: images[0][0]" in capsys.readouterr().err


@pytest.mark.parametrize("parts, warns", [(["vision_connector", "audio_tower"], True), (["attention"], False)])
def test_data_that_trains_nothing_is_warned_of(model_folder, data_file, write_recipe, caplog, parts, warns):
    fields = {"model": str(model_folder("sparse")), "data": str(data_file([{"conversations": turn("a", "b")}]))}
    assert main(["train", write_recipe("text", **fields, train=parts, trainer={"max_steps": 1})]) == 0
    assert ("goes through vision_connector, audio_tower" in caplog.text) is warns


BASE = "{model: x, data: x, output: x, train: [all]}"
WRONG_TYPES = {
    "output: 2024": "'output' must be a text, found 2024",
    "data: [5]": "'data' must be a list, each of it a text, found [5]",
    "max_length: x": "'max_length' must be a whole number or nothing, found 'x'",
    "sampling: random": "'sampling' must be 'shuffled' or 'sorted' or 'none', found 'random'",
    "train: 3": "'train' must be a list",
    "lora: {r: eight}": "lora: 'r' must be a whole number, found 'eight'",
    "lora: {alpha: 0}": "lora: 'alpha' must be positive, found 0",
    "lora: {attention: 1}": "lora: 'attention' must be true or false, found 1",
    "experts: {copies: 2.5}": "experts: 'copies' must be a whole number",
    "experts: {from: dense}": "experts: 'from' must be a list, each of it a text, found 'dense'",
    "experts: {copies: 2, layers: 2}": "experts: 'layers' must be 'all' or 'even' or 'odd' or 'first_half' or 'second_half' or a",
    "experts: {copies: 2, connectors: [dense]}": "experts: 'connectors' must be a mapping",
    "experts: {copies: 2, router_loss_scope: x}": "experts: 'router_loss_scope' must be 'batch' or 'sample'",
    "experts: {copies: 2, router_aux_loss_coef: x}": "experts: 'router_aux_loss_coef' must be a number",
    "upcycle: {text: [1]}": "upcycle: 'text' must be a mapping of fields",
    "trainer: {learning_rate: abc}": "trainer: 'learning_rate' must be a number, found 'abc'",
    'trainer: {max_steps: "3"}': "trainer: 'max_steps' must be a whole number, found '3'",
    "trainer: {bf16: maybe}": "trainer: 'bf16' must be true or false",
    "distributed: {fsdp_size: x}": "distributed: 'fsdp_size' must be a whole number or nothing",
}


@pytest.mark.parametrize("layers", [*LAYER_PATTERNS, [0, 2]])
def test_every_choice_of_layers_is_a_recipe_s(layers):
    experts = {"copies": 2, "layers": layers}
    assert Recipe(model="x", data=["x"], output="x", train=["all"], experts=experts).experts == experts


@pytest.mark.parametrize("text", WRONG_TYPES)
def test_wrong_types_in_recipes(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**yaml.safe_load(BASE), **yaml.safe_load(text)}))
    with pytest.raises(ValueError, match=re.escape(WRONG_TYPES[text])):
        Recipe.read(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("text, words", [("- 1", "mapping"), ("a: [", "YAML"), ("model: x", "'data' is missing")])
def test_unusable_recipes(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        Recipe.read(tmp_path / "recipe.yaml")


def test_recipes_of_the_project_are_valid():
    files = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
    assert len(files) >= 7
    for file in files:
        Recipe.read(file)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, text in ((5, "{}"), (10, "{}"), (15, '{"log'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_whole_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_run_killed_while_it_claimed_its_output_is_begun_again(
    model_folder, data_file, write_recipe, tmp_path, options
):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "recipe.partial").write_text('{"da')
    fields = {"model": str(model_folder("sparse")), "data": str(data_file()), "train": ["routers"]}
    assert main(["train", write_recipe("killed", **fields, trainer={"max_steps": 1}), *options]) == 0
    assert not (tmp_path / "killed" / "recipe.partial").exists()


@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_finished_run_takes_no_step_when_it_is_resumed(model_folder, data_file, write_recipe, tmp_path, max_steps):
    """Within an epoch and at its end: a kill before the model was written must not cost or add a step."""
    records = [{"conversations": turn("what" * i, "is the" * i)} for i in range(1, 9)]
    trainer = {"max_steps": max_steps, "lr_scheduler_type": "constant", "save_steps": 2}
    fields = {"model": str(model_folder("sparse")), "data": str(data_file(records)), "train": ["language_model"]}
    recipe = write_recipe("run", **fields, trainer=trainer)
    assert main(["train", recipe]) == 0
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    assert main(["train", recipe, "--resume"]) == 0
    assert not (tmp_path / "run" / f"checkpoint-{max_steps + 1}").exists()
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_killed_and_resumed_equals_uninterrupted(model_folder, data_file, write_recipe, tmp_path):
    """kill -9 at some moment in the second epoch, then --resume: the same bits as without."""
    records = RECORDS + [{"conversations": turn("what" * i, "is the" * i)} for i in range(1, 4)]
    fields = {
        "model": str(model_folder("sparse")),
        "data": str(data_file(records)),
        "lora": {"r": 2, "alpha": 4, "routers": True},
        "trainer": {
            "max_steps": 14,
            "gradient_accumulation_steps": 2,
            "save_steps": 2,
            "per_device_train_batch_size": 1,
        },
    }
    assert main(["train", write_recipe("whole", **fields)]) == 0
    recipe = write_recipe("killed", **fields)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "unimoe", "train", recipe]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-6").is_dir():
        time.sleep(0.005)
    assert process.poll() is None, "finished before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert main(["train", recipe, "--resume"]) == 0
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
