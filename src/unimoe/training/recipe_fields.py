"""The fields of a recipe's sections, their types, and the check of what a file gives for them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from transformers import TrainingArguments

from ..modeling_unimoe.configuration_unimoe import LAYER_PATTERNS

LORA = {
    "r": int,
    "alpha": float,
    "attention": bool,
    "ffn": bool,
    "experts": bool,
    "routers": bool,
    "connectors": bool,
    "language_model_only": bool,
}
EXPERTS = {
    "from": list[str],
    "copies": int,
    "layers": Literal[LAYER_PATTERNS] | list[int],
    "top_k": int,
    "connectors": dict[str, str],
    "router_aux_loss_coef": float,
    "router_z_loss_coef": float,
    "router_loss_scope": Literal["batch", "sample"],
    "router_dtype": str | None,
    "seed": int,
}
UPCYCLE = {"text": dict | None, "vision": dict | None, "connector": dict | None}

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping of fields",
    type(None): "nothing",
}


def trainer_fields() -> dict[str, Any]:
    """The fields of `TrainingArguments`, with the types of those that are numbers or switches.

    Others take more than their annotations say: `fsdp` is also true or false.
    """
    hints = typing.get_type_hints(TrainingArguments)
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init} - {"output_dir"}
    simple = {int, float, bool, type(None)}
    return {
        name: hints[name] if set(typing.get_args(hints[name]) or [hints[name]]) <= simple else Any for name in names
    }


def check_fields(section: str, given: Any, known: Mapping[str, Any], of: str = "") -> None:
    """Raises ValueError where `given` is no mapping, or has a field that is unknown or of another type than `known` says.

    `of` names what the fields belong to, where they are too many to be listed.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{section} must be a mapping of fields, found {given!r:.40}")
    unknown = sorted(set(map(str, given)) - set(known))
    if unknown:
        hint = f" to {of}" if of else f"; known are {', '.join(known)}"
        raise ValueError(f"{section}: field {unknown[0]!r} is unknown{hint}")
    check_types(f"{section}: ", given, known)


def check_types(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ValueError where a field's value is not of its type."""
    for name, value in given.items():
        if not _fits(value, known[name]):
            raise ValueError(f"{prefix}{name!r} must be {_describe(known[name])}, found {value!r:.60}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, as far as YAML can tell."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    if kind in (int, float):
        return type(value) is int or (kind is float and type(value) is float)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        known = dict.fromkeys(_describe(one) for one in arguments)
        return " or ".join(known)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is list:
        return f"a list, each of it {_describe(arguments[0])}"
    if origin is dict:
        return _NAMES[dict]
    return _NAMES.get(kind, f"a {kind.__name__}" if isinstance(kind, type) else str(kind))
