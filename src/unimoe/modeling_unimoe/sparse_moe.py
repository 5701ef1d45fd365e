"""The sparse block: a router and its experts in the place of any Transformers MLP."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .capacity import ExpertCapacity
from .dense_mlp import DenseMlp
from .experts import UniMoEExperts, init_experts_weights, make_experts
from .router import UniMoETopKRouter


class UniMoEResidualMlp(nn.Module):
    """A dense MLP beside the experts, mixed with their output token by token (Rajbhandari et al. 2022, residual MoE).

    Parameters: those of one expert, under `experts`, and `coefficient.weight` [2, H], `coefficient.bias` [2].
    """

    def __init__(self, config: Any | None, hidden_size: int, intermediate_size: int, **kwargs):
        super().__init__()
        self.experts = make_experts(config, hidden_size, intermediate_size, 1, **kwargs)
        self.coefficient = nn.Linear(hidden_size, 2)

    def forward(self, hidden_states_TH: torch.Tensor, sparse_TO: torch.Tensor) -> torch.Tensor:
        """The experts' output [T, O] and this MLP's, weighted by a softmax over the two coefficients."""
        index_T1 = torch.zeros(len(hidden_states_TH), 1, dtype=torch.long, device=hidden_states_TH.device)
        dense_TO = self.experts(hidden_states_TH, index_T1, hidden_states_TH.new_ones(index_T1.shape))
        weights_T2 = self.coefficient(hidden_states_TH).softmax(dim=-1)
        return sparse_TO * weights_T2[:, :1] + dense_TO * weights_T2[:, 1:]


class UniMoESparseMoeBlock(nn.Module):
    """Top-k mixture of experts, a drop-in for any Transformers MLP: [..., H] in, [..., O] out, nothing else.

    Parameters: `gate.weight` [E, H]; `experts.gate_up_proj` [E, 2I, H] (ungated: `experts.up_proj` [E, I, H]),
    `experts.down_proj` [E, O, I], and with bias `experts.gate_up_proj_bias` or `experts.up_proj_bias` and
    `experts.down_proj_bias`; a residual block also has a dense MLP, `residual`. They are set to normal weights (std 0.02) and
    zero biases.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E, at least 1. One expert is allowed (with `top_k=1`): it is the dense MLP with an idle router.
        top_k: experts per token, 1 to E.
        hidden_act: a name known to Transformers or a parameter-free callable.
        gated: whether the experts are gated (Llama style).
        bias: whether the experts' linear maps have biases.
        output_size: O, by default H.
        norm_topk_prob: whether the chosen weights sum to 1; else they are the softmax over all experts.
        router_dtype: dtype of the router's linear map ("float32"); None keeps the working dtype.
        capacity_factor, eval_capacity_factor: an expert takes at most `ceil(T / E * top_k * factor)` of the T tokens of a
            call, in training and in evaluation; for the others that choice falls away. None: no limit.
        min_capacity: the least such number.
        random_token_selection: whether chance decides who finds room, in both modes; else earlier tokens come first.
        residual: whether a dense MLP stands beside the experts (residual MoE).
        dropout: which part of the output is set to zero in training, as where a dense MLP ends with dropout.
        config: any object whose `_experts_implementation` names the experts implementation, usually the config of the
            model that owns the block. None: the block carries its own, at `block.experts.config`, set to "unimoe".

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = "silu",
        gated: bool = True,
        bias: bool = False,
        output_size: int | None = None,
        norm_topk_prob: bool = True,
        router_dtype: str | torch.dtype | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        random_token_selection: bool = False,
        residual: bool = False,
        dropout: float = 0.0,
        config: Any | None = None,
    ):
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_experts", num_experts),
            ("top_k", top_k),
            ("output_size", hidden_size if output_size is None else output_size),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.gate = UniMoETopKRouter(
            hidden_size, num_experts, top_k, norm_topk_prob=norm_topk_prob, router_dtype=router_dtype
        )
        if random_token_selection and top_k != 1:
            raise ValueError(f"random_token_selection needs top_k=1, got {top_k}")
        kind = {"gated": gated, "bias": bias, "output_size": output_size, "hidden_act": hidden_act}
        self.experts = make_experts(config, hidden_size, intermediate_size, num_experts, **kind)
        self.capacity = ExpertCapacity(
            num_experts,
            top_k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            random_token_selection,
            norm_topk_prob,
        )
        self.residual = UniMoEResidualMlp(config, hidden_size, intermediate_size, **kind) if residual else None
        self.dropout = nn.Dropout(dropout)
        # Kept here as well: an adapter may wrap the experts and hide their attributes.
        self.output_size = self.experts.output_size
        for module in self.modules():
            init_sparse_moe_weights(module)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] to [..., O], in the same dtype. No tokens at all is fine."""
        hidden_states_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, index_TK = self.gate(hidden_states_TH)
        weights_TK = self.capacity.apply(weights_TK, index_TK, self.training)
        output_TO = self.experts(hidden_states_TH, index_TK, weights_TK)
        if self.residual is not None:
            output_TO = self.residual(hidden_states_TH, output_TO)
        return self.dropout(output_TO).reshape(*hidden_states.shape[:-1], self.output_size)

    def set_router(self, router: UniMoETopKRouter) -> None:
        """Routes by another rule from now on (top-p, null experts, ...): `forward` of `router` decides.

        It gets hidden states [..., H] and returns router logits [T, E], weights [T, K] and expert ids int64 [T, K], as
        `UniMoETopKRouter` does; K may differ from call to call. Where its class says `chooses_fewer`, ids of E stand for no
        expert at all, and only "batched_mm" spends time on them. Checkpoints have the weight of the router, not its rule: set
        it again on what was loaded, before adapters are added.

        Args:
            router: of the block's sizes. It takes over the weight of the router that it replaces, and what is attached there to
                watch its outputs; it is brought to the same dtype, device and training mode.

        Raises:
            TypeError: it is no `UniMoETopKRouter`, or the one that it would replace has an adapter.
            ValueError: its sizes are others, or it chooses fewer experts in a block with limited capacities.
        """
        if not isinstance(router, UniMoETopKRouter):
            raise TypeError(
                f"router must be a UniMoETopKRouter, a subclass of it for one, got {type(router).__name__}"
            )
        if not isinstance(self.gate, UniMoETopKRouter):
            raise TypeError(
                f"the block's router is in a {type(self.gate).__name__}: set another before adding adapters"
            )
        if router.weight.shape != self.gate.weight.shape:
            raise ValueError(
                f"router has a weight of {[*router.weight.shape]}, the block needs {[*self.gate.weight.shape]}"
            )
        if router.chooses_fewer and self.capacity.is_limited:
            raise ValueError(
                f"{type(router).__name__} chooses fewer experts, which a block with a capacity_factor cannot count"
            )
        before, router.weight = self.gate, self.gate.weight
        self.gate = router.to(before.weight).train(self.training)
        for key, hook in list(before._forward_hooks.items()):
            # Transformers attaches what `output_router_logits` needs only once.
            router.register_forward_hook(hook, with_kwargs=key in before._forward_hooks_with_kwargs)
        self.capacity.top_k, self.capacity.norm_topk_prob = router.top_k, router.norm_topk_prob
        for module in self.experts.modules():
            # An adapter may wrap the experts.
            if isinstance(module, UniMoEExperts):
                # What Transformers calls the handling of such ids.
                module._is_expert_parallel |= router.chooses_fewer

    @property
    def options(self) -> dict[str, Any]:
        """Capacities, `random_token_selection` and `residual`, where they are not what they are by default."""
        values = {
            "capacity_factor": self.capacity.train_factor,
            "eval_capacity_factor": self.capacity.eval_factor,
            "min_capacity": self.capacity.minimum,
            "random_token_selection": self.capacity.random_selection,
            "residual": self.residual is not None,
        }
        return {name: value for name, value in values.items() if value not in (None, False, 0)}

    @classmethod
    def on_meta(cls, dense: "DenseMlp", num_experts: int, top_k: int, **options: Any) -> "UniMoESparseMoeBlock":
        """The block that `from_dense` would fill, without memory; it refuses the same arguments, so it also serves as a check.

        Args:
            dense: whose shapes and activation the experts get.
            num_experts: E.
            top_k: experts per token.
            options: the class's other arguments that `dense` does not tell.

        Raises:
            ValueError: an argument is out of range.
        """
        with torch.device("meta"):
            return cls(
                dense.first[0].in_features,
                dense.down.in_features,
                num_experts,
                top_k,
                hidden_act=copy.deepcopy(dense.act_fn),
                gated=dense.is_gated,
                bias=dense.has_bias,
                output_size=dense.down.out_features,
                dropout=dense.dropout,
                **options,
            )

    @classmethod
    def from_dense(
        cls,
        mlp: nn.Module,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool = True,
        router_dtype: str | torch.dtype | None = None,
        config: Any | None = None,
        copy_weights: bool = True,
        router_init_std: float | None = None,
        **options: Any,
    ) -> "UniMoESparseMoeBlock":
        """Upcycles a dense MLP: every expert is an exact copy of it, and the router is new.

        While `norm_topk_prob` holds and the experts are still equal, the block computes what the MLP computed. It
        keeps the MLP's dtype, device, training mode, dropout at the end and `requires_grad`; the new router is trainable. The MLP
        is left as it was.

        Args:
            mlp: a module whose linear maps have the names of one of `LINEAR_NAMES` (Llama, Qwen, Gemma, Phi3, GLM, CLIP, SigLIP,
                GPT-2, GPT-NeoX, ...), or nn.Sequential(Linear, activation, Linear). Input and output width may differ.
            num_experts: E.
            top_k: experts per token.
            norm_topk_prob, router_dtype, config: as for the class.
            copy_weights: False gives fresh random experts of the same shape.
            router_init_std: standard deviation of the new router, by default `config.initializer_range`, else 0.02.
            options: capacities, `random_token_selection` and `residual`, as for the class.

        Raises:
            TypeError: the module is none of the supported kinds, or is quantised, adapted or sparse already.
            ValueError: an argument is out of range, or the module has dropout before its last linear map.
        """
        dense = DenseMlp.read(mlp)
        std = initializer_std(config) if router_init_std is None else router_init_std
        options |= {"norm_topk_prob": norm_topk_prob, "router_dtype": router_dtype, "config": config}
        # Made on meta first: the experts' memory is filled once, with the copies.
        block = cls.on_meta(dense, num_experts, top_k, **options)
        weight = dense.down.weight
        block = block.to(weight.dtype).to_empty(device=weight.device)
        for module in block.modules():
            if isinstance(module, UniMoEExperts):
                if copy_weights:
                    dense.copy_into(module)
                else:
                    init_sparse_moe_weights(module, initializer_std(config))
                module.requires_grad_(weight.requires_grad)
            else:
                init_sparse_moe_weights(module, std)
        block.train(mlp.training)
        if weight.device.type != "meta":
            # The owner's `post_init` initialises every module without this mark, which would undo the copies.
            for module in block.modules():
                module._is_hf_initialized = True
        return block


def initializer_std(config: Any | None) -> float:
    """A model's standard deviation for new weights, 0.02 where its config has none."""
    return getattr(config, "initializer_range", None) or 0.02


def init_sparse_moe_weights(module: nn.Module, std: float = 0.02) -> bool:
    """Initialises a router, experts or a residual MLP's coefficients (normal weights, zero biases); for use in a model's
    `_init_weights`.

    Returns:
        True where `module` was one of them; False, with nothing done, for any other module (a block's parts are
        modules of their own).
    """
    if isinstance(module, UniMoETopKRouter):
        init.normal_(module.weight, mean=0.0, std=std)
        return True
    if isinstance(module, UniMoEExperts):
        init_experts_weights(module, std)
        return True
    if isinstance(module, UniMoEResidualMlp):
        init.normal_(module.coefficient.weight, mean=0.0, std=std)
        init.zeros_(module.coefficient.bias)
        return True
    return False
