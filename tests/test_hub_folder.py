"""Folders written by `save_pretrained` load with the package, and as remote code where it is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import unimoe
from unimoe import UniMoEForConditionalGeneration

sys.path.append(str(Path(__file__).parent / "processing"))
from tiny_processor import image, sound, tiny_config_for, tiny_processor  # noqa: E402

AUTO_CLASSES = {
    "AutoConfig": "UniMoEConfig",
    "AutoModel": "UniMoEModel",
    "AutoModelForMultimodalLM": "UniMoEForConditionalGeneration",
    "AutoModelForImageTextToText": "UniMoEForConditionalGeneration",
    "AutoModelForCausalLM": "UniMoEForConditionalGeneration",
    "AutoProcessor": "UniMoEProcessor",
}

# Run where `import unimoe` fails as if the package were not installed.
REMOTE = """
import json, sys
sys.modules["unimoe"] = None
import numpy as np, torch, transformers
from PIL import Image
from transformers import pipeline
folder, again, found = sys.argv[1], sys.argv[2], {}
for name in json.loads(sys.argv[3]):
    loaded = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    found[name] = type(loaded).__name__
    assert type(loaded).__module__.startswith("transformers_modules"), type(loaded)
model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.open(sys.argv[4])
samples = np.load(sys.argv[5])
text = "USER: <image>\\n<audio>\\n<speech>\\nwhat ASSISTANT:"
media = dict(images=image, audio=samples, speech=samples, sampling_rate=16000)
inputs = processor(text=text, return_tensors="pt", **media)
with torch.no_grad():
    found["logits"] = model(**inputs).logits[0, -1].tolist()
model.save_pretrained(again)
processor.save_pretrained(again)
pipe = pipeline("any-to-text", model=folder, trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe)
found["answer"] = pipe(text=text, max_new_tokens=4, **media)[0]["generated_text"]
assert pipeline(model=folder, trust_remote_code=True).task == "any-to-text"
found["at hand"] = pipeline("any-to-text", model=model, processor=processor)(text=text, max_new_tokens=4, **media)
found["at hand"] = found["at hand"][0]["generated_text"]
print(json.dumps(found))
"""

WITH_PACKAGE = """
import json, sys
import numpy as np
from PIL import Image
import unimoe
from transformers import pipeline
pipe = pipeline("any-to-text", model=sys.argv[1])
assert type(pipe) is unimoe.AnyToTextPipeline
samples = np.load(sys.argv[3])
media = dict(images=Image.open(sys.argv[2]), audio=samples, speech=samples, sampling_rate=16000)
text = "USER: <image>\\n<audio>\\n<speech>\\nwhat ASSISTANT:"
print(json.dumps(pipe(text=text, max_new_tokens=4, **media)[0]["generated_text"]))
"""


def run(program: str, *args: object, cache: Path) -> dict | str:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with model and processor, and media for it."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    processor = tiny_processor()
    model = UniMoEForConditionalGeneration(tiny_config_for(processor)).eval()
    model.save_pretrained(root / "folder")
    processor.save_pretrained(root / "folder")
    image().save(root / "image.png")
    import numpy

    numpy.save(root / "sound.npy", sound())
    inputs = processor(
        text="USER: <image>\n<audio>\n<speech>\nwhat ASSISTANT:",
        images=image(),
        audio=sound(),
        speech=sound(),
        sampling_rate=16000,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return root, logits


def test_without_the_package_and_saved_again(saved, tmp_path):
    root, logits = saved
    media = (root / "image.png", root / "sound.npy")
    names = json.dumps(list(AUTO_CLASSES))
    first = run(REMOTE, root / "folder", tmp_path / "second", names, *media, cache=tmp_path / "cache")
    assert {name: first[name] for name in AUTO_CLASSES} == AUTO_CLASSES
    torch.testing.assert_close(torch.tensor(first["logits"]), logits, rtol=0, atol=1e-5)

    assert first["at hand"] == first["answer"], "a pipeline of a model and a processor that are loaded already"

    second = run(REMOTE, tmp_path / "second", tmp_path / "third", names, *media, cache=tmp_path / "cache")
    assert second == first, "what was loaded as remote code and saved again answers the same, as remote code"
    answer = run(WITH_PACKAGE, tmp_path / "third", *media, cache=tmp_path / "cache")
    assert answer == first["answer"]
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        original = (root / "folder" / name).read_text()
        assert (tmp_path / "third" / name).read_text() == original, name
    assert config_of(tmp_path / "third") == config_of(root / "folder")
    assert code_files(tmp_path / "third") == code_files(root / "folder")


def config_of(folder: Path) -> dict:
    """The saved configuration without the dtypes, which only a loaded model knows of its parts."""

    def without_dtype(value):
        if isinstance(value, dict):
            return {name: without_dtype(part) for name, part in value.items() if name != "dtype"}
        return value

    return without_dtype(json.loads((folder / "config.json").read_text()))


def code_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_with_the_package_the_pipeline_needs_no_trust(saved, tmp_path):
    root, _ = saved
    run(WITH_PACKAGE, root / "folder", root / "image.png", root / "sound.npy", cache=tmp_path)


def test_registering_again_changes_nothing_and_says_nothing():
    before = PIPELINE_REGISTRY.check_task("any-to-text")
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        unimoe.register()
    assert log.out == "" and PIPELINE_REGISTRY.check_task("any-to-text") == before


def test_no_code_runs_without_trust(saved, tmp_path):
    root, _ = saved
    program = 'import sys; sys.modules["unimoe"] = None\n' + (
        "from transformers import AutoModelForMultimodalLM\n"
        "try:\n    AutoModelForMultimodalLM.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "except ValueError as error:\n    assert 'trust_remote_code' in str(error)\n"
        "    print('\"refused\"')\n"
    )
    assert run(program, root / "folder", cache=tmp_path) == "refused"


def test_the_folder_holds_every_file_that_the_code_imports(saved):
    import re

    files = code_files(saved[0] / "folder")
    assert {"configuration_unimoe.py", "modeling_unimoe.py", "processing_unimoe.py", "pipeline_unimoe.py"} <= set(
        files
    )
    for name, source in files.items():
        for imported in re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE):
            assert f"{imported}.py" in files, f"{name} imports {imported}"
        assert "import unimoe" not in source and "from unimoe" not in source
