"""What all UniMoE models share: what Transformers may set on them, initial weights, saving and strict loading."""

import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .adapter_check import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from .configuration_unimoe import UniMoEConfig
from .connectors import init_connector_weights
from .sorted_experts import PrefersUnimoeExperts
from .sparse_moe import init_sparse_moe_weights


class UniMoEPreTrainedModel(PrefersUnimoeExperts, PreTrainedModel):
    config: UniMoEConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Transformers decides this from the source text of this file, where no experts class stands.
    _can_set_experts_implementation_cached_value = True
    # Whether `from_pretrained` refuses a checkpoint that does not fill the model exactly.
    strict_loading = True

    def post_init(self):
        super().post_init()
        # Towers bring the names of modules that only other models of their family have, which FSDP refuses.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        init_connector_weights(module, std)
        init_sparse_moe_weights(module, std)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """As [`PreTrainedModel.set_attn_implementation`], without a warning for each sub-config that no model has.

        (Those of routing and of connectors have no attention, yet Transformers wants it set there too.)
        """
        request, current = attn_implementation, self.config._attn_implementation
        if not isinstance(request, dict) and request != current:
            # What stands in for it here, such as a kernel from the hub, is what Transformers would hand on to the parts.
            request = self._check_and_adjust_attn_implementation(request, allow_all_kernels=allow_all_kernels)
        models = {id(module.config) for module in self.modules() if isinstance(module, PreTrainedModel)}
        super().set_attn_implementation(_set_where_no_model(request, self.config, models), allow_all_kernels)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As [`PreTrainedModel.save_pretrained`], but tensors keep this model's names unless the originals' are asked for.

        (Transformers' default would write the towers and a Mixtral decoder under their pre-v5 names.)
        """
        own = type(self)
        # FSDP replaces the class of a model that it shards, and Transformers would save the code of that class beside it.
        self.__class__ = next(cls for cls in own.__mro__ if not cls.__name__.startswith("FSDP"))
        try:
            return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        finally:
            self.__class__ = own

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As [`PreTrainedModel.load_adapter`], which also serves `from_pretrained` with an adapter's folder.

        Raises:
            ValueError: The adapter was made for another model; names what differs.
        """
        is_local = isinstance(peft_model_id, (str, os.PathLike)) and all(
            os.path.isfile(os.path.join(peft_model_id, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
        # An adapter that is there already has renamed modules.
        if is_local and not self._hf_peft_config_loaded:
            check_adapter(self, peft_model_id)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`], but a checkpoint must fill the model exactly.

        Raises:
            ValueError: Tensors are missing, left over or of another shape than the configuration gives them. Pass
                `ignore_mismatched_sizes=True` to accept such a checkpoint as Transformers does.
        """
        lenient = kwargs.get("ignore_mismatched_sizes", False) or not cls.strict_loading
        wants_info = kwargs.pop("output_loading_info", False)
        if not lenient:
            # Transformers' own refusal prints a table; ours names the tensors in one message with the other two kinds.
            kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not lenient:
            _check_loading_info(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model


def _set_where_no_model(request: str | dict, config: PreTrainedConfig, models: set[int]) -> dict:
    """Sets what is requested of configs whose `id` is not in `models`; the rest of the request for `config`, as a dict."""
    if not isinstance(request, dict):
        request = dict.fromkeys(["", *config.sub_configs], request)
    named = {
        name: request[name] for name in config.sub_configs if name in request and getattr(config, name) is not None
    }
    rest = {name: _set_where_no_model(asked, getattr(config, name), models) for name, asked in named.items()}
    if "" in request and id(config) in models:
        rest[""] = request[""]
    elif "" in request:
        # On the internal attribute, which does not set the sub-configs too.
        config._attn_implementation_internal = request[""]
    return rest


def _check_loading_info(folder, info: dict):
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape than the config gives them": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    found = []
    for kind, names in problems.items():
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{len(names)} tensors are {kind} ({', '.join(names[:3])}{rest})")
    if found:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fill the model that its config describes: {'; '.join(found)}. Load a "
            "complete checkpoint, or pass ignore_mismatched_sizes=True to start the rest from random weights."
        )
