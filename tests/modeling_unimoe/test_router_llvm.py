"""The compiled router against the definition, on every kind of vector unit that can be had here."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from vector_units import each_unit, needs_kernels

from unimoe.modeling_unimoe import router_llvm
from unimoe.modeling_unimoe.router import fused_topk_router, naive_topk_router
from unimoe.modeling_unimoe.router_llvm import compiled_router

pytestmark = needs_kernels
unit = each_unit(router_llvm)


def make_inputs(tokens, experts, width=192):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, width, generator=generator), torch.randn(experts, width, generator=generator) / 8


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("experts", [1, 2, 4, 5, 8, 11, 64, 128])
def test_equals_definition(unit, experts, norm_topk_prob):
    for tokens in (1, 2, 9, 40):
        for top_k in {1, min(2, experts), min(6, experts)}:
            inputs = make_inputs(tokens, experts)
            found = compiled_router(*inputs, top_k, norm_topk_prob)
            expected = naive_topk_router(*inputs, top_k, norm_topk_prob=norm_topk_prob)
            for got, wanted in zip(found, expected, strict=True):
                assert got.dtype == wanted.dtype
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_results_are_tensors_of_their_own():
    inputs, other = make_inputs(1, 7), make_inputs(1, 7, 64)
    with torch.inference_mode():
        compiled_router(*inputs, 3, True)
    found = compiled_router(*inputs, 3, True)
    kept = [tensor.clone() for tensor in found]
    compiled_router(*other, 3, True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(found, kept))
    assert not any(tensor.is_inference() for tensor in found), "gradients can flow through what is made of them"


@pytest.mark.parametrize("tokens, experts", [(3000, 8), (3000, 64), (1, 8)])
def test_threads(tokens, experts):
    before, inputs, found = torch.get_num_threads(), make_inputs(tokens, experts, 256), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled_router(*inputs, 2, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        # PyTorch's linear map, which runs ahead of the kernel for many experts, may differ in the last bit.
        torch.testing.assert_close(other[:2], found[0][:2])
        assert torch.equal(other[2], found[0][2])


@pytest.mark.parametrize("experts, top_k, tied, is_doubtful", [
    (6, 1, (3, 3), True),
    (6, 2, (1, 2), True),
    (6, 2, (2, 2), True),
    (6, 2, (3, 4), False),
    (6, 3, (3, 4), True),
])  # fmt: skip
def test_equal_logits_are_left_to_topk(experts, top_k, tied, is_doubtful):
    """`tied`: which places in the order of experts, from the largest on, have the same logit as the largest of them."""
    weight = torch.arange(experts, 0.0, -1)[:, None].expand(experts, 64).contiguous()
    first, last = tied
    if first == last:
        weight[:] = weight[0]
    else:
        weight[first - 1 : last] = weight[first - 1].clone()
    hidden = torch.ones(3, 64)
    assert (compiled_router(hidden, weight, top_k, True) is None) == is_doubtful
    logits, _, index = fused_topk_router(hidden, weight, top_k)
    assert torch.equal(index, logits.topk(top_k).indices)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_to_pytorch(value):
    hidden, weight = make_inputs(4, 8)
    hidden[2, 3] = value
    assert compiled_router(hidden, weight, 2, True) is None
    assert fused_topk_router(hidden, weight, 2)[0][[0, 1, 3]].isfinite().all()


def test_what_it_does_not_take():
    hidden, weight = make_inputs(4, 8)
    assert compiled_router(hidden, weight, 2, True) is not None
    assert compiled_router(hidden.requires_grad_(), weight, 2, True) is None, "gradients"
    hidden = hidden.detach()
    assert compiled_router(hidden, weight.clone().requires_grad_(), 2, True) is None, "gradients"
    assert compiled_router(hidden.double(), weight.double(), 2, True) is None, "other dtypes"
    assert compiled_router(hidden.t().contiguous().t(), weight, 2, True) is None, "transposed"
    assert compiled_router(hidden[:0], weight, 2, True) is None, "no tokens"
    assert compiled_router(hidden[None], weight, 2, True) is None, "more dimensions"
    assert fused_topk_router(hidden[None], weight, 2)[1].shape == (1, 4, 2)
    assert compiled_router(*make_inputs(4, 8, 100), 2, True) is None, "odd widths"
    assert compiled_router(*make_inputs(4, 200), 2, True) is None, "more experts than registers"
    with torch.autocast("cpu"):
        assert compiled_router(hidden, weight, 2, True) is None, "autocast"


def test_who_records_operations_sees_them():
    hidden, weight = make_inputs(4, 8)
    with FlopCounterMode(display=False) as counter:
        fused_topk_router(hidden, weight, 2)
    assert counter.get_total_flops() == 2 * hidden.numel() * len(weight)
    graph = make_fx(lambda x: fused_topk_router(x, weight, 2)[1])(hidden)
    other = hidden.flip(0)
    torch.testing.assert_close(graph(other), fused_topk_router(other, weight, 2)[1])
    vmapped = torch.vmap(lambda x: fused_topk_router(x, weight, 2)[1])(hidden[None])
    torch.testing.assert_close(vmapped[0], fused_topk_router(hidden, weight, 2)[1])
