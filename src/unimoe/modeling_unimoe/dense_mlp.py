"""Taking the dense MLPs of Transformers models apart: which linear maps, which activation, which dropout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from .experts import UniMoEExperts

# The linear maps of dense MLPs as Transformers names them, the last one last. A first one of twice the width is gate and up.
LINEAR_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
    ("linear_fc1", "linear_fc2"),
    ("lin1", "lin2"),
    ("Wi", "Wo"),
    ("wi", "wo"),
    ("wi_0", "wi_1", "wo"),
    ("intermediate_dense", "output_dense"),
    ("w1", "w3", "w2"),
)
# The activations of those that call it as a function.
ACTIVATIONS = {("w1", "w3", "w2"): nn.SiLU}
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")
SUPPORTED_MLPS = (
    f"linear maps named {', '.join('/'.join(names) for names in LINEAR_NAMES)} with an activation named "
    f"{' or '.join(ACTIVATION_NAMES)}, and nn.Sequential(Linear, activation, Linear)"
)


@dataclass
class DenseMlp:
    """The parts of a dense MLP: its first linear maps (gate and up, both in one, or up alone), activation and last map, and the
    rate of the dropout behind that."""

    first: list[nn.Linear]
    down: nn.Linear
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    dropout: float = 0.0

    @classmethod
    def read(cls, mlp: nn.Module) -> "DenseMlp":
        """Takes a module apart, or raises TypeError or ValueError (see `UniMoESparseMoeBlock.from_dense`)."""
        name = type(mlp).__name__
        if not isinstance(mlp, nn.Module):
            raise TypeError(f"mlp must be an nn.Module, got {mlp!r}")
        if hasattr(mlp, "experts"):
            raise TypeError(f"{name} is sparse already; a dense MLP is needed: {SUPPORTED_MLPS}")
        parts = {key: child for key, child in mlp.named_children() if not isinstance(child, _DropoutNd)}
        if isinstance(mlp, nn.Sequential):
            parts = dict(zip(("fc1", "act_fn", "fc2"), parts.values())) if len(parts) == 3 else {}
        found = parts.keys() - set(ACTIVATION_NAMES)
        names = next((names for names in LINEAR_NAMES if found == set(names)), None)
        if names is None:
            raise TypeError(f"cannot make {name} sparse; supported are {SUPPORTED_MLPS}")
        *first, down = (_as_linear(parts[key]) for key in names)
        # Not every activation is a module, and so among the parts.
        act_fns = (parts.get(key, getattr(mlp, key, None)) for key in ACTIVATION_NAMES)
        act_fn = next((act_fn for act_fn in act_fns if act_fn is not None), None)
        dense = cls(first, down, ACTIVATIONS[names]() if act_fn is None and names in ACTIVATIONS else act_fn)
        dense._check(name)
        dense._check_output(mlp)
        return dense

    @property
    def linears(self) -> list[nn.Linear]:
        return [*self.first, self.down]

    @property
    def is_gated(self) -> bool:
        return sum(linear.out_features for linear in self.first) == 2 * self.down.in_features

    @property
    def has_bias(self) -> bool:
        return any(linear.bias is not None for linear in self.linears)

    def _check(self, name: str) -> None:
        for linear in self.linears:
            # nn.Linear, or a model's own form of it, and plain tensors: quantised or adapted layers subclass or wrap them.
            kind = f"{type(linear).__module__}.{type(linear).__name__}"
            if type(linear) is nn.Linear or (
                isinstance(linear, nn.Linear) and kind.startswith("transformers.models.")
            ):
                kind = f"nn.Linear of {type(linear.weight.data).__name__}"
            if kind != "nn.Linear of Tensor":
                raise TypeError(
                    f"{name} holds a {kind} where a plain nn.Linear is needed: make a model sparse before it is "
                    "quantised, adapted (LoRA) or sharded"
                )
            if not linear.weight.is_floating_point():
                raise TypeError(
                    f"{name} is quantised ({linear.weight.dtype}); make a model sparse before quantising it"
                )
            if linear.weight.is_meta and hasattr(linear, "_hf_hook"):
                raise ValueError(
                    f"{name} is offloaded, so its weights are not at hand: load the model without offloading"
                )
        if not callable(self.act_fn) or (isinstance(self.act_fn, nn.Module) and len(list(self.act_fn.parameters()))):
            raise TypeError(f"{name} has no parameter-free activation; supported are {SUPPORTED_MLPS}")
        width = self.down.in_features
        has_known_widths = [linear.out_features for linear in self.first] in ([width], [2 * width], [width, width])
        if len({linear.in_features for linear in self.first}) != 1 or not has_known_widths:
            raise TypeError(
                f"{name}: the widths of its linear maps do not fit together; supported are {SUPPORTED_MLPS}"
            )

    @torch.no_grad()
    def _check_output(self, mlp: nn.Module) -> None:
        """A module may have the usual parts and yet compute something else with them; two tokens tell. They also tell where
        its dropout is."""
        name, probe = type(mlp).__name__, probe_like(self.first[0].weight)
        with DropoutIsIdentity() as dropouts:
            try:
                computed = mlp(probe)
            except (TypeError, ValueError, RuntimeError):
                # It wants more than hidden states, or others.
                computed = None
        expected = self(probe)
        if not agree(computed, expected):
            raise TypeError(
                f"{name} computes more than its linear maps and activation; supported are {SUPPORTED_MLPS}"
            )
        rates = [child.p for child in mlp.modules() if isinstance(child, _DropoutNd)]
        rates = [rate for rate in (*rates, *_rates_in(mlp)) if rate]
        if rates and (len(rates) > 1 or len(dropouts.calls) != 1 or dropouts.calls[0][0] is not computed):
            raise ValueError(
                f"{name} has dropout inside (rates {rates}), which a sparse block would drop: set it to 0. It is kept where it "
                "comes last, and once"
            )
        self.dropout = sum(rates)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP computes, [..., H] to [..., O], but for dropout."""
        first, *others = (F.linear(hidden_states, linear.weight, linear.bias) for linear in self.first)
        if self.is_gated:
            gate, up = (first, *others) if others else first.chunk(2, dim=-1)
            hidden_states = self.act_fn(gate) * up
        else:
            hidden_states = self.act_fn(first)
        return F.linear(hidden_states, self.down.weight, self.down.bias)

    @torch.no_grad()
    def copy_into(self, experts: UniMoEExperts) -> None:
        """Fills every expert with this MLP. A missing bias beside a present one becomes zeros."""
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        getattr(experts, first).copy_(torch.cat([linear.weight for linear in self.first]))
        experts.down_proj.copy_(self.down.weight)
        if experts.has_bias:
            getattr(experts, f"{first}_bias").copy_(torch.cat([_bias(linear) for linear in self.first]))
            experts.down_proj_bias.copy_(_bias(self.down))


