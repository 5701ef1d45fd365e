"""Whether a PEFT adapter was made for a model, told from names and shapes before any weight is read."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")


def check_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Raises ValueError where an adapter's folder is incomplete or does not fit a model."""
    folder = Path(folder)
    config_file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config_file, weights):
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name} there; give the folder of an adapter")
    config = json.loads(config_file.read_text())
    modules = _endings(name for name, _ in model.named_modules())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    named = config.get("target_modules") or []
    targets = [] if isinstance(named, str) else [*named, *(config.get("modules_to_save") or [])]
    missing = [name for name in targets if "." in name and name not in modules]
    parameters = _endings(shapes)
    missing += [name for name in config.get("target_parameters") or [] if "." in name and name not in parameters]
    wrong = []
    with safe_open(weights, "pt") as file:
        for key in file.keys():
            shape, whole, pair = (
                tuple(file.get_slice(key).get_shape()),
                key.removeprefix(_PREFIX),
                _PAIR.fullmatch(key),
            )
            if pair is None and whole in shapes and shapes[whole] != shape:
                wrong.append(f"{whole} is {list(shapes[whole])}, not {list(shape)}")
            elif pair is not None and len(shapes.get(f"{pair[1]}.weight", ())) == 2:
                # A is [rank, in], B is [out, rank].
                side = 1 if pair[2] == "A" else 0
                expected = shapes[f"{pair[1]}.weight"]
                if shape[side] != expected[side]:
                    wrong.append(f"{pair[1]} is {list(expected)}, its lora_{pair[2]} {list(shape)}")
    # Expert pairs of another number or width of experts.
    wrong += _wrong_experts(shapes, weights, config)
    if missing or wrong:
        reasons = ([f"the model has no {missing[0]}"] if missing else []) + wrong[:1]
        count = len(missing) + len(wrong)
        base = config.get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: this adapter was made for another model ({base}): {'; '.join(reasons)}"
            + (f" and {count - len(reasons)} more" if count > len(reasons) else "")
        )


def _endings(names: Iterable[str]) -> set[str]:
    """All that PEFT takes for one of the names: the name, or what stands behind one of its dots. (It stores many targets by
    their shortest such ends.)"""
    return {name.split(".", dots)[-1] for name in names for dots in range(name.count(".") + 1)}


def _wrong_experts(shapes: dict[str, tuple], weights: Path, config: dict[str, Any]) -> list[str]:
    """Differences of the experts' pairs: `experts.lora_A` is the last wrapped parameter's, `experts.base_layer...` others'."""
    wrong = []
    with safe_open(weights, "pt") as file:
        keys = set(file.keys())
        for name in config.get("target_parameters") or []:
            if name not in shapes or len(shapes[name]) != 3:
                continue
            num_experts, out_features, in_features = shapes[name]
            prefix = f"{_PREFIX}{name.rsplit('.', 1)[0]}."
            found = {
                (
                    tuple(file.get_slice(a).get_shape()),
                    tuple(file.get_slice(a.replace("lora_A", "lora_B")).get_shape()),
                )
                for a in keys
                if a.startswith(prefix) and a.endswith("lora_A.weight")
            }
            rank = config["r"] * num_experts
            if found and ((rank, in_features), (out_features, rank)) not in found:
                wrong.append(f"{name} is {list(shapes[name])}, its pairs have the shapes {sorted(found)}")
    return wrong
