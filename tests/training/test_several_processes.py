"""Training in two real processes over gloo gives what one process gives with the same samples in a step."""

import json
import os
import shutil
import subprocess
import sys
import time

import process_jobs
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from several_processes import run
from tiny_models import tiny_inputs
from training_records import RECORDS, turn

from unimoe import UniMoEForConditionalGeneration
from unimoe.cli import main
from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConnectorConfig, UniMoESparsityConfig

TRAINER = {
    "use_cpu": True,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "save_steps": 3,
}
LORA = {"r": 2, "alpha": 4, "routers": True}
TEXTS = [{"conversations": turn("what" * i, "is the" * i)} for i in range(1, 6)]
LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5}
# Fields of the recipe; its `trainer` is added to the above.
DDP = {
    "all_weights": {"train": ["all"]},
    "accumulated": {"train": ["all"], "trainer": {"gradient_accumulation_steps": 2}},
    # Balancing losses of whole batches, in which processes have unlike parts.
    "batch_scope": {"train": ["all"], "model": "batch_scope", "sampling": "none"},
    "batch_scope_accumulated": {
        "train": ["all"],
        "model": "batch_scope",
        "sampling": "none",
        "trainer": {"gradient_accumulation_steps": 2},
    },
    # Losses of a sparse tower and connector; a process may have no image.
    "media_losses": {
        "train": ["all"],
        "model": "media_losses",
        "sampling": "none",
        "trainer": {"gradient_accumulation_steps": 2},
    },
    "adapter": {"lora": LORA, "trainer": {"optim": "adamw_torch", "learning_rate": 1e-3}},
    # Processes with different towers, and one whose loss has no gradient.
    "mixed": {
        "train": ["connectors"],
        "sampling": "none",
        "trainer": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    },
    "nothing_trained": {"train": ["connectors"], "data": "texts"},
}
FSDP = {
    "all_weights": {"fsdp": True},
    # Fewer pieces to gather: towers are not sharded layer by layer.
    "adapter": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
}
SHARDED_WHEN_LOADED = {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, media_folder, make_model, processor):
    """A folder with a model that has router losses, and data."""
    folder = tmp_path_factory.mktemp("several")
    for file in media_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "mixed.json").write_text(json.dumps(RECORDS + TEXTS))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    sparse = UniMoESparsityConfig(num_experts=2, top_k=1, router_loss_scope="sample", **LOSSES)
    connector = UniMoEConnectorConfig(type="mlp", sparsity=sparse)
    media = {"vision_sparsity": sparse, "vision_connector_config": connector}
    for name, scope, parts in (
        ("base", "sample", {}),
        ("batch_scope", "batch", {}),
        ("media_losses", "sample", media),
    ):
        config = make_model(**parts).config
        config.text_sparsity = UniMoESparsityConfig(layers="even", router_loss_scope=scope, **LOSSES)
        torch.manual_seed(0)
        UniMoEForConditionalGeneration(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def write(workplace):
    """A function that writes a recipe whose output is `<workplace>/<name>`."""

    def write_recipe(name, batch_size, data="mixed", model="base", trainer=None, **fields):
        content = {
            "model": str(workplace / model),
            "data": str(workplace / f"{data}.json"),
            "output": str(workplace / name),
            **fields,
            "trainer": {**TRAINER, "per_device_train_batch_size": batch_size, **(trainer or {})},
        }
        file = workplace / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write_recipe


@pytest.fixture(scope="module")
def by_one(write, workplace):
    """A function from a case to the folder of its run in one process; each runs once."""
    done = {}

    def train(case, **fields):
        if case not in done:
            process_jobs.train([write(f"one_{case}", 2, **fields)])
            done[case] = workplace / f"one_{case}"
        return done[case]

    return train


def weights(run_folder):
    return load_file(run_folder / "model" / "model.safetensors")


def history(run_folder, step=3):
    state = json.loads((run_folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [{name: value for name, value in entry.items() if name != "epoch"} for entry in state["log_history"]]


def assert_same_weights(found, expected, base):
    found, expected, before = weights(found), weights(expected), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    return {name for name in expected if not torch.equal(expected[name], before[name])}


def assert_same_logs(found, expected):
    for one, other in zip(history(found), history(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def ddp(write, workplace):
    run(process_jobs.train, [write(f"ddp_{case}", 1, **fields) for case, fields in DDP.items()])
    return workplace


@pytest.mark.parametrize("case", DDP)
def test_ddp(ddp, by_one, case):
    expected = by_one(case, **DDP[case])
    changed = assert_same_weights(ddp / f"ddp_{case}", expected, ddp / DDP[case].get("model", "base"))
    assert bool(changed) == (case != "nothing_trained")
    # Losses, norms of gradients, and the expert load of all processes together.
    assert_same_logs(ddp / f"ddp_{case}", expected)


@pytest.fixture(scope="module")
def fsdp(write, workplace):
    recipes = []
    for case, sharded in FSDP.items():
        fields = {**DDP[case], "trainer": {**DDP[case].get("trainer", {}), **sharded}}
        recipes.append(write(f"fsdp_{case}", 1, **fields))
    run(process_jobs.train_with_fsdp, recipes)
    return workplace


@pytest.mark.parametrize("case", FSDP)
def test_fsdp(fsdp, by_one, case):
    expected = by_one(case, **DDP[case])
    assert_same_weights(fsdp / f"fsdp_{case}", expected, fsdp / "base")
    assert_same_logs(fsdp / f"fsdp_{case}", expected)
    assert (fsdp / f"fsdp_{case}" / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()
    # Sharding replaces the model's class; the saved code is still the model's.
    assert (fsdp / f"fsdp_{case}" / "model" / "modeling_unimoe.py").is_file()
    config = json.loads((fsdp / f"fsdp_{case}" / "model" / "config.json").read_text())
    assert "FSDP" not in json.dumps(config["auto_map"])


@pytest.mark.parametrize("distributed", SHARDED_WHEN_LOADED, ids=lambda fields: "+".join(fields))
def test_weights_sharded_when_loaded(write, workplace, by_one, distributed):
    """FSDP2 and expert parallelism as Transformers does them."""
    name, fields = "+".join(distributed), DDP["all_weights"]
    run(process_jobs.train, [write(name, 1, distributed=distributed, **fields)])
    assert_same_weights(workplace / name, by_one("all_weights", **fields), workplace / "base")
    assert (workplace / name / "model" / "modeling_unimoe.py").is_file()


def test_expert_parallelism_of_one_batch(workplace, tmp_path):
    """The processes share a batch and have half of the experts each; the attention is shared out too."""
    model = UniMoEForConditionalGeneration.from_pretrained(workplace / "base").train()
    inputs = tiny_inputs(model.config)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] > 90, -100)
    save_file(inputs, tmp_path / "inputs.safetensors")
    save_file(process_jobs.step(model, inputs, 0.1), tmp_path / "outputs.safetensors")
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    arguments = (str(workplace / "base"), str(tmp_path / "inputs.safetensors"), str(tmp_path), 0.1)
    run(process_jobs.check_expert_parallel, *arguments)


def test_an_epoch_has_one_mix_a_step_and_all_records(workplace, tmp_path):
    run(process_jobs.check_epoch, str(workplace / "base"), str(workplace / "mixed.json"), str(tmp_path))


def torchrun(log, recipe, *options):
    """`unimoe train` in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(log, "w") as file:
        return subprocess.Popen(
            [*command, "-m", "unimoe", "train", recipe, *options],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill(process):
    """kill -9 of a launcher and of all that it has launched."""
    try:
        launcher = psutil.Process(process.pid)
        for one in [launcher, *launcher.children(recursive=True)]:
            one.kill()
    except psutil.NoSuchProcess:
        pass
    process.wait()


def test_killed_and_resumed_by_two_and_by_one(write, workplace, tmp_path):
    """kill -9 of all processes in the second epoch; two go on to the same bits, and one to the same weights."""
    trainer = {
        "max_steps": 16,
        "save_steps": 2,
        "save_total_limit": 100,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    fields = {"lora": LORA}
    run(process_jobs.train, [write("uninterrupted", 1, trainer=trainer, **fields)])
    recipe, killed = write("killed", 1, trainer=trainer, **fields), workplace / "killed"
    log = tmp_path / "log.txt"
    process = torchrun(log, recipe)
    try:
        end = time.monotonic() + 300
        while not (killed / "checkpoint-8").is_dir():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.002)
    finally:
        kill(process)
    assert not (killed / "model").exists()
    shutil.copytree(killed, workplace / "killed_one")
    process = torchrun(log, recipe, "--resume")
    try:
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        kill(process)
    assert log.read_text().count("done: ") == 1
    expected, found = weights(workplace / "uninterrupted"), weights(killed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # As many samples in a step, now all in one process.
    assert main(["train", write("killed_one", 2, trainer=trainer, **fields), "--resume"]) == 0
    torch.testing.assert_close(weights(workplace / "killed_one"), expected, atol=1e-5, rtol=0)


def test_sharded_run_is_resumed(write, workplace):
    settings = {**FSDP["adapter"]["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    sharded = {"fsdp": True, "fsdp_config": settings, "save_steps": 1, "save_total_limit": 100}
    whole, cut = (write(name, 1, train=["all"], trainer=sharded) for name in ("fsdp_whole", "fsdp_cut"))
    run(process_jobs.train_with_fsdp, [whole, cut])
    for folder in (workplace / "fsdp_cut").glob("checkpoint-[23]"):
        shutil.rmtree(folder)
    shutil.rmtree(workplace / "fsdp_cut" / "model")
    run(process_jobs.train_with_fsdp, [cut], True)
    expected, found = (weights(workplace / name) for name in ("fsdp_whole", "fsdp_cut"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"distributed": {"fsdp_size": 2}}, "made for 2 processes, but this run has 1"),
        ({"distributed": {"fsdp_size": 2}, "sampling": "none"}, "same towers"),
        ({"distributed": {"speed": 2}}, "speed"),
        ({"distributed": {"fsdp_size": 2}, "train": [], "lora": LORA}, "adapters do not fit"),
    ],
)
def test_refusals(write, capsys, fields, words):
    assert main(["train", write("refused", 1, **{"train": ["all"], **fields})]) == 1
    assert words in capsys.readouterr().err


def test_fsdp_on_cpu_is_refused(write):
    recipe = write("fsdp_on_cpu", 1, train=["all"], trainer={"fsdp": True})
    with pytest.raises(AssertionError, match="distributed: {fsdp_size: 2}"):
        run(process_jobs.train, [recipe])
