"""What `--output` may be: never an input, whatever it is called, and links are followed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from llava_sets import set_folder

from unimoe.cli import main
from unimoe.conversion.errors import ConversionError
from unimoe.conversion.writer import check_inputs, new_folder

SET = set_folder("cumo")
golden = pytest.mark.skipif(not SET.is_dir(), reason="the golden set is not there")


def checkpoint(folder, *names):
    folder.mkdir(parents=True)
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "output",
    [
        "model",
        "sub/../model",
        "link",
        "parent/model",
        "model/clip",
        "model/clip/config.json",
        ".",
        "sub/../../{}",
        "blobs",
        "cache",
        "linked/clip",
    ],
)
def test_no_input_is_ever_replaced(here, output):
    """However the output is spelled, and also where it only holds what an input links to."""
    folder = checkpoint(here / "model", "tokenizer.json")
    clip = checkpoint(folder / "clip", "preprocessor_config.json")
    (here / "sub").mkdir()
    (here / "link").symlink_to(folder)
    (here / "parent").symlink_to(here)
    (here / "linked").symlink_to(folder)
    blobs = checkpoint(here / "blobs", "0a")
    cache = here / "cache" / "snapshot"
    cache.mkdir(parents=True)
    (cache / "model.safetensors").symlink_to(blobs / "0a")
    output = Path(output.format(here.name))
    with pytest.raises(ConversionError, match="would replace .*, which is to be read; choose another --output"):
        check_inputs(output.absolute(), [folder, clip, cache])


@pytest.mark.parametrize("suffix", [".incomplete", ".replaced"])
def test_folders_that_are_cleared_on_the_way_are_no_inputs(here, suffix):
    folder = checkpoint(here / f"model{suffix}")
    with pytest.raises(ConversionError, match="would replace"):
        check_inputs(here / "model", [folder])


@pytest.mark.parametrize("output", ["new", "model2", "model/new", "a/b/c", "link"])
def test_other_places_are_fine(here, output):
    """A new folder within an input replaces nothing."""
    folder = checkpoint(here / "model", "weights.bin")
    (here / "link").symlink_to(checkpoint(here / "elsewhere"))
    check_inputs(here / output, [folder, folder / "weights.bin"])


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(here):
    target = checkpoint(here / "disk" / "target", "old")
    (here / "model").symlink_to(target)
    with new_folder(here / "model", 0, overwrite=True) as partial:
        (partial / "new").touch()
    assert (here / "model").is_symlink() and [file.name for file in target.iterdir()] == ["new"]
    assert os.listdir(here / "disk") == ["target"] and sorted(os.listdir(here)) == ["disk", "model"]


def arguments(output, source=SET / "CuMo-mistral-7b", tower=SET / "openai" / "clip-tiny"):
    return ["convert", "cumo", "--checkpoint", str(source), "--vision-tower", str(tower), "--output", str(output)]


@golden
def test_a_link_to_nowhere_is_refused_before_the_work(here, capsys, monkeypatch):
    (here / "model").symlink_to(here / "nowhere")
    monkeypatch.setattr("unimoe.conversion.convert.write_weights", None)
    assert main(arguments(here / "model")) == 1
    assert "model: a link to a place that does not exist; remove it" in capsys.readouterr().err
    assert sorted(os.listdir(here)) == ["model"]


@golden
@pytest.mark.parametrize("option", ["checkpoint", "tower", "tokenizer"])
def test_overwrite_spares_every_input(here, capsys, option):
    """Through a link, the command replaces neither the checkpoint, nor a tower of which it reads only JSON, nor a tokenizer."""
    folders = {"checkpoint": SET / "CuMo-mistral-7b", "tower": SET / "openai" / "clip-tiny"}
    folders["tokenizer"] = folders["checkpoint"]
    for name, folder in folders.items():
        shutil.copytree(folder, here / name)
    before = sorted(os.listdir(here / option))
    (here / "link").symlink_to(here)
    args = arguments(here / "link" / option, here / "checkpoint", here / "tower")
    assert main([*args, "--tokenizer", str(here / "tokenizer"), "--overwrite"]) == 1
    assert "would replace" in capsys.readouterr().err
    assert sorted(os.listdir(here / option)) == before
    assert json.loads((here / "checkpoint" / "config.json").read_text())["model_type"] == "llava_mistral"
