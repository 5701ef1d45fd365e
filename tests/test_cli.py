"""The console command: answers, exit statuses, and one line on standard error for whatever cannot be done."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unimoe
from unimoe import UniMoEForConditionalGeneration
from unimoe.cli import main

sys.path.append(str(Path(__file__).parent / "processing"))
from tiny_processor import image, tiny_config_for, tiny_processor  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    processor = tiny_processor()
    UniMoEForConditionalGeneration(tiny_config_for(processor)).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    image().save(root / "image.png")
    return root


def test_generate_prints_the_answer(folder, capsys):
    options = ["--model", str(folder / "model"), "--image", str(folder / "image.png"), "--max-new-tokens", "4"]
    assert main(["generate", *options, "what is the"]) == 0
    whole = capsys.readouterr().out
    assert whole.strip()
    assert main(["generate", *options, "--stream", "what is the"]) == 0
    assert capsys.readouterr().out.split() == whole.split()


def test_streamed_answer_begins_with_its_first_word(capsys):
    picture = Path(unimoe.__file__).parent / "assets" / "demo" / "picture.png"
    assert main(["generate", "--stream", "--image", str(picture), "what colour is it?"]) == 0
    assert capsys.readouterr().out == "red\n"


def test_info(folder, capsys):
    assert main(["info", str(folder / "model")]) == 0
    printed = capsys.readouterr().out
    for words in ("image, video, audio, speech", "4 in 2 layers (0, 2), top-2", "llama, 3 layers", "activated"):
        assert words in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "--image", "absent.png", "hm"], "absent.png"),
        (["generate", "--image", "image.txt", "hm"], "image.txt"),
        (["generate", ""], "question is empty"),
        (["generate", "--max-new-tokens", "0", "hm"], "--max-new-tokens"),
        (["generate", "--device", "foo", "hm"], "use cpu"),
        (["generate", "--device", "meta", "hm"], "use cpu"),
        (["generate", "--model", ".", "hm"], "config.json"),
        (["generate", "--model", "no/such/folder", "hm"], "no/such/folder"),
        (["info", "."], "config.json"),
    ],
)
def test_refusals(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("image.txt").write_text("not an image")
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = ["generate", "--model", str(folder / "model"), *arguments[1:]]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    refusal = [line for line in printed.err.splitlines() if line.startswith("unimoe")]
    assert len(refusal) == 1 and words in refusal[0]
    assert "Traceback" not in printed.err and not printed.out


class TestDevice:
    """With the accelerators that PyTorch says there are, before anything is loaded: there is no such model folder."""

    def refusal(self, device, capsys):
        assert main(["generate", "--model", "no/such/folder", "--device", device, "hm"]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    def has(self, monkeypatch, kind, count):
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    @pytest.mark.parametrize("device", ["foo", "cuda", "cuda:0", "cuda:x", "mps", "0", ""])
    def test_without_accelerators(self, monkeypatch, capsys, device):
        self.has(monkeypatch, None, 0)
        assert self.refusal(device, capsys).endswith("use cpu")

    @pytest.mark.parametrize("device", ["cuda:2", "mps", "bar"])
    def test_with_two(self, monkeypatch, capsys, device):
        self.has(monkeypatch, "cuda", 2)
        assert self.refusal(device, capsys).endswith("use cpu or cuda:0 or cuda:1")

    @pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
    def test_usable(self, monkeypatch, capsys, device):
        self.has(monkeypatch, "cuda", 2)
        assert "no/such/folder" in self.refusal(device, capsys)


def test_show_experts(folder, capsys):
    options = ["--model", str(folder / "model"), "--max-new-tokens", "3"]
    assert main(["generate", *options, "what is the"]) == 0
    answer = capsys.readouterr().out
    assert main(["generate", *options, "--show-experts", "what is the"]) == 0
    found = capsys.readouterr()
    assert found.out == answer and "language_model.layers.0.mlp.gate" in found.err and "expert 3" in found.err


def test_an_error_without_a_text_is_told_by_its_kind(folder, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    assert main(["info", str(folder / "model")]) == 1
    assert capsys.readouterr().err == "unimoe info: TimeoutError\n"


def test_weights_that_were_cut_off(folder, tmp_path, capsys):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", "--model", str(model), "What is this?"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unimoe")]
    assert "unimoe generate: a safetensors file is cut short or damaged" in line and line.endswith("again")


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["info"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "unimoe", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout
