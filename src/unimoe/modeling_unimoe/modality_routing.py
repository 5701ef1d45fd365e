"""What the eight-expert Uni-MoE adds to a router: a map for each kind of token in front of it ("fm" in its code).

A router does not know which tokens it is given, and the layers between it and the model pass nothing along. So the model
writes the kinds of the tokens of its current forward into a [`TokenTypes`], which all its routers share.

Shape suffixes: B batch, S text length, T = B * S tokens, H hidden size.
"""

import threading

import torch
from torch import nn
from transformers import PreTrainedConfig

from .router import UniMoETopKRouter

# The kinds of tokens, by the number that stands for each.
TOKEN_TYPES = ("text", "image", "video", "audio", "speech")


class TokenTypes:
    """The kinds of the tokens that a model works on, in `value_BS`: int [B, S], indices into `TOKEN_TYPES`, or None for text.

    Each thread reads what it has written itself, since several may use a model at once. A thread that has written nothing, such
    as autograd's own that computes checkpointed layers anew, reads what was written last.
    """

    def __init__(self) -> None:
        self._last_BS: torch.Tensor | None = None
        self._of_thread = threading.local()

    @property
    def value_BS(self) -> torch.Tensor | None:
        # A graph that is being captured knows no threads.
        return self._last_BS if torch.compiler.is_compiling() else getattr(self._of_thread, "value_BS", self._last_BS)

    @value_BS.setter
    def value_BS(self, value_BS: torch.Tensor | None) -> None:
        self._last_BS = value_BS
        if not torch.compiler.is_compiling():
            self._of_thread.value_BS = value_BS

    def __reduce__(self) -> tuple:
        # Copies of a model start with nothing; threads' own values could not be copied.
        return TokenTypes, ()


class UniMoEModalityMaps(nn.Module):
    """One linear map per kind of token, [T, H] to [T, H]; what a router then reads (the experts read the tokens as they are).

    Args:
        hidden_size: H.
        modalities: Kinds of tokens other than text that occur.
        token_types: Shared with the model, see [`TokenTypes`].
    """

    def __init__(self, hidden_size: int, modalities: tuple[str, ...], token_types: TokenTypes):
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(hidden_size, hidden_size) for name in ("text", *modalities)})
        self.token_types = token_types

    def forward(self, hidden_states_TH: torch.Tensor) -> torch.Tensor:
        mapped_TH = self.maps["text"](hidden_states_TH)
        types_BS = self.token_types.value_BS
        if types_BS is None or types_BS.numel() != hidden_states_TH.shape[0]:
            return mapped_TH
        types_T = types_BS.reshape(-1).to(hidden_states_TH.device)
        for name, linear in self.maps.items():
            if name != "text":
                chosen_T1 = (types_T == TOKEN_TYPES.index(name)).unsqueeze(-1)
                mapped_TH = torch.where(chosen_T1, linear(hidden_states_TH), mapped_TH)
        return mapped_TH


def token_types_of(input_ids: torch.Tensor, placeholder_ids: dict[str, int]) -> torch.Tensor:
    """Int [B, S] of indices into `TOKEN_TYPES` from ids [B, S] and the placeholder of each kind; all else is text."""
    types_BS = torch.zeros_like(input_ids)
    for name, token_id in placeholder_ids.items():
        types_BS = types_BS.masked_fill(input_ids == token_id, TOKEN_TYPES.index(name))
    return types_BS


def set_router_options(
    decoder: nn.Module, sparsity: PreTrainedConfig, modalities: tuple[str, ...], token_types: TokenTypes
) -> None:
    """Gives all routers of a decoder the noise and the modality maps that `sparsity` asks for."""
    for router in decoder.modules():
        if isinstance(router, UniMoETopKRouter):
            router.noise = sparsity.router_noise
            if sparsity.router_modality_maps:
                router.modality_maps = UniMoEModalityMaps(router.hidden_size, modalities, token_types)


__all__ = ["TOKEN_TYPES", "TokenTypes", "UniMoEModalityMaps", "set_router_options", "token_types_of"]
