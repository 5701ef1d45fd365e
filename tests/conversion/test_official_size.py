"""The audio release at its official size, as files with holes: names, shapes and totals without the bytes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from uni_moe_sets import find_set

from unimoe.cli import main
from unimoe.conversion.plan import model_shapes
from unimoe.conversion.uni_moe import UniMoEPaths, plan_uni_moe

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_conversion.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_conversion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def release(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    return folder, script.write_release(folder, 32, fill=False)


def test_names_and_shapes_are_the_recorded_ones(script):
    found = find_set("unimoe_audio")
    file = found.parent / "official_size_keys.json" if found else None
    if file is None or not file.is_file():
        pytest.skip("the list of official names is not there")
    recorded = json.loads(file.read_text())
    ours = {
        "base_hf_weights": script.base_shapes(32),
        "clip_vision_part": script.clip_shapes(),
        "beats_pt_model": script.beats_shapes(),
        "e2_adapter_model": script.adapter_shapes(32),
        "e2_mlp_gates": script.gate_shapes(32),
        "e2_mm_audio_aligner": script.aligner_shapes(),
        "e2_non_lora_trainables": script.projector_shapes("base_model.model.model."),
    }
    for part, shapes in ours.items():
        expected = {name: tuple(shape) for name, shape in recorded[part].items() if "inv_freq" not in name}
        assert {name: tuple(shape) for name, shape in shapes.items()} == expected


def test_the_whole_release_is_planned(release, capsys):
    folder, options = release
    assert main(["convert", "uni-moe", *options, "--output", str(folder / "model"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "writes: 1182 tensors, 27.50 GB in float16" in text


@pytest.mark.parametrize("layers, activated, total", [("even", 8.9, 13.2), ("all", 11.1, 19.7)])
def test_parameters_are_those_of_the_paper(release, layers, activated, total, capsys, tmp_path):
    """Table of the paper: billions of activated and of all parameters for 16 and for 32 sparse layers."""
    folder, options = release
    paths = UniMoEPaths(*(Path(path) for path in options[1::2]))
    config = plan_uni_moe(paths).config
    config.text_sparsity.layers = layers
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {
        row[0]: [float(value.replace(",", "")) / 1e9 for value in row[1:]]
        for row in rows
        if row and row[0] in ("all", "language_model")
    }
    decoder = sizes["language_model"]
    assert decoder[0] == pytest.approx(total, abs=0.6) and decoder[1] == pytest.approx(activated, abs=0.6), sizes
    assert sum(torch.Size(shape).numel() for shape in model_shapes(config).values()) / 1e9 == pytest.approx(
        sizes["all"][0], abs=0.01
    )
