"""A joined model: an audio release, and a speech release made of the same decoder with a speech aligner."""

import json
import re
import shutil

import pytest
import torch
from uni_moe_sets import BY_NAME, arguments, find_set, is_there

from unimoe.cli import main

AUDIO, SPEECH = BY_NAME["unimoe_audio-cases"], BY_NAME["unimoe_speech-cases_e2"]
pytestmark = pytest.mark.skipif(not (is_there(AUDIO) and is_there(SPEECH)), reason="the golden sets are not there")


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Options for an audio release, and for one whose aligner is a Whisper decoder on the very same decoder."""
    folder = tmp_path_factory.mktemp("releases")
    audio = dict(zip(*[iter(arguments(AUDIO))] * 2))
    speech = dict(zip(*[iter(arguments(SPEECH))] * 2))
    for option in ("--base", "--checkpoint"):
        shutil.copytree(audio[option], folder / option.strip("-"))
    whisper = torch.load(f"{speech['--checkpoint']}/mm_audio_aligner.bin", weights_only=True)
    hidden = json.loads((folder / "base" / "config.json").read_text())["hidden_size"]
    for name in ("model.mm_audio_aligner.projector.weight", "model.mm_audio_aligner.projector.bias"):
        rows = torch.zeros(hidden, *whisper[name].shape[1:], dtype=whisper[name].dtype)
        rows[: len(whisper[name])] = whisper[name][:hidden]
        whisper[name] = rows
    torch.save(whisper, folder / "checkpoint" / "mm_audio_aligner.bin")
    (folder / "base" / "mm_audio_aligner.bin").unlink(missing_ok=True)
    for shard in folder.glob("base/pytorch_model-*.bin"):
        weights = torch.load(shard, weights_only=True)
        torch.save({name: value for name, value in weights.items() if "mm_audio_aligner" not in name}, shard)
    file = folder / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    config["query_tokens_size"] = whisper["model.query_tokens"].shape[1]
    config["mm_audio_hidden_size"] = whisper["model.query_tokens"].shape[2]
    file.write_text(json.dumps(config))
    speech["--vision-tower"] = audio["--vision-tower"]
    return audio, {**speech, "--base": str(folder / "base"), "--checkpoint": str(folder / "checkpoint")}


def options(*releases):
    merged = {}
    for release in releases:
        merged |= {option: value for option, value in release.items() if option not in ("--base", "--checkpoint")}
    args = [part for pair in merged.items() for part in pair]
    for release in releases:
        args += ["--base", release["--base"], "--checkpoint", release["--checkpoint"]]
    return ["convert", "uni-moe", *args]


def logits(folder, messages):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("swapped", [False, True])
def test_each_sound_is_answered_as_by_its_own_release(releases, tmp_path, swapped):
    audio, speech = releases
    pair = (speech, audio) if swapped else (audio, speech)
    common = ["--dtype", "float32"]
    assert main([*options(*pair), "--output", str(tmp_path / "joined"), *common]) == 0
    heads = {"--qformer-num-attention-heads": audio["--qformer-num-attention-heads"]}
    assert main([*options(audio), "--output", str(tmp_path / "audio"), *common]) == 0
    assert main([*options({**speech, **heads}), "--output", str(tmp_path / "speech"), *common]) == 0
    wave = str(find_set(AUDIO.golden) / "assets" / "clip_b.wav")
    image = str(find_set(AUDIO.golden) / "assets" / "img_83x57.png")
    for kind in ("audio", "speech"):
        content = [
            {"type": "image", "path": image},
            {"type": kind, "path": wave},
            {"type": "text", "text": "What is it?"},
        ]
        messages = [{"role": "user", "content": content}]
        assert torch.equal(logits(tmp_path / "joined", messages), logits(tmp_path / kind, messages))
    both = [{"type": "audio", "path": wave}, {"type": "speech", "path": wave}]
    assert logits(tmp_path / "joined", [{"role": "user", "content": both}]).isfinite().all()
    assert "never trained" in (tmp_path / "joined" / "README.md").read_text()


@pytest.mark.parametrize(
    "case, message",
    [
        ("other decoder", r"cannot be joined, since their decoders were trained apart: \S+ differs by up to"),
        ("other sizes", r"cannot be joined, since their decoders are built differently \(text_config\.\w+"),
        ("other tokenizer", r"cannot be joined, since their tokenizers differ"),
        ("two of a kind", r"needs one audio and one speech release; both are audio releases"),
    ],
)
def test_what_cannot_be_joined(releases, tmp_path, capsys, case, message):
    audio, speech = releases
    speech = dict(speech)
    for option in ("--base", "--checkpoint"):
        speech[option] = str(shutil.copytree(speech[option], tmp_path / option.strip("-")))
    if case == "other decoder":
        file = tmp_path / "checkpoint" / "mlp_gates.bin"
        gates = torch.load(file, weights_only=True)
        gates["model.layers.0.mlp.gate.weight"] += 1e-3
        torch.save(gates, file)
    elif case == "other sizes":
        file = tmp_path / "checkpoint" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    elif case == "other tokenizer":
        shutil.copyfile(
            find_set(SPEECH.golden) / "checkpoint" / SPEECH.base / "tokenizer.model",
            tmp_path / "base" / "tokenizer.model",
        )
    pair = (audio, audio) if case == "two of a kind" else (audio, speech)
    assert main([*options(*pair), "--output", str(tmp_path / "joined")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "joined").exists()


def test_options_come_in_pairs(releases, tmp_path, capsys):
    audio, speech = releases
    args = options(audio, speech)
    assert main([*args[:-2], "--output", str(tmp_path / "joined")]) == 1
    assert "--base is given 2 times and --checkpoint 1 times" in capsys.readouterr().err
