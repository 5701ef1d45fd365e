"""The experts of a sparse block as fused parameters, run by any of Transformers' experts implementations.

Shape suffixes: T tokens, H hidden size, O output size, I intermediate size, E experts, K experts chosen for a token,
N the tokens that one expert gets.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from .sorted_experts import IMPLEMENTATION

# The grouped matmul kernels want every row to begin at a multiple of this many bytes.
GROUPED_MM_ALIGNMENT = 16
GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _ShapeAwareExperts:
    """Transformers' registry of experts implementations, with the eager loop for the shapes that its own cannot take."""

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        function = ALL_EXPERTS_FUNCTIONS.get_interface(name, default)
        if function is default or name == IMPLEMENTATION:
            return function

        def forward(experts: "UniMoEExperts", hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            chosen = function if experts.supports(name, hidden_states.dtype) else default
            return chosen(experts, hidden_states, *args, **kwargs)

        return forward


SHAPE_AWARE_EXPERTS = _ShapeAwareExperts()


class UniMoEExperts(nn.Module):
    """E feed-forward networks of one shape as stacked parameters; `make_experts` picks the subclass.

    Gated: `gate_up_proj` [E, 2I, H] (gate rows first), `down_proj` [E, O, I]; y = down(act(gate(x)) * up(x)).
    Ungated: `up_proj` [E, I, H], `down_proj` [E, O, I]; y = down(act(up(x))).
    With bias, also `gate_up_proj_bias` [E, 2I] or `up_proj_bias` [E, I], and `down_proj_bias` [E, O].

    The parameters are created uninitialised: load them, copy into them, or call `init_sparse_moe_weights`.

    Args:
        config: any object whose `_experts_implementation` names the implementation, read at every call.
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        output_size: O, by default H. Where it differs Transformers' implementations give way to the eager loop, because
            they assume O = H.
        hidden_act: a name known to Transformers or a parameter-free callable.

    Raises:
        ValueError: `hidden_act` is neither.
    """

    has_gate: bool
    has_bias: bool

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        output_size: int | None = None,
        hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = "silu",
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.output_size = hidden_size if output_size is None else output_size
        self.num_experts = num_experts
        self.act_fn = _resolve_activation(hidden_act)
        first, rows = ("gate_up_proj", 2 * intermediate_size) if self.has_gate else ("up_proj", intermediate_size)
        self.register_parameter(first, nn.Parameter(torch.empty(num_experts, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.output_size, intermediate_size))
        if self.has_bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.empty(num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, self.output_size))

    def supports(self, implementation: str, dtype: torch.dtype) -> bool:
        """Whether a registered implementation can take these experts' shapes; the parameters are not touched."""
        # Reading a parameter's shape would make an adapter (PEFT's parametrisation) build the whole merged stack.
        if self.output_size != self.hidden_size:
            return False
        if implementation == "grouped_mm":
            return dtype in GROUPED_MM_DTYPES and all(
                n * dtype.itemsize % GROUPED_MM_ALIGNMENT == 0 for n in (self.hidden_size, self.intermediate_size)
            )
        return True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The eager implementation: one pass over the experts that were chosen at all.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, K]; the id `num_experts` marks an expert held by another process and is skipped.
            top_k_weights: [T, K].

        Returns:
            [T, O] in the dtype of `hidden_states`.
        """
        # Each read of an adapted parameter merges its adapter anew, so read once, outside the loop.
        first_EIH = self.gate_up_proj if self.has_gate else self.up_proj
        down_EOI = self.down_proj
        first_bias_EI = down_bias_EO = None
        if self.has_bias:
            first_bias_EI = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
            down_bias_EO = self.down_proj_bias

        output_TO = hidden_states.new_zeros(hidden_states.shape[0], self.output_size)
        hit = [expert for expert in top_k_index.unique().tolist() if expert < self.num_experts]
        # With no token at all, an empty pass through one expert keeps the output connected to every parameter.
        for expert in hit or [0]:
            token_N, slot_N = torch.where(top_k_index == expert)
            x_NH = hidden_states[token_N]
            y_NI = F.linear(x_NH, first_EIH[expert], None if first_bias_EI is None else first_bias_EI[expert])
            y_NI = self._apply_gate(y_NI) if self.has_gate else self.act_fn(y_NI)
            y_NO = F.linear(y_NI, down_EOI[expert], None if down_bias_EO is None else down_bias_EO[expert])
            y_NO = y_NO * top_k_weights[token_N, slot_N, None]
            output_TO.index_add_(0, token_N, y_NO.to(output_TO.dtype))
        return output_TO

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, output_size={self.output_size}"
        )


@use_experts_implementation(experts_interface=SHAPE_AWARE_EXPERTS, has_gate=True, has_bias=False)
class UniMoEGatedExperts(UniMoEExperts):
    """Llama, Mistral, Qwen2, StableLM."""

    has_gate, has_bias = True, False


@use_experts_implementation(experts_interface=SHAPE_AWARE_EXPERTS, has_gate=True, has_bias=True)
class UniMoEGatedBiasedExperts(UniMoEExperts):
    """Llama with `mlp_bias`."""

    has_gate, has_bias = True, True


@use_experts_implementation(experts_interface=SHAPE_AWARE_EXPERTS, has_gate=False, has_bias=False)
class UniMoEUngatedExperts(UniMoEExperts):
    """Two linear maps without bias."""

    has_gate, has_bias = False, False


@use_experts_implementation(experts_interface=SHAPE_AWARE_EXPERTS, has_gate=False, has_bias=True)
class UniMoEUngatedBiasedExperts(UniMoEExperts):
    """CLIP, SigLIP, Phi, an MLP connector."""

    has_gate, has_bias = False, True


_EXPERTS_CLASSES = {
    (cls.has_gate, cls.has_bias): cls
    for cls in (UniMoEGatedExperts, UniMoEGatedBiasedExperts, UniMoEUngatedExperts, UniMoEUngatedBiasedExperts)
}


def _resolve_activation(hidden_act: str | Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    act_fn = hidden_act
    if isinstance(hidden_act, str):
        act_fn = ACT2FN[hidden_act] if hidden_act in ACT2FN else None
    # Experts share one activation, and not every implementation would train parameters of it.
    has_parameters = isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters())
    if not callable(act_fn) or isinstance(act_fn, type) or has_parameters:
        raise ValueError(
            f"hidden_act must be a name known to Transformers or a callable without parameters, got {hidden_act!r}"
        )
    return act_fn


def make_experts(config: Any | None, *args, gated: bool = True, bias: bool = False, **kwargs) -> UniMoEExperts:
    """Experts of the class for `gated` and `bias`; further arguments as for `UniMoEExperts`.

    Without a config the experts carry their own, set to this package's implementation, "unimoe".
    """
    if config is None:
        config = SimpleNamespace(_experts_implementation=IMPLEMENTATION)
    return _EXPERTS_CLASSES[bool(gated), bool(bias)](config, *args, **kwargs)


def init_experts_weights(experts: UniMoEExperts, std: float) -> None:
    """Normal weights and zero biases, leaving alone what a checkpoint has filled already."""
    for name, parameter in experts.named_parameters(recurse=False):
        if name.endswith("_bias"):
            init.zeros_(parameter)
        else:
            init.normal_(parameter, mean=0.0, std=std)


def naive_moe_forward(
    hidden_states_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    first_EIH: torch.Tensor,
    down_EOI: torch.Tensor,
    *,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    gated: bool,
    first_bias_EI: torch.Tensor | None = None,
    down_bias_EO: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, for tests: every expert sees every token, and a dense [T, E] weight picks what counts.

    Args:
        hidden_states_TH: [T, H].
        top_k_index_TK: int64 [T, K].
        top_k_weights_TK: [T, K].
        first_EIH: `gate_up_proj` [E, 2I, H] where gated, else `up_proj` [E, I, H].
        down_EOI: `down_proj` [E, O, I].
        act_fn: the activation.
        gated: whether the first projection holds gate and up rows.
        first_bias_EI: bias of the first projection, or None.
        down_bias_EO: bias of the second projection, or None.

    Returns:
        [T, O].
    """
    one_hot_TKE = F.one_hot(top_k_index_TK, first_EIH.shape[0]).to(top_k_weights_TK.dtype)
    weights_TE = torch.einsum("tk,tke->te", top_k_weights_TK, one_hot_TKE)
    y_TEI = torch.einsum("th,eih->tei", hidden_states_TH, first_EIH)
    if first_bias_EI is not None:
        y_TEI = y_TEI + first_bias_EI
    if gated:
        size = first_EIH.shape[1] // 2
        y_TEI = act_fn(y_TEI[..., :size]) * y_TEI[..., size:]
    else:
        y_TEI = act_fn(y_TEI)
    y_TEO = torch.einsum("tei,eoi->teo", y_TEI, down_EOI)
    if down_bias_EO is not None:
        y_TEO = y_TEO + down_bias_EO
    return torch.einsum("te,teo->to", weights_TE, y_TEO)
