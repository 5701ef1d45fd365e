"""`AnyToTextPipeline.save_pretrained`: its folder loads with the package, as remote code, and when it is saved again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForMultimodalLM, TextGenerationPipeline, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import unimoe

PROMPT = "USER: <image>\nwhat colour is it? ASSISTANT:"
# Run where `import unimoe` fails as if the package were not installed.
LOAD_AND_SAVE = """
import json, sys
sys.modules["unimoe"] = None
folder, again, image = sys.argv[1:]
from PIL import Image
from transformers import pipeline
pipe = pipeline("any-to-text", model=folder, device="cpu", trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe)
pipe.save_pretrained(again)
print(json.dumps(pipe(text=sys.stdin.read(), images=Image.open(image), max_new_tokens=4)[0]["generated_text"]))
"""


@pytest.fixture(scope="module")
def pipe():
    return pipeline("any-to-text", model=unimoe.tiny_checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "red.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "made" / "folder"
    pipe.save_pretrained(folder)
    return folder


def answer(pipe, image):
    return pipe(text=PROMPT, images=str(image), max_new_tokens=4)[0]["generated_text"]


def load_and_save(folder: Path, again: Path, image: Path, cache: Path) -> str:
    """What the folder's pipeline answers as remote code in a process of its own, which also saves it as `again`."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD_AND_SAVE, folder, again, image],
        input=PROMPT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_that_of_model_and_processor(pipe, saved, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    assert contents(saved) == contents(tmp_path)
    assert {"pipeline_unimoe.py", "modeling_unimoe.py", "processor_config.json"} <= contents(saved).keys()


def test_with_the_package(pipe, saved, image, tmp_path):
    expected = answer(pipe, image)
    assert expected == f"{PROMPT} red"
    loaded = pipeline("any-to-text", model=str(saved), device="cpu")
    assert type(loaded) is unimoe.AnyToTextPipeline
    assert answer(loaded, image) == expected
    loaded.save_pretrained(str(tmp_path), max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert answer(pipeline("any-to-text", model=str(tmp_path), device="cpu"), image) == expected


def test_as_remote_code_and_saved_again(pipe, saved, image, tmp_path):
    second, third, fourth = (tmp_path / name for name in ("second", "third", "fourth"))
    expected = answer(pipe, image)
    assert load_and_save(saved, second, image, tmp_path / "cache") == expected
    assert load_and_save(second, third, image, tmp_path / "cache") == expected
    with_package = pipeline("any-to-text", model=str(third), device="cpu")
    assert answer(with_package, image) == expected
    with_package.save_pretrained(fourth)
    for again in (second, third):
        assert contents(again) == contents(saved), again.name
    assert contents(fourth).keys() == contents(saved).keys()


def test_a_file_is_refused(pipe, image):
    with pytest.raises(ValueError, match="red.png.* is a file; give a folder"):
        pipe.save_pretrained(image)


def test_other_processes_than_the_main_one_write_nothing(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_push_to_hub_uploads_all_at_once(pipe, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        unimoe.AnyToTextPipeline, "push_to_hub", lambda self, *args, **kwargs: calls.append((args, kwargs))
    )
    pipe.save_pretrained(tmp_path / "name", push_to_hub=True)
    pipe.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/mine", token="t", max_shard_size="1GB")
    pipe.save_pretrained(tmp_path / "name", repo_id="me/mine")
    assert calls == [(("name",), {}), (("me/mine",), {"token": "t", "max_shard_size": "1GB"})]


class OwnPipeline(TextGenerationPipeline):
    pass


def test_a_pipeline_of_ones_own_is_saved_with_the_model(pipe, tmp_path):
    PIPELINE_REGISTRY.register_pipeline(
        "own-task", pipeline_class=OwnPipeline, pt_model=(AutoModelForMultimodalLM,), type="text"
    )
    model = AutoModelForMultimodalLM.from_pretrained(unimoe.tiny_checkpoint())
    try:
        OwnPipeline(model, tokenizer=pipe.tokenizer, device="cpu").save_pretrained(tmp_path)
    finally:
        del PIPELINE_REGISTRY.supported_tasks["own-task"]
    own = {"impl": f"{Path(__file__).stem}.OwnPipeline", "pt": ["AutoModelForMultimodalLM"], "type": "text"}
    ours = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert ours.pop("own-task").items() >= own.items()
    assert ours == pipe.model.config.to_dict()["custom_pipelines"]
    config = unimoe.UniMoEConfig.from_pretrained(tmp_path)
    assert list(config.custom_pipelines) == ["own-task"], "the package has registered the other one"
    config.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
