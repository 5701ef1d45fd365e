"""Making any Transformers model sparse in place, such that it stays a Transformers model.

Transformers asks a model's class, not its modules, which experts implementation may be set, which outputs are
recorded and how new weights are initialised. So the model, and every model inside it down to the one that owns the
layers, gets a subclass of its own class that answers for the sparse blocks too.
"""

import functools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    OutputRecorder,
    install_output_capuring_hook,
)

from .configuration_unimoe import UniMoEConfig, resolve_layers
from .dense_mlp import DenseMlp
from .layer_ffns import FfnPlace, ffn_place
from .router import UniMoETopKRouter
from .sorted_experts import PrefersUnimoeExperts
from .sparse_moe import UniMoESparseMoeBlock, init_sparse_moe_weights, initializer_std

CONFIG_KEY = "unimoe_sparsity"
# What says where a checkpoint's files are.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def sparsify(
    model: PreTrainedModel,
    layers: str | Sequence[int] = "all",
    num_experts: int | Sequence[int] = 4,
    top_k: int = 2,
    *,
    part: str | None = None,
    norm_topk_prob: bool = True,
    router_dtype: str | torch.dtype | None = None,
    copy_weights: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Swaps the FFNs of a Transformers model for sparse blocks, in place; nothing is changed unless all of it can be.

    `model` is a stack of layers with an FFN each (LlamaModel, CLIPVisionModel, ...) or a model around one such stack
    (LlamaForCausalLM). Of a model around several (Llava, CLIPModel), `part` says which is meant; a further call takes another.
    The parameters are then named `...layers.N.mlp.gate.weight`,
    `...mlp.experts.gate_up_proj` and so on (see `UniMoESparseMoeBlock`); where the FFN has another name, or lies in the layer in
    parts, that of the FFN or its first part stands for `mlp` (see `FFN_PLACES`). Afterwards
    - `model.set_experts_implementation(...)` and `config._experts_implementation` work, this package's "unimoe"
      being the default (a choice other than "eager" made before stays);
    - `output_router_logits=True` returns `router_logits`, a tuple with one [T, E] tensor per sparse layer, of one part after
      another;
    - `isinstance`, `generate`, gradient checkpointing, adapters, expert parallelism and `save_pretrained` work as
      before. What was saved is read back by `load_sparsified`, provided that `model` is the model that is saved and
      not a part of it.

    Args:
        model: the dense model.
        layers: "all", "even" (0, 2, ...), "odd", "first_half", "second_half", or layer numbers.
        num_experts: E, one number or one per chosen layer.
        top_k: experts per token.
        part: the name of a module inside the model, as in `named_modules()`, that has one stack of layers
            ("model.language_model"); None for a model that has no more than one, or one alone whose FFNs are called `mlp`.
        norm_topk_prob: whether the chosen weights sum to 1.
        router_dtype: dtype of the routers' linear maps; None keeps the model's.
        copy_weights: True upcycles: each expert is a copy of its layer's FFN, so the outputs stay what they were (with
            `norm_topk_prob`). False gives fresh random experts.
        options: `capacity_factor`, `eval_capacity_factor`, `min_capacity`, `random_token_selection` and `residual` of
            `UniMoESparseMoeBlock`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no Transformers model, or a chosen FFN is of an unknown kind, quantised or sparse.
        ValueError: an argument is out of range or does not fit the model, or the model has no such layers or several stacks.
    """
    options |= {"norm_topk_prob": norm_topk_prob, "router_dtype": router_dtype}
    stack_name, counts = plan_sparsify(model, layers, num_experts, top_k, part=part, **options)
    stack = model.get_submodule(stack_name)
    place, chain = ffn_place(stack), _chain(model, stack_name)
    owner = chain[-1][1]
    for index, count in counts.items():
        # One layer at a time, so that dense and sparse weights of the whole model never lie side by side.
        block = UniMoESparseMoeBlock.from_dense(
            place.ffn(stack[index]), count, top_k, copy_weights=copy_weights, config=owner.config, **options
        )
        place.put(stack[index], block)
    if getattr(owner, "_output_capturing_hooks_installed", False):
        # Transformers installs its hooks once, at the first request; these routers came after it.
        for index in counts:
            install_output_capuring_hook(place.ffn(stack[index]).gate, "router_logits", 0)
    for prefix, link in reversed(chain):
        _become_sparse(link)
        name = f"{stack_name.removeprefix(prefix).lstrip('.')}.*.{place.block}"
        _extend_parallel_plans(link, name, place.ffn(stack[next(iter(counts))]))
    # The dense class could only ever be "eager", so that is taken for no choice at all.
    chosen = owner.config._experts_implementation
    owner.config._experts_implementation_internal = owner.get_correct_experts_implementation(
        None if chosen == "eager" else chosen
    )
    return model


def plan_sparsify(
    model: PreTrainedModel,
    layers: str | Sequence[int],
    num_experts: int | Sequence[int],
    top_k: int,
    *,
    part: str | None = None,
    **options: Any,
) -> tuple[str, dict[int, int]]:
    """What `sparsify` would do with these arguments; the model is left as it is.

    Returns:
        The name of the stack of layers, and the number of experts of each chosen layer.

    Raises:
        TypeError, ValueError: as `sparsify`, for all that it refuses.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise TypeError(f"{type(model).__name__} is quantised; make it sparse before quantising it")
    stack_name = _find_layers(model, part)
    stack = model.get_submodule(stack_name)
    place = ffn_place(stack)
    counts = _experts_by_layer(resolve_layers(layers, len(stack)), num_experts)
    for index, count in counts.items():
        try:
            dense = DenseMlp.read(place.ffn(stack[index]))
            place.check(stack[index])
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {index} of {type(model).__name__}: {error}") from None
        UniMoESparseMoeBlock.on_meta(dense, count, top_k, **options)
    _check_no_other_routers(model)
    return stack_name, counts


