"""A training run as a YAML file: what is read, what is trained, where it goes. Checked before anything is loaded."""

import dataclasses
import json
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import DistributedConfig, TrainingArguments

from .parts import PARTS
from .recipe_fields import EXPERTS, LORA, UPCYCLE, check_fields, check_types, trainer_fields

# YAML 1.1 reads "2e-5" as a text.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
# Fields that may differ between a run and its continuation.
_FREE = {"output"}


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Args:
        model: folder of the checkpoint that the stage starts from, with its processor.
        data: JSON or JSONL files, see `read_records`.
        output: folder of the run: `checkpoint-N` while it runs; afterwards `model`, a whole checkpoint that the next stage
            starts from, and with LoRA also `adapter`.
        train: parts trained whole, see `parts.PARTS`; everything else is frozen. Not together with `lora`.
        lora: arguments of `lora_config` (`r`, `alpha`, `attention`, `ffn`, `experts`, `routers`, `connectors`,
            `language_model_only`).
        experts: first make the decoder sparse: `from` (a dense checkpoint for each expert) or `copies` (that many of the
            model's own FFN), and `layers`, `top_k`, `connectors`, `router_aux_loss_coef`, `router_z_loss_coef`,
            `router_loss_scope`, `router_dtype`, `seed` as for `assemble_experts`.
        upcycle: first make parts sparse by exact copies of their FFNs: `text`, `vision` or `connector`, each with the fields of
            `UniMoESparsityConfig`, see `unimoe.upcycling.upcycle`.
        eval_data: files to evaluate on, where the trainer's `eval_strategy` asks for it.
        media_root: folder that relative paths in the data start from; default: each data file's own.
        max_length: longest row in tokens; default: the processor's.
        on_unreadable: "skip" or "stop", see `ConversationDataset`.
        sampling: "shuffled", "sorted" (see `ModalityGroupedSampler`) or "none" for Trainer's own order.
        dtype: of the weights in training.
        trainer: fields of `TrainingArguments`.
        distributed: fields of `transformers.DistributedConfig`, for weights that are sharded when they are loaded
            (`fsdp_size`, `ep_size`, `tp_size`, ...). `Trainer` cannot resume such a run, nor does an adapter fit one.
    """

    model: str
    data: list[str]
    output: str
    train: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    upcycle: dict[str, Any] | None = None
    eval_data: list[str] = field(default_factory=list)
    media_root: str | None = None
    max_length: int | None = None
    on_unreadable: Literal["skip", "stop"] = "skip"
    sampling: Literal["shuffled", "sorted", "none"] = "shuffled"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trainer: dict[str, Any] = field(default_factory=dict)
    distributed: dict[str, Any] | None = None

    def __post_init__(self):
        """Raises ValueError for whatever can be seen to be wrong without reading a file."""
        check_types("", vars(self), typing.get_type_hints(type(self)))
        unknown = sorted(set(self.train) - set(PARTS))
        if unknown:
            raise ValueError(f"train: {unknown[0]!r} is unknown; the parts are {', '.join(PARTS)}")
        for name, fields in (("lora", LORA), ("experts", EXPERTS), ("upcycle", UPCYCLE)):
            if getattr(self, name) is not None:
                check_fields(name, getattr(self, name), fields)
        for name in ("r", "alpha"):
            if (self.lora or {}).get(name, 1) <= 0:
                raise ValueError(f"lora: {name!r} must be positive, found {self.lora[name]!r}")
        if bool(self.train) == (self.lora is not None):
            raise ValueError("give either 'train' (parts trained whole) or 'lora' (an adapter)")
        if self.experts is not None and ("from" in self.experts) == ("copies" in self.experts):
            raise ValueError("experts: give either 'from' (a checkpoint for each expert) or 'copies' (their number)")
        check_fields("trainer", self.trainer, trainer_fields(), of="TrainingArguments")
        if self.distributed is not None:
            check_fields("distributed", self.distributed, typing.get_type_hints(DistributedConfig))
        if self.distributed is not None and self.lora is not None:
            raise ValueError(
                "distributed: PEFT's adapters do not fit weights that are sharded when they are loaded; use DDP or "
                "'fsdp: true' under 'trainer'"
            )
        if self.sampling == "none" and (self.distributed is not None or self.trainer.get("fsdp")):
            raise ValueError(
                "sampling: with sharded weights all processes must run the same towers; it is 'shuffled' or 'sorted'"
            )

    @classmethod
    def read(cls, file: str | os.PathLike) -> "Recipe":
        """A recipe from a YAML file; paths in it start from the working directory.

        Raises:
            ValueError: the file is no YAML mapping, or a field is unknown, missing or wrong; names the file and the field.
            ImportError: PyYAML is not installed.
            OSError: the file cannot be read.
        """
        try:
            import yaml
        except ImportError:
            raise ImportError("recipes need PyYAML: pip install 'unimoe[train]'") from None
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a recipe is a mapping of fields, see docs/training.md")
        known = {item.name: item for item in dataclasses.fields(cls)}
        try:
            check_fields("recipe", content, dict.fromkeys(known, Any))
            for name in ("model", "data", "output"):
                if not content.get(name):
                    raise ValueError(f"{name!r} is missing")
            for name in ("data", "eval_data", "train"):
                if isinstance(content.get(name), str):
                    content[name] = [content[name]]
            return cls(**_numbers(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None

    def identity(self, num_processes: int = 1) -> dict[str, Any]:
        """What a continuation must have in common with the run that it continues, as it stands in JSON.

        How a step is cut over processes and micro-batches may differ, not the number of its samples.
        """
        content = {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE}
        trainer = dict(content["trainer"])
        content["samples_per_step"] = num_processes
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            content["samples_per_step"] *= trainer.pop(name, TrainingArguments.__dataclass_fields__[name].default)
        content["trainer"] = trainer
        return json.loads(json.dumps(content, sort_keys=True))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
