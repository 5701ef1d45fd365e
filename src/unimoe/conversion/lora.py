"""PEFT LoRA adapters, merged lazily: a weight with an adapter becomes an expression, nothing is computed yet."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConversionError
from .expressions import Expression, LowRankUpdate
from .reader import SourceTensor, read_file, read_json

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# "base_model.model.<module>.lora_A.weight"; PEFT writes the adapter's name between in files that it saves otherwise.
ADAPTER_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraAdapter:
    """The pairs of an adapter by the name of the weight that they change, `<module>.weight`.

    The merged weight is `W + B @ A * scale`, where `scale` is `lora_alpha / r`.
    """

    pairs: Mapping[str, tuple[SourceTensor, SourceTensor]]
    scale: float

    def without(self, pattern: re.Pattern[str]) -> tuple["LoraAdapter", list[SourceTensor]]:
        """The adapter without the pairs whose weights match `pattern`, and the tensors of those."""
        left_out = [tensor for name, pair in self.pairs.items() if pattern.fullmatch(name) for tensor in pair]
        return LoraAdapter({k: v for k, v in self.pairs.items() if not pattern.fullmatch(k)}, self.scale), left_out

    def merge(self, weights: Mapping[str, Expression]) -> dict[str, Expression]:
        """The same weights, those with a pair as updates. Raises ConversionError where a pair's weight is missing."""
        missing = [name for name in self.pairs if name not in weights]
        if missing:
            raise ConversionError(
                f"{self.pairs[missing[0]][0].file}: adapts {', '.join(missing[:3])}, which the base has not: adapter and "
                "base do not belong together"
            )
        merged = dict(weights)
        for name, (a, b) in self.pairs.items():
            merged[name] = LowRankUpdate(weights[name], a, b, self.scale)
        return merged


def read_adapter(folder: Path) -> LoraAdapter | None:
    """The PEFT adapter in a folder; None where there is none.

    Raises:
        ConversionError: Half of an adapter is missing, or it is of a kind that cannot be merged as plain LoRA.
    """
    config_file = folder / "adapter_config.json"
    files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not config_file.is_file() and not files:
        return None
    if not config_file.is_file() or not files:
        missing = "adapter_config.json" if files else ADAPTER_FILES[1]
        raise ConversionError(f"{folder}: {missing} is missing, which belongs to the adapter there; download it too")
    config = read_json(config_file)
    _check_plain_lora(config, config_file)
    halves: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in read_file(files[0]).items():
        match = ADAPTER_KEY.fullmatch(name)
        if match is None:
            raise ConversionError(f"{files[0]}: {name} is not part of a plain LoRA adapter, which alone can be merged")
        halves.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor
    incomplete = [name for name, sides in halves.items() if len(sides) != 2]
    if incomplete:
        raise ConversionError(f"{files[0]}: {incomplete[0]} has only one half of its pair; the file is incomplete")
    pairs = {name: (sides["A"], sides["B"]) for name, sides in halves.items()}
    wrong = [a for a, _ in pairs.values() if a.shape[0] != config["r"]]
    if wrong:
        raise ConversionError(
            f"{files[0]}: {wrong[0].name} has rank {wrong[0].shape[0]}, {config_file} says r={config['r']}"
        )
    return LoraAdapter(pairs, config["lora_alpha"] / config["r"])


def _check_plain_lora(config: dict, file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: peft_type {config.get('peft_type')!r}; only 'LORA' adapters can be merged")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            raise ConversionError(f"{file}: {name} must be a positive number, found {config.get(name)!r}")
    for name in ("fan_in_fan_out", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(name):
            raise ConversionError(f"{file}: {name}={config[name]!r} is not supported; only plain LoRA can be merged")
    if config.get("bias", "none") != "none":
        raise ConversionError(f"{file}: bias={config['bias']!r} is not supported; only plain LoRA can be merged")