def _check_no_other_routers(model: PreTrainedModel) -> None:
    """Refuses models that are sparse of themselves: they hand out, and balance, the logits of their own routers."""
    if isinstance(model.config, UniMoEConfig):
        raise ValueError(
            f"{type(model).__name__} is made sparse by its configuration: `text_sparsity` and `vision_sparsity` of UniMoEConfig"
        )
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or isinstance(module, SparseModelMixin):
            continue
        recorded = (module._can_record_outputs or {}).get("router_logits", [])
        recorders = recorded if isinstance(recorded, list) else [recorded]
        # Classes of models that may be dense or sparse name their routers in any case.
        kinds = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
        if any(isinstance(inner, kinds) for inner in module.modules()):
            where = f"{name} of {type(model).__name__}" if name else type(model).__name__
            raise ValueError(
                f"{where} has routers of its own, whose logits would be mixed up with those of the new ones; pass a dense model, "
                "or as the model a dense part of this one"
            )


def _experts_by_layer(indices: list[int], num_experts: int | Sequence[int]) -> dict[int, int]:
    if isinstance(num_experts, int):
        return dict.fromkeys(indices, num_experts)
    if isinstance(num_experts, str) or not isinstance(num_experts, Iterable):
        raise ValueError(f"num_experts must be a positive integer or one per chosen layer, got {num_experts!r}")
    counts = list(num_experts)
    if len(counts) != len(indices):
        raise ValueError(f"num_experts has {len(counts)} entries for {len(indices)} chosen layers {indices}")
    return dict(zip(indices, counts))


def load_sparsified(
    folder: str | os.PathLike, *, model_class: type[PreTrainedModel] | None = None, **kwargs
) -> PreTrainedModel:
    """Loads what a sparsified stock model's `save_pretrained` wrote: `load_sparsified("my-moe", dtype="bfloat16")`.

    `config.json` names the stock class (`architectures`) and the calls of `sparsify` that made it sparse
    (`unimoe_sparsity`); the stock class alone would ignore the latter and build a dense model.

    Args:
        folder: a local folder or a hub name.
        model_class: the dense class of the model, for one that `transformers` itself does not offer by its name: a class of your
            own, or a part of a model that only its module knows.
        kwargs: as for the stock class's `from_pretrained`: fields of the configuration, `subfolder`, `revision`, `dtype` and so
            on. A `config` of the caller's must hold the two entries as well, as the one that was saved does.

    Returns:
        The sparse model, an instance of the stock class.

    Raises:
        ValueError: the checkpoint, or the given `config`, was not written by a sparsified stock model.
        OSError: there is no such checkpoint.
    """
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        fields, source = vars(config), "config"
    else:
        # Read only to find the class, whose `from_pretrained` then treats all of kwargs as it does for a stock class.
        source = folder if config is None else config
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(source, **hub_options)
    name = (fields.get("architectures") or [None])[0]
    stock_class = model_class or getattr(transformers, name or "", None)
    if not fields.get(CONFIG_KEY):
        raise ValueError(
            f"{source} describes no sparsified Transformers model (architectures {name}, no {CONFIG_KEY}); load it with "
            "the class that saved it"
        )
    if stock_class is None:
        raise ValueError(f"transformers has no {name}; name the dense class of {source}: model_class={name}")
    stock_class = getattr(stock_class, "_stock_class", stock_class)
    return sparse_class(stock_class, records=False).from_pretrained(folder, **kwargs)


