"""Where the layers of Transformers models have their FFN, and how a sparse block takes its place."""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .dense_mlp import DropoutIsIdentity, agree, probe_like
from .sparse_moe import UniMoESparseMoeBlock


@dataclass(frozen=True)
class FfnPlace:
    """One way to have an FFN: as a module that a layer calls, or in parts, which a layer calls one after the other.

    The names are those of a layer's modules, or of modules inside them.

    Args:
        block: the FFN, or its first part. It is what a sparse block replaces.
        parts: first linear map, activation and last linear map, where the FFN is in parts. Once there is a sparse block, those
            that lie outside of it pass on what they get.
    """

    block: str
    parts: tuple[str, ...] = ()

    def is_in(self, layer: nn.Module) -> bool:
        block = _find(layer, self.block)
        if block is None or not self.parts or isinstance(block, UniMoESparseMoeBlock):
            return block is not None
        # A module of such parts alone is an FFN, and no layer with one.
        return _has_attention(layer) and all(_find(layer, name) is not None for name in self.parts)

    def ffn(self, layer: nn.Module) -> nn.Module:
        """A layer's FFN as one module, [..., H] to [..., O]; the sparse block, if it has one."""
        block = layer.get_submodule(self.block)
        if not self.parts or isinstance(block, UniMoESparseMoeBlock):
            return block
        ffn = nn.Sequential(*(layer.get_submodule(name) for name in self.parts))
        ffn.training = layer.training
        return ffn

    def put(self, layer: nn.Module, ffn: nn.Module) -> None:
        """Makes a module the layer's FFN."""
        layer.set_submodule(self.block, ffn)
        for name in self._parts_outside():
            layer.set_submodule(name, nn.Identity().train(layer.training))

    @torch.no_grad()
    def check(self, layer: nn.Module) -> None:
        """Parts may be called with something else between them; two tokens tell.

        Raises:
            TypeError: the layer computes something else with the FFN in one, or cannot be called with hidden states alone.
            ValueError: there is dropout between the parts.
        """
        ffn = self.ffn(layer)
        if not self.parts or isinstance(ffn, UniMoESparseMoeBlock):
            return
        name, (first, _, last) = type(layer).__name__, ffn
        between: list[torch.Tensor] = []
        handles = [
            first.register_forward_hook(lambda module, inputs, output: between.append(output)),
            last.register_forward_pre_hook(lambda module, inputs: between.append(inputs[0])),
        ]
        modes = {module: module.training for module in layer.modules()}
        layer.eval()
        try:
            with DropoutIsIdentity() as dropouts:
                computed = _call(layer, probe_like(first.weight))
            with DropoutIsIdentity():
                expected = _call(self._with_one_module(layer, ffn), probe_like(first.weight))
        except Exception as error:
            # Layers of any model, which may fail in any way.
            raise TypeError(
                f"{name} cannot be called with hidden states alone, to see how it uses its FFN: {error}"
            ) from None
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(expected, torch.Tensor) or not agree(computed, expected):
            raise TypeError(f"{name} does more with {', '.join(self.parts)} than calling one after the other")
        rates = [rate for hidden_states, rate in dropouts.calls if any(hidden_states is inner for inner in between)]
        if rates:
            raise ValueError(
                f"{name} has dropout inside its FFN (rates {rates}), which a sparse block would drop: set it to 0. It is kept "
                "where it follows the FFN"
            )

    def _parts_outside(self) -> list[str]:
        return [name for name in self.parts if not f"{name}.".startswith(f"{self.block}.")]

    def _with_one_module(self, layer: nn.Module, ffn: nn.Module) -> nn.Module:
        """A layer of the same modules, but for the FFN."""
        layer = _shallow_copy(layer)
        for name in (self.block, *self._parts_outside()):
            if parent := name.rpartition(".")[0]:
                layer.set_submodule(parent, _shallow_copy(layer.get_submodule(parent)))
        self.put(layer, ffn)
        return layer


# Those that come first are looked for first.
FFN_PLACES = (
    FfnPlace("mlp"),
    FfnPlace("feed_forward"),
    FfnPlace("ffn"),
    # T5's encoder and decoder.
    FfnPlace("layer.1.DenseReluDense"),
    FfnPlace("layer.2.DenseReluDense"),
    # BERT, and those like it.
    FfnPlace("intermediate", ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")),
    # OPT, BART, Whisper.
    FfnPlace("fc1", ("fc1", "activation_fn", "fc2")),
)


def ffn_place(layers: Iterable[nn.Module]) -> FfnPlace | None:
    """The first of `FFN_PLACES` that all of these layers have."""
    layers = list(layers)
    return next((place for place in FFN_PLACES if layers and all(place.is_in(layer) for layer in layers)), None)


def _call(layer: nn.Module, hidden_states: torch.Tensor) -> object:
    """The hidden states that a layer makes of these, without anything else that it could be given."""
    _, *others = inspect.signature(layer.forward).parameters.values()
    required = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    output = layer.forward(hidden_states, **dict.fromkeys(required))
    return output[0] if isinstance(output, tuple) else output


def _find(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _has_attention(layer: nn.Module) -> bool:
    return any("att" in name for name, _ in layer.named_children())


def _shallow_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
