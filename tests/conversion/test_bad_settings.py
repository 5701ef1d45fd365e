"""Settings of a wrong kind, or that do not fit: one line that names the file and the field, in all families."""

import json
import re

import pytest
from llava_sets import set_folder

from unimoe.cli import main
from unimoe.conversion.errors import ConversionError
from unimoe.conversion.settings import FIELDS, naming, read_settings

CUMO, MOE_LLAVA, EIGHT = set_folder("cumo"), set_folder("moellava"), set_folder("unimoe_8e") / "checkpoint"
SOURCES = {
    "cumo": {"checkpoint": CUMO / "CuMo-mixtral-8x7b", "vision-tower": CUMO / "openai" / "clip-tiny"},
    "moe-llava": {
        "checkpoint": MOE_LLAVA / "moellava-phi",
        "vision-tower": MOE_LLAVA / "openai" / "clip-vit-tiny-patch14",
    },
    "uni-moe": {
        "base": EIGHT / "Uni-MoE-speech-base",
        "checkpoint": EIGHT / "Uni_MoE_8e_e2",
        "vision-tower": EIGHT / "clip-vit-large-patch14-336",
        "speech-tower": EIGHT / "whisper-small",
        "experts": EIGHT / "Uni_MoE_8e_Experts",
    },
}
ABSENT = object()


@pytest.fixture
def refusal(tmp_path, capsys):
    """A function from a family, one of its files, a field and a value to the line with which the conversion is refused."""

    def refusal(family, option, name, field, value):
        if not all(folder.is_dir() for folder in SOURCES[family].values()):
            pytest.skip("the golden set is not there")
        args = ["convert", family, "--output", str(tmp_path / "output"), "--dry-run"]
        for source_option, source in SOURCES[family].items():
            folder = tmp_path / source_option
            folder.mkdir()
            for file in source.iterdir():
                (folder / file.name).symlink_to(file)
            args += [f"--{source_option}", str(folder)]
        file = tmp_path / option / name
        content = json.loads(file.read_text())
        *outer, last = field.split(".")
        inner = content
        for key in outer:
            inner = inner[key]
        if value is ABSENT:
            del inner[last]
        else:
            inner[last] = value
        file.unlink()
        file.write_text(json.dumps(content))
        assert main(args) == 1
        message = capsys.readouterr().err.strip()
        assert message.startswith(f"unimoe convert: {file}: ") and "\n" not in message, message
        return message.removeprefix(f"unimoe convert: {file}: ")

    return refusal


CHECKPOINT, TOWER = ("checkpoint", "config.json"), ("vision-tower", "config.json")
PREPROCESSOR, EIGHT_CONFIG = ("vision-tower", "preprocessor_config.json"), ("base", "8config.json")


