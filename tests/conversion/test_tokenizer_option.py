"""Where a conversion's tokenizer comes from: `--tokenizer`, else the checkpoint; and what is said of damaged files."""

import json
import re
import shutil

import pytest
from llava_sets import set_folder

from unimoe.cli import main
from unimoe.conversion.convert import convert
from unimoe.conversion.moe_llava import MoELLaVAPaths, plan_moe_llava

SET = set_folder("moellava")
PHI = SET / "moellava-phi"
BARE = SET / "moellava-openchat"  # has no tokenizer
CLIP = SET / "openai" / "clip-vit-tiny-patch14"

pytestmark = pytest.mark.skipif(not (PHI.is_dir() and BARE.is_dir()), reason="the golden set is not there")


def arguments(checkpoint, output, *more):
    folders = ["--checkpoint", str(checkpoint), "--vision-tower", str(CLIP), "--output", str(output)]
    return ["convert", "moe-llava", *folders, *more]


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with the tokenizer of Phi and nothing else."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(PHI / name, folder / name)
    return folder


def renamed(tokenizer, name):
    """The same tokenizer with another padding token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        text = (tokenizer / file).read_text()
        (tokenizer / file).write_text(text.replace("<|extra_0|>", name))
    return tokenizer


def load(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def test_a_checkpoint_without_a_tokenizer_takes_the_given_one(tmp_path, tokenizer, capsys):
    """First without, as the note advises then with: the second folder has a processor and holds the same ids."""
    output = tmp_path / "output"
    assert main(arguments(BARE, output)) == 0
    assert "convert again with --tokenizer" in capsys.readouterr().out
    assert not (output / "processor_config.json").exists()
    assert main(arguments(BARE, output, "--overwrite", "--tokenizer", str(tokenizer))) == 0
    processor = load(output)
    text = "What is in it?"
    original = load_original(tokenizer)
    assert processor.tokenizer(text)["input_ids"] == original(text)["input_ids"]
    config = json.loads((output / "config.json").read_text())
    assert processor.image_token_id == config["image_token_id"] >= config["text_config"]["vocab_size"]
    assert "tokenizer: `tokenizer`" in (output / "README.md").read_text()


def load_original(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_given_tokenizer_wins(tmp_path, tokenizer):
    """In the call, too."""
    paths = MoELLaVAPaths(checkpoint=PHI, vision_tower=CLIP, tokenizer=renamed(tokenizer, "<|pad|>"))
    convert(plan_moe_llava(paths), tmp_path / "output", progress=False)
    assert load(tmp_path / "output").tokenizer.pad_token == "<|pad|>"


def test_a_tokenizer_larger_than_the_embedding_is_told(tmp_path, tokenizer, capsys):
    assert main(arguments(BARE, tmp_path / "output", "--tokenizer", str(tokenizer), "--dry-run")) == 0
    rows = json.loads((BARE / "config.json").read_text())["vocab_size"]
    assert f"401 tokens, the model's embedding {rows} rows" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["cumo", "uni-moe", "moe-llava"])
def test_every_family_takes_it(family, capsys):
    with pytest.raises(SystemExit):
        main(["convert", family, "--help"])
    assert "--tokenizer DIR" in capsys.readouterr().out


def refusal(capsys, args):
    assert main(args) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("unimoe convert: ") and "\n" not in message
    return message


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    args = arguments(BARE, tmp_path / "output", "--tokenizer")
    assert re.search(rf"{CLIP}: no tokenizer there.*tokenizer\.model", refusal(capsys, [*args, str(CLIP)]))
    assert re.search(r"/nowhere: no such folder, given as --tokenizer", refusal(capsys, [*args, "/nowhere"]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", "{", r"/tokenizer_config\.json: not valid JSON"),
        ("vocab.json", "{", r"/vocab\.json: not valid JSON"),
        ("vocab.json", None, r"merges\.txt without vocab\.json"),
        ("vocab.json", '{"a": "b"}', r"its tokenizer cannot be read"),
        ("merges.txt", "a b c d\nnonsense\n", r"its tokenizer cannot be read"),
        ("tokenizer.json", "{", r"/tokenizer\.json: not valid JSON"),
        ("tokenizer.json", '{"model": 1}', r"its tokenizer cannot be read"),
        ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}', r"its tokenizer cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, tokenizer, capsys, name, content, message):
    (tokenizer / name).unlink(missing_ok=True)
    if content is not None:
        (tokenizer / name).write_text(content)
    found = refusal(capsys, arguments(PHI, tmp_path / "output", "--dry-run", "--tokenizer", str(tokenizer)))
    assert re.search(message, found) and f"convert: {tokenizer}" in found
    # Only copies are read; their place says nothing.
    assert "/tmp" not in found.replace(str(tokenizer), "")


def test_whatever_a_tokenizers_library_raises_is_one_line(tmp_path, tokenizer, capsys, monkeypatch):
    """Flipped bits in a `tokenizer.model` may give a model that is read, but that no tokenizer can be made of."""
    (tokenizer / "tokenizer.model").write_bytes(b"")

    def fail(*args):
        raise TypeError("failed to extract\n- variant")

    monkeypatch.setattr("unimoe.conversion.tokenizer.load_llama_tokenizer", fail)
    args = arguments(PHI, tmp_path / "output", "--dry-run", "--tokenizer", str(tokenizer))
    assert f"{tokenizer}: its tokenizer cannot be read (failed to extract - variant)" in refusal(capsys, args)


def test_a_tokenizer_without_a_class_is_that_of_its_decoder(tmp_path, tokenizer):
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(arguments(PHI, tmp_path / "output", "--tokenizer", str(tokenizer))) == 0
    assert load(tmp_path / "output").tokenizer("  What")["input_ids"] == load_original(PHI)("  What")["input_ids"]


def test_nothing_is_said_of_the_originals_model_type(tmp_path):
    """Transformers would warn of a `config.json` beside the tokenizer whose model type it does not know."""
    import os
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-m", "unimoe", *arguments(PHI, tmp_path / "output")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0 and "moe_llava_phi" not in run.stderr and "rope_scaling" not in run.stderr, run.stderr


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, tokenizer):
    """Shells leave `~` alone behind `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, folder in {"checkpoint": BARE, "tower": CLIP}.items():
        (tmp_path / name).symlink_to(folder)
    options = {"checkpoint": "checkpoint", "vision-tower": "tower", "tokenizer": "tokenizer", "output": "output"}
    assert main(["convert", "moe-llava", *(f"--{option}=~/{name}" for option, name in options.items())]) == 0
    assert (tmp_path / "output" / "processor_config.json").exists()
