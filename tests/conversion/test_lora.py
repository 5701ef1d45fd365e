"""Merged adapters against the formula and against PEFT itself."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from unimoe.conversion.errors import ConversionError
from unimoe.conversion.expressions import Concatenate, LowRankUpdate, Stack, evaluate
from unimoe.conversion.lora import read_adapter
from unimoe.conversion.reader import read_file

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q"]}


def write_adapter(folder, pairs, prefix="base_model.model.", **config):
    torch.manual_seed(1)
    tensors = {}
    for module, (rows, columns) in pairs.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(rows, 4)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return tensors


def write_base(folder, names, dtype=torch.float32):
    torch.manual_seed(2)
    tensors = {name: torch.randn(6, 5).to(dtype) for name in names}
    torch.save(tensors, folder / "base.bin")
    return tensors, read_file(folder / "base.bin")


def test_merge_is_the_formula_in_float32(tmp_path):
    """Also for experts and gates; weights without a pair stay the files' own."""
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.1.up_proj",
        "model.layers.0.mlp.gate",
        "model.norm",
    ]
    base, lazy = write_base(tmp_path, [f"{name}.weight" for name in names], torch.float16)
    pairs = write_adapter(tmp_path / "adapter", {name: (6, 5) for name in names[:3]})
    merged = read_adapter(tmp_path / "adapter").merge(lazy)
    for name in names[:3]:
        a, b = (pairs[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = base[f"{name}.weight"].double() + 2.0 * b.double() @ a.double()
        torch.testing.assert_close(
            evaluate(merged[f"{name}.weight"], torch.float32), expected.float(), atol=1e-5, rtol=0
        )
    assert merged["model.norm.weight"] is lazy["model.norm.weight"]


def test_merge_is_pefts(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6, bias=False), torch.nn.Linear(6, 3, bias=False))
    torch.save(model.state_dict(), tmp_path / "base.bin")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = read_adapter(tmp_path / "adapter").merge(read_file(tmp_path / "base.bin"))
    expected = adapted.merge_and_unload().state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(evaluate(merged[name], torch.float32), weight, atol=1e-6, rtol=1e-5)


def test_an_adapter_inside_a_stack_is_merged_in_place(tmp_path):
    """Experts are merged one by one into the fused tensor, whatever its dtype."""
    base, lazy = write_base(tmp_path, [f"{i}.{part}.weight" for i in range(3) for part in ("gate", "up")])
    pairs = write_adapter(tmp_path / "adapter", {f"{i}.{part}": (6, 5) for i in range(3) for part in ("gate", "up")})
    merged = read_adapter(tmp_path / "adapter").merge(lazy)
    stack = Stack([Concatenate([merged[f"{i}.gate.weight"], merged[f"{i}.up.weight"]]) for i in range(3)])
    assert stack.shape == (3, 12, 5) and len(stack.sources) == 18
    fused = evaluate(stack, torch.bfloat16)
    for i in range(3):
        for j, part in enumerate(("gate", "up")):
            a, b = (pairs[f"base_model.model.{i}.{part}.lora_{side}.weight"] for side in "AB")
            expected = (base[f"{i}.{part}.weight"] + 2.0 * b @ a).bfloat16()
            torch.testing.assert_close(fused[i, 6 * j : 6 * j + 6], expected, atol=0.05, rtol=0.01)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    _, lazy = write_base(tmp_path, ["model.layers.0.q.weight"])
    write_adapter(tmp_path / "adapter", {"model.layers.9.q": (6, 5)})
    with pytest.raises(ConversionError, match=r"adapts model\.layers\.9\.q\.weight, which the base has not"):
        read_adapter(tmp_path / "adapter").merge(lazy)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    _, lazy = write_base(tmp_path, ["q.weight"])
    write_adapter(tmp_path / "adapter", {"q": (6, 7)})
    with pytest.raises(ConversionError, match=r"q\.weight \(base\.bin\).*does not fit a weight of shape \(6, 5\)"):
        read_adapter(tmp_path / "adapter").merge(lazy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r must be a positive number"),
        ({"r": 3}, "has rank 4, .* says r=3"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number"),
        ({"use_dora": True}, "use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern"),
    ],
)
def test_other_kinds_of_adapter_are_refused(tmp_path, change, message):
    write_adapter(tmp_path / "adapter", {"q": (6, 5)}, **change)
    with pytest.raises(ConversionError, match=message):
        read_adapter(tmp_path / "adapter")


def test_half_an_adapter_is_refused(tmp_path):
    assert read_adapter(tmp_path) is None
    tensors = write_adapter(tmp_path / "adapter", {"q": (6, 5)})
    tensors.pop("base_model.model.q.lora_B.weight")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConversionError, match="only one half"):
        read_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConversionError, match="adapter_config.json is missing"):
        read_adapter(tmp_path / "adapter")


def test_safetensors_adapters_and_nested_updates(tmp_path):
    base, lazy = write_base(tmp_path, ["q.weight"])
    tensors = write_adapter(tmp_path / "adapter", {"q": (6, 5)}, prefix="")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path / "adapter")
    a, b = adapter.pairs["q.weight"]
    twice = LowRankUpdate(adapter.merge(lazy)["q.weight"], a, b, 0.5)
    expected = base["q.weight"] + 2.5 * tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"]
    torch.testing.assert_close(evaluate(twice, torch.float32), expected, atol=1e-5, rtol=1e-5)
