"""What the pages say: code that runs as printed, links that lead somewhere, and lists of options and fields that are whole."""

import argparse
import dataclasses
import inspect
import json
import re
import shlex
import shutil
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from runpy import run_path

import pytest
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

import unimoe
from unimoe import UniMoEForConditionalGeneration
from unimoe.cli import build_parser, main
from unimoe.processing.call_options import CallOptions
from unimoe.training.parts import PARTS
from unimoe.training.recipe import Recipe
from unimoe.training.recipe_fields import EXPERTS, LORA, UPCYCLE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "scripts" / "tiny" / "RESULTS.md"]
DEMO = Path(unimoe.__file__).parent / "assets" / "demo"


def text_of(*names: str) -> str:
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(name), re.M | re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with the files of the demonstration, in which a reader types; the working directory."""
    for file in DEMO.iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(DEMO / "picture.png", tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["README.md", "docs/using.md", "docs/processor.md", "docs/configuration.md", "docs/sparse_block.md"]
)
def test_code_runs_as_printed(name, reader, capsys):
    """One block after the other, with the variables of those before, as a reader has them."""
    variables: dict = {}
    for number, block in enumerate(python_blocks(name)):
        exec(compile(block, f"{name}, block {number}", "exec"), variables)
    printed = capsys.readouterr().out
    assert {
        "README.md": "red\n",
        "docs/using.md": "red, siren",
        "docs/processor.md": "",
        "docs/configuration.md": "('image', 'video') 16",
        "docs/sparse_block.md": "model.layers.2.mlp.gate  all",
    }[name] in printed


def test_training_runs_as_printed(reader, monkeypatch, capsys):
    """The records, the recipe with its commands, and the calls of docs/training.md, on random weights."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    page = text_of("docs/training.md")
    llava, chat = (json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.M | re.S))
    records = json.dumps([llava, chat] * 2)
    for name in ("train.json", "mixed.json", "held_out.json"):
        Path(name).write_text(records)
    config = AutoConfig.from_pretrained(unimoe.tiny_checkpoint())
    config.text_sparsity = None
    model, processor = UniMoEForConditionalGeneration(config), AutoProcessor.from_pretrained(unimoe.tiny_checkpoint())
    folders = ["path/to/checkpoint", "image", "audio", "speech"]
    for folder in folders:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    Path("mine.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", page, re.M | re.S)[1])
    # Models that were never trained have no stop.
    question = ["--max-new-tokens", "2"]
    for command in re.findall(r"^unimoe (.*)", page.split("## Data")[0], re.M):
        arguments = shlex.split(command, comments=True)
        assert main([*arguments, *question] if arguments[0] == "generate" else arguments) == 0, command
    lora, stages, evaluation = python_blocks("docs/training.md")
    exec(compile(lora, "lora", "exec"), {})
    shutil.rmtree("runs")
    variables = dict(zip(("base", "image", "audio", "speech"), folders))
    exec(compile(stages, "stages", "exec"), variables)
    exec(compile(evaluation, "evaluation", "exec"), variables)
    assert "eval_accuracy" in capsys.readouterr().out
    for folder in ("adapter", "merged", "assembled"):
        AutoModelForMultimodalLM.from_pretrained(folder)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), link


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options_of(command)
        found |= {option for option in action.option_strings if option.startswith("--")}
    return found - {"--help"}


def test_every_option_of_the_command_is_told():
    pages = text_of("README.md", "docs/using.md", "docs/conversion.md", "docs/training.md")
    assert [option for option in sorted(options_of(build_parser())) if not re.search(rf"{option}\b", pages)] == []


def words(name: str, heading: str) -> set[str]:
    """What stands between backticks in the tables of one section."""
    section = re.split(r"^## ", text_of(name).split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return set(re.findall(r"`(\w+)`", "\n".join(rows)))


def test_every_field_of_a_recipe_is_told():
    fields = {field.name for field in dataclasses.fields(Recipe)} | LORA.keys() | EXPERTS.keys() | UPCYCLE.keys()
    assert fields - words("docs/training.md", "All fields of a recipe") == set()
    trained = text_of("docs/training.md").split("## What is trained\n", 1)[1].split("## ", 1)[0]
    assert [part for part in PARTS if f"`{part}`" not in trained] == []


@pytest.mark.parametrize(
    "name", ["UniMoEConfig", "UniMoESparsityConfig", "UniMoEConnectorConfig", "UniMoEAudioConfig"]
)
def test_every_field_of_a_configuration_is_told(name):
    fields = inspect.get_annotations(getattr(unimoe, name)).keys()
    assert fields - words("docs/configuration.md", f"`{name}`") == set()


def test_every_option_of_the_processor_is_told():
    names = {field.name for field in dataclasses.fields(CallOptions)} - {"image_options"}
    assert names - set(re.findall(r"`(\w+)`", text_of("docs/processor.md"))) == set()


def test_every_public_name_is_told():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    # Base classes, and what importing the package does by itself.
    quiet = {"UniMoEPreTrainedModel", "register"}
    assert [name for name in unimoe.__all__ if name not in quiet and not re.search(rf"\b{name}\b", pages)] == []


def test_tests_that_pages_name_exist():
    page = text_of("docs/conversion.md")
    files = {"C": "tests/conversion/test_cumo.py", "M": "tests/conversion/test_moe_llava.py"}
    for letter, name in re.findall(r"`([CM])::(test_\w+)", page):
        assert f"def {name}(" in text_of(files[letter]), name


@pytest.fixture(scope="module")
def server():
    made = run_path(str(ROOT / "examples" / "serve.py"))["make_server"](unimoe.tiny_checkpoint(), "localhost", 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server: str, request) -> tuple[int, dict]:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    # A proxy that the environment names does not know this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(server, data=body) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_server_answers(server):
    picture = {"type": "image", "base64": b64encode((DEMO / "picture.png").read_bytes()).decode()}
    assert ask(server, {"question": "what colour is it?", "media": [picture]}) == (200, {"answer": "red"})
    sound = {"type": "audio", "base64": b64encode((DEMO / "siren.wav").read_bytes()).decode()}
    assert ask(server, {"question": "what sound is this?", "media": [sound]}) == (200, {"answer": "siren"})


@pytest.mark.parametrize(
    "request_, word",
    [
        (b"{", "Expecting"),
        ([], "question"),
        ({"question": "what?", "media": [{"type": "image", "path": str(DEMO / "picture.png")}]}, "base64"),
        ({"question": "what?", "media": [{"type": "image", "base64": str(DEMO / "picture.png")}]}, "base64"),
        ({"question": "what?", "media": [{"type": "text", "base64": ""}]}, "one of image"),
        ({"question": "what?", "media": [{"type": "image", "base64": b64encode(b"text").decode()}]}, "not a readable image"),
        ({"question": "what?", "media": "all"}, "media"),
        ({"question": "what <image>?"}, "placeholder"),
    ],
)  # fmt: skip
def test_server_refuses(server, request_, word):
    status, answer = ask(server, request_)
    assert status == 400 and word in answer["error"]