def _as_linear(module: nn.Module) -> nn.Module:
    """GPT-2's linear map, which keeps its weight transposed, as the usual one with a view of it; others as they are."""
    if type(module) is not Conv1D:
        return module
    linear = nn.Linear(*module.weight.shape, device="meta")
    linear.weight = nn.Parameter(module.weight.t(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear


class DropoutIsIdentity(TorchFunctionMode):
    """While it is entered, dropout returns what it gets. `calls` has that and the rate of each call whose rate is not zero."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Tensor, float]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (self._dropout if function is F.dropout else function)(*args, **(kwargs or {}))

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if p:
            self.calls.append((input, p))
        return input


def probe_like(weight: torch.Tensor) -> torch.Tensor:
    """Hidden states of two tokens, [1, 2, H], for a linear map's weight [..., H]."""
    width = weight.shape[1]
    return torch.linspace(-2, 2, 2 * width, device=weight.device).cos().reshape(1, 2, width).to(weight.dtype)


def agree(computed: object, expected: torch.Tensor) -> bool:
    """Whether both are the same but for rounding, measured by the largest value: new models compute tiny ones. On the meta
    device, whether they have the same shape."""
    if not isinstance(computed, torch.Tensor):
        return False
    if (computed.shape, computed.dtype) != (expected.shape, expected.dtype):
        return False
    if expected.is_meta:
        return True
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
    largest = expected.nan_to_num(posinf=0, neginf=0).abs().max().item()
    return torch.allclose(computed, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _rates_in(mlp: nn.Module) -> list[float]:
    """Rates of dropout that a module keeps as numbers."""
    return [value for key, value in vars(mlp).items() if "dropout" in key and isinstance(value, float)]


def _bias(linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
