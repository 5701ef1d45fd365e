"""`unimoe convert uni-moe`: what it writes, how it refuses bad input, and that the folder stands on its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from uni_moe_sets import BY_NAME, arguments, find_set, is_there

from unimoe.cli import main
from unimoe.conversion.reader import read_file, read_weights

SPEECH = BY_NAME["unimoe_speech-cases_e2"]
AUDIO = BY_NAME["unimoe_audio-cases"]
EIGHT = BY_NAME["unimoe_8e-cases_dense"]
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "How many birds are there?"}]}]

pytestmark = pytest.mark.skipif(not (is_there(SPEECH) and is_there(AUDIO)), reason="the golden sets are not there")
eight_experts = pytest.mark.skipif(not is_there(EIGHT), reason="the golden set is not there")


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


class Release:
    """A copy of a release whose files can be broken one by one; nothing but links until then."""

    def __init__(self, variant, folder):
        self.folder = folder
        given = arguments(variant)
        self.options = dict(zip(given[::2], given[1::2]))
        for option, value in self.options.items():
            source = Path(value)
            copy = folder / option.strip("-") / source.name
            if source.is_dir():
                copy.mkdir(parents=True)
                for file in source.iterdir():
                    (copy / file.name).symlink_to(file)
            elif source.is_file():
                copy.parent.mkdir(parents=True)
                copy.symlink_to(source)
            else:
                continue
            self.options[option] = str(copy)

    def path(self, option, name=""):
        return Path(self.options[f"--{option}"]) / name

    def rewrite(self, path, content):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    def edit_json(self, path, **changes):
        content = {**json.loads(path.read_text()), **changes}
        self.rewrite(path, json.dumps({key: value for key, value in content.items() if value is not None}).encode())

    def edit_weights(self, path, edit):
        content = torch.load(path, weights_only=True)
        edit(content)
        self.rewrite(path, content)

    def args(self, *more, output="model"):
        pairs = [part for pair in self.options.items() for part in pair]
        return ["convert", "uni-moe", *pairs, "--output", str(self.folder / output), *more]


@pytest.fixture
def release(tmp_path):
    return Release(SPEECH, tmp_path)


def refusal(capsys, args):
    """The one line with which a command is refused."""
    assert main(args) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("unimoe convert: ") and "\n" not in message and "Traceback" not in message
    output = Path(args[args.index("--output") + 1])
    assert not output.exists() and not output.with_name(output.name + ".incomplete").exists()
    return message


def truncate(path):
    return path.read_bytes()[: path.stat().st_size // 2]


def first_shard(release):
    return release.path("base", "pytorch_model-00001-of-00005.bin")


def break_missing(name, option):
    return lambda release: release.path(option, name).unlink()


def swap(option, value):
    return lambda release: release.options.__setitem__(f"--{option}", value)


def half_width(weights):
    for name in weights:
        if name.endswith("mm_projector.2.weight"):
            weights[name] = weights[name][:, ::2].clone()


def without_norm(weights):
    weights.pop(next(name for name in weights if name.endswith("input_layernorm.weight")))


def with_extra(weights):
    weights["model.layers.0.surprise.weight"] = torch.ones(3)


BAD_INPUTS = {
    "base missing": (
        swap("base", "/nowhere/base"),
        r"/nowhere/base: no such folder, given as --base; download .*huggingface",
    ),
    "checkpoint missing": (
        swap("checkpoint", "/nowhere/e2"),
        r"/nowhere/e2: no such folder, given as --checkpoint; download",
    ),
    "tower missing": (
        swap("vision-tower", "/nowhere/clip"),
        r"/nowhere/clip: no such folder.*openai/clip-vit-large-patch14-336",
    ),
    "whisper missing": (swap("speech-tower", "/nowhere/w"), r"/nowhere/w: no such folder.*openai/whisper-small"),
    "no whisper given": (lambda release: release.options.pop("--speech-tower"), r"needs --speech-tower"),
    "a shard missing": (
        lambda release: first_shard(release).unlink(),
        r"pytorch_model-00001-of-00005\.bin missing.*download",
    ),
    "config missing": (break_missing("config.json", "checkpoint"), r"config\.json is missing; download"),
    "adapter missing": (break_missing("adapter_model.bin", "checkpoint"), r"adapter_model\.bin is missing"),
    "trainables missing": (
        break_missing("non_lora_trainables.bin", "checkpoint"),
        r"non_lora_trainables\.bin is missing",
    ),
    "aligner missing": (break_missing("mm_audio_aligner.bin", "checkpoint"), r"mm_audio_aligner\.bin is missing"),
    "preprocessor missing": (
        break_missing("preprocessor_config.json", "vision-tower"),
        r"preprocessor_config\.json is missing",
    ),
    "another family": (
        lambda release: release.edit_json(release.path("checkpoint", "config.json"), model_type="moe_llava_phi"),
        r"'moe_llava_phi' checkpoint, not a Uni-MoE one; use `unimoe convert moe-llava`",
    ),
    "a plain llava": (
        lambda release: release.edit_json(release.path("checkpoint", "config.json"), mm_audio_tower=None),
        r"without the fields of a Uni-MoE release",
    ),
    "a checkpoint as tower": (
        lambda release: swap("vision-tower", str(release.path("speech-tower")))(release),
        r"model_type 'whisper'; --vision-tower must be a CLIP folder",
    ),
    "truncated .bin": (
        lambda r: r.rewrite(first_shard(r), truncate(first_shard(r))),
        r"00001-of-00005\.bin: truncated or corrupt",
    ),
    "truncated .safetensors": (
        lambda r: r.rewrite(
            r.path("speech-tower", "model.safetensors"), truncate(r.path("speech-tower", "model.safetensors"))
        ),
        r"model\.safetensors: truncated or corrupt",
    ),
    "empty adapter": (
        lambda r: r.rewrite(r.path("checkpoint", "adapter_model.bin"), b""),
        r"adapter_model\.bin: truncated",
    ),
    "broken json": (lambda r: r.rewrite(r.path("checkpoint", "config.json"), b"{"), r"config\.json: not valid JSON"),
    "broken tokenizer": (
        lambda r: r.rewrite(r.path("base", "tokenizer.model"), b"\x00nonsense"),
        r"tokenizer\.model: ",
    ),
    "a list instead of weights": (lambda r: r.rewrite(first_shard(r), [1, 2]), r"not a dict of tensors"),
    "shape": (
        lambda r: r.edit_weights(r.path("checkpoint", "non_lora_trainables.bin"), half_width),
        r"model\.vision_connector\.layers\.1\.weight is \[64, 32\] instead of \[64, 64\]",
    ),
    "tensor missing": (
        lambda r: r.edit_weights(first_shard(r), without_norm),
        r"in none of the files: model\.language_model\.layers\.\d+\.input_layernorm\.weight",
    ),
    "tensor too many": (
        lambda r: r.edit_weights(first_shard(r), with_extra),
        r"have no place in the model: model\.language_model\.layers\.0\.surprise\.weight",
    ),
    "wrong tower size": (
        lambda r: r.edit_json(r.path("checkpoint", "config.json"), mm_hidden_size=1024),
        r"a tower of width 32, given as --vision-tower; this release needs mm_hidden_size=1024",
    ),
    "wrong number of experts": (
        lambda r: r.edit_json(r.path("checkpoint", "config.json"), num_experts=6),
        r"num_experts=6, but layer 0 has the experts \[0, 1, 2, 3\]",
    ),
    "wrong number of queries": (
        lambda r: r.edit_json(r.path("checkpoint", "config.json"), query_tokens_size=50),
        r"model\.speech_connector\.query_tokens is \[1, 6, 32\] instead of \[1, 50, 32\]",
    ),
    "an unknown projector": (
        lambda r: r.edit_json(r.path("checkpoint", "config.json"), mm_projector_type="resampler"),
        r"mm_projector_type='resampler' is not supported",
    ),
    "an adapter of another base": (
        lambda r: r.options.__setitem__("--base", str(find_set("unimoe_audio") / "checkpoint" / "Uni-MoE-audio-base")),
        r"adapter and base do not belong together|does not fit a weight of shape",
    ),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_input_is_refused_in_one_line(release, capsys, what):
    spoil, message = BAD_INPUTS[what]
    spoil(release)
    assert re.search(message, refusal(capsys, release.args()))


@pytest.mark.parametrize(
    "name, option", [("pytorch_model-00001-of-00005.bin", "base"), ("mlp_gates.bin", "checkpoint")]
)
def test_code_in_a_pickle_never_runs(release, capsys, tmp_path, name, option):
    marker = tmp_path / "ran"
    release.rewrite(release.path(option, name), {"model.norm.weight": torch.ones(2), "code": Code(marker)})
    assert re.search(rf"{name}: refused, because it holds pickled code", refusal(capsys, release.args()))
    assert not marker.exists()


def test_a_flipped_bit_is_found_while_writing(release, capsys):
    shard = first_shard(release)
    raw = bytearray(shard.read_bytes())
    raw[read_file(shard)["model.embed_tokens.weight"].offset + 1000] ^= 1
    release.rewrite(shard, bytes(raw))
    assert "fails its checksum" in refusal(capsys, release.args())


def test_places_that_cannot_be_written_to(release, capsys, monkeypatch):
    assert "cannot write there" in refusal(capsys, release.args(output="/proc/unimoe/model"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert re.search(r"MB are needed, 1\.00 kB are free", refusal(capsys, release.args()))


def test_the_output_may_not_hold_the_input(release, capsys):
    args = release.args("--overwrite", output="base/Uni-MoE-speech-base")
    assert main(args) == 1
    assert "which is to be read; choose another --output" in capsys.readouterr().err
    assert release.path("base", "config.json").exists()


@pytest.mark.parametrize(
    "args", [["--dtype", "int8"], ["--max-shard-size", "five"], ["--qformer-num-attention-heads", "x"]]
)
def test_wrong_usage(release, args):
    with pytest.raises(SystemExit) as error:
        main(release.args(*args))
    assert error.value.code == 2


def test_heads_of_the_qformer(tmp_path, capsys):
    """No file tells them: refused where they cannot be guessed, or do not divide."""
    release = Release(AUDIO, tmp_path)
    release.options["--qformer-num-attention-heads"] = "5"
    assert "does not divide the Q-Former's width, 48" in refusal(capsys, release.args())
    del release.options["--qformer-num-attention-heads"]
    assert "pass --qformer-num-attention-heads" in refusal(capsys, release.args())
    release.options["--speech-tower"] = "/some/where"
    assert "has no use for --speech-tower" in refusal(capsys, release.args())


@eight_experts
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.options.pop("--experts"), r"needs --experts; download"),
        (lambda r: r.path("experts", "mlp_base4.bin").unlink(), r"mlp_base4\.bin is missing; download"),
        (lambda r: r.path("checkpoint", "3_mlp_experts.bin").unlink(), r"3_mlp_experts\.bin is missing; download"),
        (lambda r: r.path("checkpoint", "mlp_gates.bin").unlink(), r"mlp_gates\.bin is missing"),
        (lambda r: r.edit_json(r.path("base", "8config.json"), num_experts=6), r"num_experts=6; .* has 8"),
        (lambda r: r.edit_json(r.path("base", "8config.json"), moe_type="odd"), r"moe_type='odd'"),
        (
            lambda r: r.edit_json(r.path("base", "8config.json"), moe_type="sparse"),
            r"have no place in the model|belong nowhere|none of the files",
        ),
        (lambda r: r.edit_json(r.path("base", "8config.json"), lora_r=None), r"lora_r missing"),
    ],
)
def test_eight_expert_files(tmp_path, capsys, spoil, message):
    release = Release(EIGHT, tmp_path)
    spoil(release)
    assert re.search(message, refusal(capsys, release.args()))


@eight_experts
def test_eight_expert_config_lies_where_users_put_it(tmp_path, capsys):
    """Renamed to config.json, as the original asks for, or left as `8config.json`: the plan is the same."""
    plans = []
    for name in ("as released", "renamed"):
        release = Release(EIGHT, tmp_path / name)
        if name == "renamed":
            release.path("base", "config.json").unlink()
            release.path("base", "8config.json").rename(release.path("base", "config.json"))
        assert main(release.args("--dry-run")) == 0
        plans.append(capsys.readouterr().out.replace(str(tmp_path / name), ""))
    assert plans[0] == plans[1] and plans[0].startswith("Uni-MoE eight-expert speech")


def test_folder_names_do_not_matter(tmp_path, capsys):
    release = Release(SPEECH, tmp_path)
    for i, option in enumerate(list(release.options)):
        renamed = release.path(option.strip("-")).rename(tmp_path / f"folder{i}")
        release.options[option] = str(renamed)
    assert main(release.args("--dry-run")) == 0
    assert capsys.readouterr().out.startswith("Uni-MoE speech")


def test_dry_run_tells_the_plan_and_writes_nothing(release, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert main(release.args("--dry-run", "--dtype", "bfloat16")) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert str(first_shard(release)) in text
    assert re.search(r"\d+ tensors: rotary frequencies", text)
    assert re.search(r"writes: \d+ tensors, [\d.]+ [kM]B in bfloat16", text)


def test_a_finished_folder_is_kept_unless_told_otherwise(release, capsys, tmp_path):
    assert main(release.args()) == 0
    (tmp_path / "model" / "mark").write_text("old")
    assert main(release.args()) == 1
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "model" / "mark").exists()
    assert main(release.args("--overwrite")) == 0
    assert not (tmp_path / "model" / "mark").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_and_dtype(release, tmp_path, converted, dtype):
    """Small shards hold the float32 conversion's values, rounded once."""
    assert main(release.args("--dtype", dtype, "--max-shard-size", "300KB")) == 0
    exact = load_file(converted(SPEECH.name) / "model.safetensors")
    found = read_weights(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2 and found.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(found[name].read(), tensor.to(getattr(torch, dtype)))
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == getattr(torch, dtype)


def test_safetensors_sources(release, tmp_path, converted):
    """A base that was re-saved as safetensors gives the same tensors."""
    base = release.path("base")
    for shard in sorted(base.glob("pytorch_model-*.bin")):
        save_file(
            torch.load(shard, weights_only=True),
            base / shard.name.replace("pytorch_", "").replace(".bin", ".safetensors"),
        )
    assert main(release.args("--dtype", "float32")) == 0
    exact = load_file(converted(SPEECH.name) / "model.safetensors")
    assert all(
        torch.equal(tensor, exact[name])
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
    )


def test_without_gates_the_merged_gate_stays(tmp_path, converted):
    """`mlp_gates.bin` is optional: with it the gates' adapters are lost, as in the original; without it they count."""
    release = Release(AUDIO, tmp_path)
    release.path("checkpoint", "mlp_gates.bin").unlink()
    assert main(release.args("--dtype", "float32")) == 0
    name = "model.language_model.layers.0.mlp.gate.weight"
    found = load_file(tmp_path / "model" / "model.safetensors")[name]
    base = read_weights(release.path("base"))["model.layers.0.mlp.gate.weight"].read().float()
    adapter = torch.load(release.path("checkpoint", "adapter_model.bin"), weights_only=True)
    a, b = (adapter[f"base_model.model.model.layers.0.mlp.gate.lora_{side}.weight"] for side in "AB")
    config = json.loads(release.path("checkpoint", "adapter_config.json").read_text())
    torch.testing.assert_close(found, base + config["lora_alpha"] / config["r"] * b @ a)
    assert not torch.equal(found, load_file(converted(AUDIO.name) / "model.safetensors")[name])


def test_without_a_tokenizer_the_model_is_still_written(release, tmp_path, capsys):
    release.path("base", "tokenizer.model").unlink()
    assert main(release.args()) == 0
    assert "No tokenizer was found" in capsys.readouterr().out
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 7]])).logits.shape[:2] == (1, 3)
    assert not (tmp_path / "model" / "processor_config.json").exists()


