"""What the LLaVA-like originals have in common: fields of `config.json` and projectors."""

import re
from pathlib import Path
from typing import Any

from ..modeling_unimoe.configuration_unimoe import LAYER_PATTERNS, UniMoEConfig, resolve_layers
from .errors import ConversionError
from .expressions import Expression
from .plan import Account, Plan, model_shapes
from .settings import naming


def select_layer(config: dict[str, Any]) -> int:
    """The layer of the vision tower that the decoder sees; the last but one where the original does not say."""
    layer = config.get("mm_vision_select_layer")
    return -2 if layer is None else layer


def projector(config: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """Settings of a projector from its field `name`: 'linear' (also where absent) or 'mlp<n>x_gelu'."""
    kind = config.get(name) or "linear"
    if kind == "linear":
        return {"type": "linear", "num_layers": 1}
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return {"type": "mlp", "num_layers": int(match[1]), "hidden_act": "gelu"}
    raise ConversionError(f"{file}: {name}={kind!r} is not supported; known are 'linear' and 'mlp<n>x_gelu'")


def select_strategy(config: dict[str, Any], file: Path) -> str:
    """What becomes of `mm_vision_select_feature`: 'patch' (also where absent) leaves out the first token."""
    strategies = {"patch": "default", "cls_patch": "full"}
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature not in strategies:
        raise ConversionError(f"{file}: mm_vision_select_feature={feature!r} is unknown; it is 'patch' or 'cls_patch'")
    return strategies[feature]


def layer_pattern(indices: list[int], num_layers: int) -> str | list[int]:
    """The name of a set of sparse layers, or the list itself."""
    for pattern in LAYER_PATTERNS:
        try:
            if resolve_layers(pattern, num_layers) == indices:
                return pattern
        except ValueError:  # half of a single layer is none
            continue
    return indices


def build(fields: dict[str, Any], file: Path) -> UniMoEConfig:
    """The configuration. Raises ConversionError, which names the original's file, for whatever does not fit together."""
    with naming(file):
        return UniMoEConfig(**fields)


def complete(account: Account, targets: dict[str, Expression], config: UniMoEConfig, file: Path, where: str) -> Plan:
    """The plan, compared with the model of this configuration.

    Args:
        file: The original's `config.json`.
        where: The folders with its tensors, for errors.

    Raises:
        ConversionError: No model can be built from the settings, or the tensors are not the model's.
    """
    with naming(file):
        shapes = model_shapes(config)
    plan = account.plan(targets)
    try:
        plan.check(shapes)
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None
    return plan


def sequential_targets(weights: dict[str, Expression], source: str, target: str) -> dict[str, Expression]:
    """Takes a projector out of `weights`: one Linear, or an nn.Sequential with an activation between Linears."""
    targets = {}
    for name in [name for name in weights if name.startswith(f"{source}.")]:
        inner = name.removeprefix(f"{source}.")
        if match := re.fullmatch(r"(?:(\d+)\.)?(weight|bias)", inner):
            targets[f"{target}.layers.{int(match[1] or 0) // 2}.{match[2]}"] = weights.pop(name)
    return targets