def _find_layers(model: PreTrainedModel, part: str | None = None) -> str:
    """The name of the one list of layers with an FFN each, in all of the model or in a part of it."""
    stacks, whose = _stacks(model), type(model).__name__
    if part is not None:
        if part not in dict(model.named_modules()):
            raise ValueError(f"{whose} has no part {part!r}; {_remedy(model, stacks)}")
        stacks, whose = {name: stacks[name] for name in _within(part, stacks)}, f"{part} of {whose}"
    if not stacks:
        raise ValueError(f"{whose} has no list of layers with an FFN each, so nothing can be made sparse")
    if len(stacks) == 1:
        return next(iter(stacks))
    # An audio tower of other layers leaves no doubt which stack of a language model is meant.
    usual = [name for name, place in stacks.items() if place.block == "mlp"]
    if len(usual) != 1:
        raise ValueError(f"{whose} has several stacks of layers; {_remedy(model, stacks)}")
    return usual[0]


def _stacks(model: nn.Module) -> dict[str, FfnPlace]:
    """The names of all lists of layers with an FFN each, and where these have it."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    places = {name: ffn_place(layers) for name, layers in lists.items()}
    return {name: place for name, place in places.items() if place is not None}


def _within(part: str, stacks: Iterable[str]) -> list[str]:
    return [name for name in stacks if f"{name}.".startswith(f"{part}." if part else "")]


def _remedy(model: PreTrainedModel, stacks: Iterable[str]) -> str:
    """Which parts there are, each by the name of the model that owns the layers if it owns no others."""
    owners = [_chain(model, name)[-1][0] for name in stacks]
    parts = [owner if len(_within(owner, stacks)) == 1 else name for owner, name in zip(owners, stacks)]
    return "name the part that is meant: " + " or ".join(f"part={part!r}" for part in parts)


def _chain(model: PreTrainedModel, stack_name: str) -> list[tuple[str, PreTrainedModel]]:
    """The models from the root down to the one that owns the layers, each with its name."""
    path = stack_name.split(".")
    prefixes = [".".join(path[:depth]) for depth in range(len(path))]
    parts = [(prefix, model.get_submodule(prefix)) for prefix in prefixes]
    return [(prefix, part) for prefix, part in parts if isinstance(part, PreTrainedModel)]


def _describe_sparsity(model: PreTrainedModel) -> list[dict]:
    """The calls of `sparsify` that give a dense model the sparse blocks of this one, read off the blocks."""
    stacks = _stacks(model)
    calls: dict[tuple, dict] = {}
    for name, place in stacks.items():
        for index, layer in enumerate(model.get_submodule(name)):
            block = place.ffn(layer)
            if not isinstance(block, UniMoESparseMoeBlock):
                continue
            router = next(module for module in block.modules() if isinstance(module, UniMoETopKRouter))
            router_dtype = None if router.router_dtype is None else str(router.router_dtype).removeprefix("torch.")
            shared = {"part": name} if len(stacks) > 1 else {}
            shared |= {"top_k": router.top_k, "norm_topk_prob": router.norm_topk_prob, "router_dtype": router_dtype}
            shared |= block.options
            # With their names: blocks may differ only in which option holds a value.
            call = calls.setdefault(tuple(shared.items()), {"layers": [], "num_experts": [], **shared})
            call["layers"].append(index)
            call["num_experts"].append(router.num_experts)
    return list(calls.values())


def _become_sparse(model: PreTrainedModel) -> None:
    stock_class = getattr(type(model), "_stock_class", type(model))
    inside = (module for module in model.modules() if module is not model)
    owns_all = not any(isinstance(module, SparseModelMixin) for module in inside)
    _take_class(model, stock_class, records=owns_all and bool(stock_class._can_record_outputs))


def _take_class(model: PreTrainedModel, stock_class: type[PreTrainedModel], records: bool) -> None:
    model.__class__ = sparse_class(stock_class, records)
    if records:
        _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def _extend_parallel_plans(model: PreTrainedModel, name: str, block: UniMoESparseMoeBlock) -> None:
    """Lets expert and tensor parallelism shard the experts of blocks called `name` as they do Mixtral's."""
    experts = f"{name}.experts"
    names = [name for name, _ in block.experts.named_parameters(recurse=False)]
    model._ep_plan = {
        **(model._ep_plan or {}),
        **{f"{experts}.{name}": "grouped_gemm" for name in names},
        experts: "ep_dispatch_experts",
    }
    if model._tp_plan and block.experts.has_gate and not block.experts.has_bias:
        model._tp_plan = {
            **model._tp_plan,
            f"{experts}.gate_up_proj": "packed_colwise",
            f"{experts}.down_proj": "rowwise",
            experts: "moe_tp_experts",
        }