def test_the_small_files(converted):
    folder = converted(AUDIO.name)
    config = json.loads((folder / "config.json").read_text())
    base = json.loads((find_set("unimoe_audio") / "checkpoint" / AUDIO.base / "config.json").read_text())
    ids = [config[f"{name}_token_id"] for name in ("image", "video", "audio", "speech")]
    assert ids == list(range(base["vocab_size"], base["vocab_size"] + 4))
    assert config["text_config"]["vocab_size"] == base["vocab_size"]
    assert config["text_sparsity"]["layers"] == "even" and config["speech_config"] is None
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"], generation["max_new_tokens"]) == (True, 0.2, 1024)
    card = (folder / "README.md").read_text()
    for part in ("research use only", "Vicuna", "trust_remote_code=True", "Uni-MoE-audio-e2", "experts"):
        assert part in card
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["num_audio_tokens"] == base["query_tokens_size"]
    assert (folder / "chat_template.jinja").is_file()


ALONE = """
import sys, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline
assert not any(name.split(".")[0] == "unimoe" for name in sys.modules)
sys.modules["unimoe"] = None
folder = sys.argv[1]
pipe = pipeline("any-to-text", model=folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "text", "text": "How many birds are there?"}]}]
answer = pipe(messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
text = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
assert answer[0]["generated_text"].strip() == text.strip(), (answer, text)
"""