@pytest.mark.parametrize(
    "family, place, field, value, message",
    [
        ("cumo", CHECKPOINT, "num_experts", ABSENT, r"num_experts missing, though vision encoder or connector have"),
        ("cumo", CHECKPOINT, "num_selected", ABSENT, r"num_selected missing, though"),
        ("cumo", CHECKPOINT, "num_experts_per_tok", ABSENT, r"num_experts_per_tok missing, though the decoder has"),
        ("cumo", CHECKPOINT, "num_experts", None, r"num_experts missing"),
        ("cumo", CHECKPOINT, "num_experts", "x", r"num_experts='x'; a whole number or a list of them is needed"),
        ("cumo", CHECKPOINT, "num_experts", True, r"num_experts=True; a whole number"),
        ("cumo", CHECKPOINT, "attention_dropout", {}, r"attention_dropout=\{\}; a number is needed"),
        ("cumo", CHECKPOINT, "use_cache", "x", r".*field 'use_cache'"),
        ("cumo", CHECKPOINT, "hidden_act", "x", r"hidden_act='x'; the name of an activation"),
        ("cumo", CHECKPOINT, "num_key_value_heads", -1, r"num_key_value_heads=-1; a positive whole number"),
        ("cumo", CHECKPOINT, "mm_projector_type", [1], r"mm_projector_type=\[1\]; a text is needed"),
        ("cumo", CHECKPOINT, "mm_vision_select_feature", {}, r"mm_vision_select_feature=\{\}; a text"),
        ("cumo", CHECKPOINT, "model_type", [1], r"model_type=\[1\]; a text"),
        ("cumo", CHECKPOINT, "balance_loss_coef", [1], r"balance_loss_coef=\[1\]; a number"),
        ("cumo", CHECKPOINT, "router_z_loss_coef", float("nan"), r"router_z_loss_coef=nan; a number"),
        ("cumo", CHECKPOINT, "rope_theta", [1], r"rope_theta=\[1\]; a number"),
        ("cumo", TOWER, "vision_config", None, r"vision_config=None; a JSON object is needed; download"),
        ("cumo", TOWER, "vision_config", [1], r"vision_config=\[1\]; a JSON object"),
        ("cumo", TOWER, "vision_config.num_attention_heads", ABSENT, r".*attention heads"),
        ("cumo", TOWER, "vision_config.num_attention_heads", 5, r".*attention heads"),
        ("cumo", TOWER, "vision_config.hidden_act", "x", r"vision_config\.hidden_act='x'; the name"),
        ("cumo", TOWER, "vision_config.attention_dropout", "x", r"vision_config\.attention_dropout='x'; a number"),
        ("cumo", PREPROCESSOR, "crop_size", None, r"makes images of the size None"),
        ("cumo", PREPROCESSOR, "crop_size", [1], r""),
        ("cumo", PREPROCESSOR, "crop_size.height", {}, r""),
        ("moe-llava", CHECKPOINT, "moe.top_k_experts", "x", r"moe\.top_k_experts='x'; a whole number"),
        ("moe-llava", CHECKPOINT, "moe.moe_layers_idx", 2.5, r"moe\.moe_layers_idx=2\.5; a list of whole numbers"),
        ("moe-llava", CHECKPOINT, "moe.num_experts", ABSENT, r"moe\.num_experts missing, though the weights"),
        ("moe-llava", CHECKPOINT, "moe.router_aux_loss_coef", [1], r"moe\.router_aux_loss_coef=\[1\]; a number"),
        ("moe-llava", CHECKPOINT, "mm_vision_select_layer", "x", r"mm_vision_select_layer='x'; a whole number"),
        ("moe-llava", CHECKPOINT, "image_projector_type", 2.5, r"image_projector_type=2\.5; a text"),
        ("moe-llava", TOWER, "hidden_act", "x", r"(vision_config\.)?hidden_act='x'"),
        ("uni-moe", EIGHT_CONFIG, "vocab_size", "x", r"vocab_size='x'; a positive whole number"),
        ("uni-moe", EIGHT_CONFIG, "num_hidden_layers", ABSENT, r"num_hidden_layers missing"),
        ("uni-moe", EIGHT_CONFIG, "num_attention_heads", ABSENT, r"num_attention_heads missing"),
        ("uni-moe", EIGHT_CONFIG, "rope_scaling", "x", r"rope_scaling='x'; a JSON object"),
        ("uni-moe", EIGHT_CONFIG, "rope_scaling", {"type": "linear"}, r"rope_scaling\.factor missing"),
        ("uni-moe", ("speech-tower", "config.json"), "d_model", "x", r"d_model='x'; a positive whole number"),
        ("uni-moe", ("speech-tower", "config.json"), "activation_function", "x", r"activation_function='x'; the name"),
        ("uni-moe", ("speech-tower", "config.json"), "scale_embedding", "x", r".*field 'scale_embedding'"),
    ],
)
def test_bad_settings_are_named(refusal, family, place, field, value, message):
    assert re.match(message, refusal(family, *place, field, value))


def test_a_shard_that_is_no_name(refusal):
    message = refusal("cumo", "checkpoint", "model.safetensors.index.json", "weight_map", {"a": "b", "c": 5})
    assert message.startswith("'weight_map' has 5 as the file of c")


@pytest.mark.parametrize("value", [None, "missing"])
def test_absent_and_null_are_left_to_the_reader(tmp_path, value):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dict.fromkeys(FIELDS) if value is None else {}))
    assert not any(read_settings(file).values())


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), AttributeError("x"), RuntimeError("x\n  y"), ValueError("x")]
)
def test_whatever_else_goes_wrong_names_the_file(tmp_path, error):
    with pytest.raises(ConversionError) as raised, naming(tmp_path / "config.json"):
        raise error
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(raised.value)


def test_what_is_not_of_the_settings_passes(tmp_path):
    for error in (KeyboardInterrupt, PermissionError, MemoryError):
        with pytest.raises(error), naming(tmp_path / "config.json"):
            raise error
