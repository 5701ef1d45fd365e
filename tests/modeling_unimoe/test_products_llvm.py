"""Compiled products against PyTorch's in double precision, on every kind of vector unit that can be had here."""

import numpy as np
import pytest
import torch
from vector_units import OWN, each_unit, needs_kernels

from unimoe.modeling_unimoe import products_llvm
from unimoe.modeling_unimoe.products_llvm import compiled_product, padded_rows

pytestmark = needs_kernels
unit = each_unit(products_llvm)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def most_rows(unit):
    """Up to how many rows float32 products are compiled for: 64 with AVX-512, 16 with AVX2."""
    return unit.registers // 8 * unit.width


def assert_is_product(y, x, weight):
    expected = x.double() @ weight.double().T
    assert y.shape == expected.shape and y.dtype == x.dtype
    # In parts of what the products add up to without their signs.
    scale = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - expected).abs() / scale).max() < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("out_width, width", [(4096, 128), (4099, 192), (8, 1 << 16)])
def test_few_rows(unit, dtype, out_width, width):
    weight = torch.randn(out_width, width).to(dtype)
    for rows in range(1, products_llvm.most_few_rows(dtype, unit) + 1):
        x = torch.randn(rows, width).to(dtype)
        assert_is_product(compiled_product(x, weight), x, weight)


@pytest.mark.parametrize("out_width, width", [(4096, 128), (4099, 192), (8, 1 << 15)])
def test_some_rows(unit, out_width, width):
    weight, most = torch.randn(out_width, width), most_rows(unit)
    for rows in (products_llvm.most_few_rows(torch.float32, unit) + 1, unit.width, unit.width + 1, most - 1, most):
        x = torch.randn(rows, width)
        assert_is_product(compiled_product(x, weight), x, weight)
    assert compiled_product(torch.randn(most + 1, width), weight) is None


def test_padded_rows_fill_vectors(unit):
    few, most = products_llvm.most_few_rows(torch.float32, unit), most_rows(unit)
    weight = torch.randn(4096, 128)
    for rows in (1, few):
        assert padded_rows(rows, weight) == rows
    for rows in (few + 1, most - 1, most):
        padded = padded_rows(rows, weight)
        assert rows <= padded < rows + unit.width and padded % unit.width == 0
        y = compiled_product(torch.randn(padded, 128), weight)
        assert y.t().is_contiguous(), "nothing that follows steps over gaps"
    assert padded_rows(most + 1, weight) == most + 1
    assert padded_rows(few + 1, weight[:100]) == padded_rows(few + 1, weight.bfloat16()) == few + 1


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64])
def test_threads_and_runs_are_bit_equal(rows):
    rows, threads = min(rows, most_rows(OWN)), torch.get_num_threads()
    x, weight = torch.randn(rows, 256), torch.randn(4100, 256)
    found = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            found.append(compiled_product(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("rows", [2, 20])
def test_views_are_read_where_they_lie(rows):
    rows = min(rows, most_rows(OWN))
    weight, x = torch.randn(3, 4096, 128)[1], torch.randn(128, rows).t()
    assert_is_product(compiled_product(x, weight), x, weight)
    x = torch.randn(rows, 400)[:, 7:135]
    assert_is_product(compiled_product(x, weight), x, weight)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_nothing_else_is_written(rows):
    x, weight = torch.randn(rows, 128), torch.randn(4097, 128)
    guarded = torch.full((rows * 4097 + 32,), 7.0)
    kernel = products_llvm.few_rows_kernel(torch.float32, 8, OWN)
    kernel(x.data_ptr(), weight.data_ptr(), guarded.data_ptr() + 64, rows, 128, 4097)
    assert (guarded[:16] == 7).all() and (guarded[-16:] == 7).all()
    assert_is_product(guarded[16:-16].view(rows, 4097), x, weight)


def test_not_finite_numbers_stay_where_they_are():
    x, weight = torch.randn(4, 128), torch.randn(4096, 128)
    x[2, 5] = torch.inf
    weight[17, 3] = torch.nan
    y = compiled_product(x, weight)
    expected = torch.zeros(4, 4096, dtype=torch.bool)
    expected[2], expected[:, 17] = True, True
    assert torch.equal(~y.isfinite(), expected)


def test_what_it_does_not_take():
    x, weight = torch.randn(4, 128), torch.randn(4096, 128)
    assert compiled_product(x, weight) is not None
    assert compiled_product(x, weight[:100]) is None, "small weights"
    assert compiled_product(x[:, :100], weight[:, :100]) is None, "odd widths"
    assert compiled_product(x.double(), weight.double()) is None, "other dtypes"
    assert compiled_product(x.bfloat16(), weight) is None, "mixed dtypes"
    assert compiled_product(x[:0], weight) is None, "no rows"
    assert compiled_product(x, torch.randn(128, 4096).t()) is None, "transposed weights"
    assert compiled_product(x, weight.clone().requires_grad_()) is None, "gradients"
    with torch.no_grad():
        assert compiled_product(x, weight.clone().requires_grad_()) is not None


def test_memory_of_other_libraries():
    array = np.random.default_rng(0).standard_normal((4096, 128), dtype=np.float32)
    x, weight = torch.randn(4, 128), torch.from_numpy(array)
    assert_is_product(compiled_product(x, weight), x, weight)