def test_the_folder_runs_without_the_package(converted, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", ALONE, converted(SPEECH.name)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr


def test_without_remote_code(release, tmp_path):
    assert main(release.args("--no-remote-code")) == 0
    folder = tmp_path / "model"
    assert not list(folder.glob("*.py"))
    for file in folder.glob("*.json"):
        # At no depth: the processor's file holds those of its parts.
        assert not re.search('"(auto_map|custom_pipelines)"', file.read_text()), file.name
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    from transformers import pipeline

    pipe = pipeline("any-to-text", model=str(folder))
    assert pipe(MESSAGES, max_new_tokens=2, return_full_text=False)[0]["generated_text"] is not None


def test_info_tells_the_architecture(converted, capsys):
    assert main(["info", str(converted(SPEECH.name))]) == 0
    text = capsys.readouterr().out
    assert re.search(r"decoder experts\s+4 in 4 layers \(0, 1, 2, 3\), top-2", text)
    assert re.search(r"tokens per speech chunk\s+6", text)


@eight_experts
def test_modality_maps_of_the_eight_expert_model(tmp_path):
    """`fm_adapter.bin`: the router of a layer reads each token through the map of its modality."""
    release = Release(EIGHT, tmp_path)
    hidden = json.loads(release.path("base", "8config.json").read_text())["hidden_size"]
    layers = json.loads(release.path("base", "8config.json").read_text())["num_hidden_layers"]
    torch.manual_seed(0)
    maps = {}
    for layer in range(layers):
        for modality in ("audio", "video", "image", "text"):
            name = f"model.layers.{layer}.mlp.deepspeed_moe.fm_{modality}"
            maps |= {f"{name}.weight": torch.randn(hidden, hidden, 1), f"{name}.bias": torch.randn(hidden)}
    release.edit_json(release.path("base", "8config.json"), use_fm_block=True)
    assert main(release.args()) == 1  # the configuration asks for maps that are not there
    torch.save(maps, release.path("checkpoint", "fm_adapter.bin"))
    assert main(release.args("--dtype", "float32")) == 0
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model").eval()
    config = model.config
    ids = torch.tensor([[1, 5, *[config.image_token_id] * config.num_image_tokens, 7, 9]])
    pixels = torch.randn(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    seen = {}
    gate = model.model.language_model.layers[1].mlp.gate
    gate.register_forward_hook(
        lambda module, args, output: seen.update(x=args[0].reshape(-1, hidden), logits=output[0])
    )
    with torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
    for modality, rows in (("text", [0, 1, -2, -1]), ("image", list(range(2, 2 + config.num_image_tokens)))):
        name = f"model.layers.1.mlp.deepspeed_moe.fm_{modality}"
        mapped = seen["x"][rows] @ maps[f"{name}.weight"][..., 0].T + maps[f"{name}.bias"]
        torch.testing.assert_close(seen["logits"][rows], mapped @ gate.weight.T, rtol=1e-4, atol=1e-4)
    again = tmp_path / "again"
    model.save_pretrained(again)
    reloaded = AutoModelForMultimodalLM.from_pretrained(again)
    assert torch.equal(
        reloaded.model.language_model.layers[1].mlp.gate.modality_maps.maps["video"].bias,
        maps["model.layers.1.mlp.deepspeed_moe.fm_video.bias"],
    )
