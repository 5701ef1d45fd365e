"""Compiled experts on a few tokens against the definition, on every kind of vector unit that can be had here."""

import pytest
import torch
from torch import nn
from vector_units import OWN, each_unit, needs_kernels

from unimoe.modeling_unimoe import few_tokens_llvm
from unimoe.modeling_unimoe.experts import naive_moe_forward
from unimoe.modeling_unimoe.few_tokens_llvm import compiled_experts, sort_kernel

pytestmark = needs_kernels
unit = each_unit(few_tokens_llvm)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make_inputs(tokens, experts=4, top_k=2, dtype=torch.float32, width=128, intermediate=192, out_width=128):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, width).to(dtype)
    gate_up = (torch.randn(experts, 2 * intermediate, width) / 8).to(dtype)
    down = (torch.randn(experts, out_width, intermediate) / 8).to(dtype)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return x, gate_up, down, index, torch.rand(tokens, top_k)


def definition(x, gate_up, down, index, weights):
    inputs = (x.float(), index, weights, gate_up.float(), down.float())
    return naive_moe_forward(*inputs, act_fn=nn.SiLU(), gated=True)


def assert_equals_definition(inputs):
    y, expected = compiled_experts(*inputs), definition(*inputs)
    assert y.dtype == inputs[0].dtype and y.shape == expected.shape
    assert (y.float() - expected).abs().max() < TOLERANCE[y.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16, 30])
def test_every_number_of_rows(unit, dtype, tokens):
    inputs = make_inputs(tokens, dtype=dtype)
    used = len(inputs[3].unique())
    if tokens * 2 <= few_tokens_llvm.MOST_CHUNKS * few_tokens_llvm.most_few_rows(dtype, unit) * used:
        assert_equals_definition(inputs)
    else:
        assert compiled_experts(*inputs) is None, "more tokens than a few"


def test_many_tokens_of_few_experts(unit):
    """What counts is how many rows the experts have that are in use."""
    most = few_tokens_llvm.MOST_CHUNKS * few_tokens_llvm.most_few_rows(torch.float32, unit)
    for tokens in (most, most + 1):
        inputs = make_inputs(tokens, experts=16)
        inputs[3][:] = torch.tensor([3, 9])
        if tokens == most:
            assert_equals_definition(inputs)
        else:
            assert compiled_experts(*inputs) is None


@pytest.mark.parametrize("sizes", [{"out_width": 67}, {"intermediate": 64, "width": 320}, {"top_k": 1}, {"top_k": 4}])
def test_sizes(unit, sizes):
    assert_equals_definition(make_inputs(3, **sizes))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    # Large enough for several threads, and 67 outputs cannot be shared evenly.
    inputs = make_inputs(6, width=512, intermediate=512, out_width=67)
    try:
        torch.set_num_threads(threads)
        found = compiled_experts(*inputs)
        torch.set_num_threads(1)
        assert torch.equal(found, compiled_experts(*inputs))
    finally:
        torch.set_num_threads(before)
    assert_equals_definition(inputs)


def test_experts_held_elsewhere_add_nothing():
    x, gate_up, down, index, weights = make_inputs(6)
    index[index == 2] = 4
    index[0] = torch.tensor([4, 7])
    here = index < 4
    expected = definition(x, gate_up, down, index.clamp(max=3), weights * here)
    found = compiled_experts(x, gate_up, down, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[0].any()


def test_large_gates_neither_overflow_nor_vanish():
    x, gate_up, down, index, weights = make_inputs(2)
    gate_up[:, :192] *= 1e3
    assert_equals_definition((x, gate_up, down, index, weights))


def test_inputs_that_do_not_lie_in_one_piece():
    x, gate_up, down, index, weights = make_inputs(4)
    expected = compiled_experts(x, gate_up, down, index, weights)
    views = (x.t().contiguous().t(), gate_up, down, index.t().contiguous().t(), weights.t().contiguous().t())
    assert not any(views[n].is_contiguous() for n in (0, 3, 4))
    assert torch.equal(compiled_experts(*views), expected)


def test_what_it_does_not_take():
    x, gate_up, down, index, weights = make_inputs(2)
    assert compiled_experts(x[:0], gate_up, down, index[:0], weights[:0]) is None, "no tokens"
    assert compiled_experts(x.bfloat16(), gate_up, down, index, weights) is None, "mixed dtypes"
    assert compiled_experts(x.double(), gate_up.double(), down.double(), index, weights) is None, "other dtypes"
    assert compiled_experts(x, gate_up, down.transpose(1, 2), index, weights) is None, "transposed weights"
    assert compiled_experts(x, gate_up[:, :-2], down, index, weights) is None, "sizes that do not fit"
    assert compiled_experts(x[:1], gate_up, down, index, weights) is None, "sizes that do not fit"
    assert compiled_experts(x, gate_up, down, index, weights[:1]) is None, "sizes that do not fit"
    assert compiled_experts(*make_inputs(2, width=72)) is None, "odd widths"
    assert compiled_experts(*make_inputs(2, intermediate=72)) is None, "odd widths"


@pytest.mark.parametrize("experts", [1, 5, 64])
def test_sort(experts):
    index = torch.randint(0, experts + 2, (200,))
    pairs, tokens, starts = torch.full((2, 201), -7).unbind() + (torch.zeros(experts + 2, dtype=torch.int64),)
    starts[-1] = -7
    addresses = (tensor.data_ptr() for tensor in (index, pairs, tokens, starts))
    used = sort_kernel(OWN)(*addresses, 200, 2, experts, parallel=False)
    counts = torch.bincount(index, minlength=experts)[:experts]
    assert used == (counts > 0).sum()
    assert starts.tolist() == [0, *counts.cumsum(0).tolist(), -7]
    expected = index.sort(stable=True).indices[: counts.sum()]
    assert torch.equal(pairs[: counts.sum()], expected) and pairs[-1] == -7
    assert torch.equal(tokens[: counts.sum()], expected // 2) and tokens[-1] == -7
