"""LoRA for a decoder with experts: what PEFT has to be told about 3-D parameters, and checked loading and merging.

PEFT adapts an expert parameter [E, out, in] with one pair of rank r an expert. Its modules are named in full, since the
towers have projections of the same names.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from .parts import CONNECTORS, TOWERS, part_of

# Parts of the sound towers' layers by the decoder's names for them.
_LIKE_DECODER = {"attention": "self_attn", "feed_forward": "mlp", "fc1": "mlp", "fc2": "mlp"}
_PREFIX = "base_model.model."
_PAIR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")


def lora_config(
    model: PreTrainedModel,
    r: int = 8,
    alpha: int = 16,
    *,
    attention: bool = True,
    ffn: bool = True,
    experts: bool = True,
    routers: bool = False,
    connectors: bool = True,
    language_model_only: bool = True,
    **kwargs: Any,
) -> LoraConfig:
    """The `LoraConfig` for a `UniMoEForConditionalGeneration`; pass it to `peft.get_peft_model`.

    Args:
        model: the model that will be adapted; only the names and shapes of its parameters are read.
        r, alpha: rank and scale as in `LoraConfig`; the paper takes 8 and 16 for stage 3, 64 and 16 for stage 2. For
            experts the rank is that of each expert.
        attention: adapt the attention's projections.
        ffn: adapt the dense FFNs.
        experts: adapt the experts (3-D parameters, through `target_parameters`).
        routers: train the routers. They are tiny and are trained whole (`modules_to_save`), not through a pair.
        connectors: train the connectors whole (`modules_to_save`).
        language_model_only: False adapts the towers' attention and FFNs (and experts) too.
        kwargs: further fields of `LoraConfig`. `lora_dropout` must be 0 with experts, as PEFT wants it.

    Raises:
        ValueError: nothing is left to adapt, or `lora_dropout` is not 0 with experts.
    """
    wanted = {"attention": attention, "ffn": ffn, "experts": experts}
    target_modules, target_parameters, saved = [], [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _wanted_kind(name, wanted, language_model_only) in ("attention", "ffn"):
            target_modules.append(name)
        elif type(module).__name__.endswith("TopKRouter") and routers and part_of(f"{name}.weight") == "routers":
            saved.append(name)
        elif name.rsplit(".", 1)[-1] in CONNECTORS and connectors:
            saved.append(name)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and _wanted_kind(name, wanted, language_model_only) == "experts":
            target_parameters.append(name)
    if not target_modules and not target_parameters:
        raise ValueError(f"nothing to adapt: the model has none of {[part for part, on in wanted.items() if on]}")
    if target_parameters and kwargs.get("lora_dropout"):
        raise ValueError(
            "lora_dropout must be 0 where experts are adapted: PEFT merges their adapters into the weights"
        )
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        target_parameters=target_parameters or None,
        modules_to_save=saved or None,
        **{"task_type": "CAUSAL_LM", **kwargs},
    )


def _wanted_kind(name: str, wanted: dict[str, bool], language_model_only: bool) -> str | None:
    """ "attention", "ffn" or "experts" where the parameter or module is to be adapted, else None."""
    fields = name.split(".")
    in_tower = any(tower in fields for tower in TOWERS)
    if any(connector in fields for connector in CONNECTORS) or (in_tower and language_model_only):
        return None
    # CLIP's layers are named like the decoder's, those of BEATs and Whisper nearly so.
    kind = part_of(".".join(_LIKE_DECODER.get(field, field) for field in fields if field not in TOWERS))
    return kind if wanted.get(kind) else None


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` that first compares the adapter with the model.

    Args:
        model: the model that the adapter was made for.
        folder: of the adapter, as `save_pretrained` or `Trainer` writes it.
        is_trainable: whether to train it further.

    Raises:
        ValueError: the folder holds no adapter, or one for another model; names what differs.
    """
    check_adapter(model, folder)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def check_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Raises ValueError where an adapter's folder is incomplete or does not fit a model."""
    folder = Path(folder)
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name} there; give the folder of an adapter")
    config = json.loads(config_file.read_text())
    modules = {name for name, _ in model.named_modules()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    named = config.get("target_modules") or []
    targets = [] if isinstance(named, str) else [*named, *(config.get("modules_to_save") or [])]
    missing = [name for name in targets if "." in name and name not in modules]
    missing += [name for name in config.get("target_parameters") or [] if "." in name and name not in shapes]
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


def merge_adapter(model: PeftModel, folder: str | os.PathLike, processor: Any = None) -> PreTrainedModel:
    """Merges an adapter into its model and saves the result as a plain checkpoint folder, ready for the hub.

    Returns:
        The merged model.
    """
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return merged