class SparseModelMixin(PrefersUnimoeExperts):
    """What a stock model class needs to know about the sparse blocks inside it; see `sparse_class`."""

    _stock_class: type[PreTrainedModel]

    def __init__(self, config, *args, **kwargs):
        calls = getattr(config, CONFIG_KEY, None)
        if not calls:
            raise ValueError(
                f"the config of {type(self).__name__} has no {CONFIG_KEY}, so nothing says which layers are sparse; "
                "build the stock model and call sparsify on it"
            )
        requested = config._experts_implementation
        # The stock classes inside, still dense and with configurations of their own, would refuse any other.
        config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        for arguments in calls:
            sparsify(self, **arguments, copy_weights=False)
        self.set_experts_implementation(requested)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the experts' decorator in the source of the stock class, where it cannot be.
        return True

    def set_experts_implementation(self, experts_implementation: str | dict):
        super().set_experts_implementation(experts_implementation)
        for module in self.modules():
            # T5's stacks have copies of its configuration, which Transformers takes for the same one.
            if isinstance(module, SparseModelMixin) and type(module.config) is type(self.config):
                module.config._experts_implementation_internal = self.config._experts_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if not init_sparse_moe_weights(module, initializer_std(self.config)):
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        setattr(self.config, CONFIG_KEY, _describe_sparsity(self))
        return super().save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle cannot find it by name; copies and processes rebuild it.
        state = super().__reduce_ex__(protocol)[2]
        return _rebuild, (self._stock_class, self._records_router_logits), state


def _rebuild(stock_class: type[PreTrainedModel], records: bool) -> PreTrainedModel:
    model = stock_class.__new__(stock_class)
    _take_class(model, stock_class, records)
    return model


@functools.cache
def sparse_class(stock_class: type[PreTrainedModel], records: bool) -> type[PreTrainedModel]:
    """The subclass of `stock_class` for models that hold sparse blocks.

    Args:
        stock_class: a Transformers model class.
        records: whether it records router logits as Transformers records other outputs, which a model that owns its layers does
            where its class records any; else, as a head and a model around several do, it takes those of all routers inside.
    """
    body = {
        # The name is saved as the checkpoint's architecture. Module and name pick the conversions of checkpoints.
        "__module__": stock_class.__module__,
        # Transformers keys what it records by this name, so it must differ from the stock class's.
        "__qualname__": f"{'Sparse' if records else 'SparseInside'}{stock_class.__qualname__}",
        "__doc__": stock_class.__doc__,
        "_stock_class": stock_class,
        "_records_router_logits": records,
    }
    if records:
        body["_can_record_outputs"] = {
            **stock_class._can_record_outputs,
            "router_logits": OutputRecorder(UniMoETopKRouter, index=0),
        }
    else:
        body["forward"] = _with_router_logits(stock_class.forward)
    return type(stock_class.__name__, (SparseModelMixin, stock_class), body)


def _with_router_logits(stock_forward):
    """A forward whose output has the `router_logits` of all routers that ran, which the stock model would leave out."""

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        wanted = kwargs.get("output_router_logits")
        if not (getattr(self.config, "output_router_logits", False) if wanted is None else wanted):
            return stock_forward(self, *args, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, UniMoETopKRouter)]
        thread = threading.get_ident()
        seen = {}

        def see(router, inputs, output):
            if threading.get_ident() == thread:
                seen[router] = output[0]

        handles = [router.register_forward_hook(see) for router in routers]
        try:
            output = stock_forward(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        # A vision tower is not called for text alone.
        router_logits = tuple(seen[router] for router in routers if router in seen)
        if isinstance(output, tuple):
            return *output, router_logits
        output["router_logits"] = router_logits
        return output

    return forward
