"""LoRA for a decoder with experts: what PEFT has to be told about 3-D parameters, and checked loading and merging.

PEFT adapts an expert parameter [E, out, in] with one pair of rank r an expert. Its modules are named in full, since the
towers have projections of the same names.
"""

import os
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..modeling_unimoe.adapter_check import check_adapter
from .parts import CONNECTORS, TOWERS, part_of

# Parts of the sound towers' layers by the decoder's names for them.
_LIKE_DECODER = {"attention": "self_attn", "feed_forward": "mlp", "fc1": "mlp", "fc2": "mlp"}


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
        asked = [part for part, on in wanted.items() if on]
        reason = f"the model has none of {asked}" if asked else f"{', '.join(wanted)} are all off; turn one on"
        raise ValueError(f"nothing to adapt: {reason}")
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
