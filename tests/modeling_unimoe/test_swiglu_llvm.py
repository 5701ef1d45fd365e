"""The compiled SwiGLU and its backward pass against PyTorch's in double precision, on every kind of vector unit."""

import pytest
import torch
import torch.nn.functional as F
from vector_units import each_unit, needs_kernels

from unimoe.modeling_unimoe import swiglu_llvm
from unimoe.modeling_unimoe.swiglu_llvm import compiled_swiglu, compiled_swiglu_backward

pytestmark = needs_kernels
unit = each_unit(swiglu_llvm)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def definition(first, scale):
    gate, up = first.double().chunk(2, dim=-1)
    return F.silu(gate) * up * scale.double()


def inputs_of(rows, width, dtype, is_transposed=False):
    torch.manual_seed(rows + width)
    first, scale = (4 * torch.randn(rows, 2 * width)).to(dtype), torch.rand(rows, 1)
    return (first.t().contiguous().t() if is_transposed else first), scale


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rows, width", [(16, 64), (17, 72), (131, 50), (300, 1024)])
def test_weighted_swiglu(unit, rows, width, is_transposed, dtype):
    first, scale = inputs_of(rows, width, dtype, is_transposed)
    found = compiled_swiglu(first, scale)
    assert found.dtype == dtype and found.t().is_contiguous() == is_transposed
    assert_near(found, definition(first, scale), dtype)
    # Routing weights may be of the model's type, and a part of other rows.
    narrow = torch.stack([scale, scale], dim=1)[:, 0].to(dtype)
    assert_near(compiled_swiglu(first, narrow), definition(first, narrow), dtype)


def test_rows_between_others(unit):
    first, scale = inputs_of(40, 64, torch.float32)
    whole = torch.zeros(40, 200)
    whole[:, 7 : 7 + 128] = first
    assert_near(compiled_swiglu(whole[:, 7 : 7 + 128], scale), definition(first, scale), torch.float32)
    lanes = torch.zeros(128, 48)
    lanes[:, :40] = first.t()
    assert_near(compiled_swiglu(lanes[:, :40].t(), scale), definition(first, scale), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 64), (17, 48), (300, 1024)])
def test_backward(unit, rows, width, dtype):
    first, scale = inputs_of(rows, width, dtype)
    grad = torch.randn(rows, width).to(dtype)
    leaves = [first.double().requires_grad_(), scale.double().requires_grad_()]
    expected = definition(*leaves)
    expected_first, expected_scale = torch.autograd.grad(expected, leaves, grad.double())
    with torch.no_grad():
        h, grad_first, grad_scale = compiled_swiglu_backward(first, scale, grad)
    assert h.dtype == grad_first.dtype == dtype and grad_scale.dtype == torch.float32
    assert_near(h, expected.detach(), dtype)
    assert_near(grad_first, expected_first, dtype)
    torch.testing.assert_close(grad_scale.double(), expected_scale[:, 0], rtol=1e-4, atol=1e-3)


def test_extreme_numbers(unit):
    gates = torch.tensor([*NOT_FINITE, 0.0, -0.0, 1e-30, -80.0, -87.5, -88.5, -100.0, -1e30, 80.0, 100.0, 1e30, 3e38])
    first = torch.stack([gates.repeat(64), torch.ones(64 * len(gates))], dim=0).view(2, 16, -1)
    first = torch.cat([first[0], first[1]], dim=-1)
    expected = F.silu(first.chunk(2, dim=-1)[0])
    found = compiled_swiglu(first, torch.ones(16, 1))
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_to_the_nearest(unit, dtype):
    """Of a large gate, silu is the identity, so the result is a product that can be rounded exactly."""
    torch.manual_seed(0)
    first = torch.cat([torch.full((64, 64), 64.0), torch.randn(64, 64)], dim=-1).to(dtype)
    scale = torch.rand(64, 1)
    first[0, 64], first[0, 65] = float("nan"), float("inf")
    expected = (64.0 * first[:, 64:].float() * scale).to(dtype)
    assert torch.equal(compiled_swiglu(first, scale).nan_to_num(5.0), expected.nan_to_num(5.0))


def test_threads_are_bit_equal():
    first, scale = inputs_of(301, 1024, torch.float32)
    grad, threads, found = torch.randn(301, 1024), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with torch.no_grad():
                results = compiled_swiglu(first, scale), compiled_swiglu(first.t().contiguous().t(), scale)
                found.append([*results, *compiled_swiglu_backward(first, scale, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others))


def test_what_is_left_to_pytorch():
    first, scale = inputs_of(32, 64, torch.float32)
    assert compiled_swiglu(first.double(), scale) is None
    assert compiled_swiglu(first[:, :20], scale) is None, "narrower than a vector"
    assert compiled_swiglu(first[:, ::2], scale) is None
    assert compiled_swiglu(first.clone().requires_grad_(), scale) is None
    grad = torch.randn(32, 64)
    with torch.no_grad():
        assert compiled_swiglu_backward(first, scale, grad.double()) is None
        assert compiled_swiglu_backward(first.t().contiguous().t(), scale, grad) is None
        assert compiled_swiglu_backward(first[:, 2:].contiguous(), scale, grad[:, 1:].contiguous()) is None
        assert compiled_swiglu_backward(first, scale, grad) is not None
    assert compiled_swiglu_backward(first, scale, grad) is None, "gradients of gradients"
