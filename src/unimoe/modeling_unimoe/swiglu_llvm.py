"""What stands between an expert's projections on a CPU, in one pass: silu(gate) * up * routing weight.

PyTorch's operations take a pass and a buffer each. With hundreds of rows an expert, or where processors have instructions for
products of 16-bit numbers, that is a tenth of a block's time and more.

Shape letters: N rows, I intermediate size.
"""

import functools

import torch

from .llvm_kernels import Kernel, KernelBuilder, VectorUnit, vector_unit
from .products_llvm import DTYPES, LEAST_WORK

# Rows, or columns, that are shared out among threads together.
SHARE = 8


@functools.cache
def swiglu_kernel(dtype: torch.dtype, is_transposed: bool, unit: VectorUnit) -> Kernel:
    """Takes the first projection [N, 2 * I] of `dtype`, routing weights float32 [N] and the result [N, I] of `dtype` (addresses),
    N, I, and the step of the first projection in memory. Where it `is_transposed`, both lie as [2 * I, N] and [I, N].
    """
    k = KernelBuilder(unit, "swiglu", 6)
    first, scale, result, rows, width, step = k.arguments
    lines, length = (width, rows) if is_transposed else (rows, width)
    size = dtype.itemsize

    def line(number):
        gate = k.add(first, k.mul(k.mul(number, step), size))
        up = k.add(gate, k.mul(k.mul(width, step) if is_transposed else width, size))
        target = k.add(result, k.mul(k.mul(number, length), size))
        weight = None if is_transposed else k.broadcast(k.load(k.add(scale, k.mul(number, 4)), k.float32, 4))

        def vector(start):
            # The last vector begins earlier where it would reach too far.
            start = k.min(start, k.sub(length, unit.width))
            offset = k.mul(start, size)
            gate_vector, up_vector = (k.load_vector(k.add(address, offset), dtype) for address in (gate, up))
            weights = k.load_vector(k.add(scale, k.mul(start, 4))) if is_transposed else weight
            divisor = k.ir.fadd(k.vector_number(1.0), k.exp_of(k.ir.fneg(gate_vector)))
            value = k.ir.fmul(k.ir.fmul(k.ir.fdiv(gate_vector, divisor), up_vector), weights)
            k.store_vector(value, k.add(target, offset), dtype)

        k.loop(0, length, unit.width, vector)

    k.loop(*k.share_of_thread(lines, SHARE), 1, line)
    return k.compile()


@functools.cache
def swiglu_backward_kernel(dtype: torch.dtype, unit: VectorUnit) -> Kernel:
    """Takes the first projection [N, 2 * I] of `dtype`, routing weights float32 [N], the gradient of the weighted result [N, I]
    of `dtype`, and what it fills: that result [N, I] and the gradient of the first projection [N, 2 * I] of `dtype`, the gradient
    of the routing weights float32 [N] (addresses); N, and I, a multiple of the unit's width.
    """
    k = KernelBuilder(unit, "swiglu_backward", 8)
    first, scale, grad, result, grad_first, grad_scale, rows, width = k.arguments
    size, one = dtype.itemsize, k.vector_number(1.0)

    def row(number):
        narrow, wide = (k.mul(k.mul(number, k.mul(width, times)), size) for times in (1, 2))
        weight = k.broadcast(k.load(k.add(scale, k.mul(number, 4)), k.float32, 4))

        def vector(start, total):
            gate_at = k.add(wide, k.mul(start, size))
            up_at, at = k.add(gate_at, k.mul(width, size)), k.add(narrow, k.mul(start, size))
            gate, up = (k.load_vector(k.add(first, place), dtype) for place in (gate_at, up_at))
            slope = k.load_vector(k.add(grad, at), dtype)
            sigmoid = k.ir.fdiv(one, k.ir.fadd(one, k.exp_of(k.ir.fneg(gate))))
            silu = k.ir.fmul(gate, sigmoid)
            h = k.ir.fmul(silu, up)
            k.store_vector(k.ir.fmul(h, weight), k.add(result, at), dtype)
            total = k.multiply_add(slope, h, total)
            slope = k.ir.fmul(slope, weight)
            # silu' = sigmoid * (1 + gate * (1 - sigmoid))
            silu_slope = k.ir.fmul(sigmoid, k.multiply_add(gate, k.ir.fsub(one, sigmoid), one))
            k.store_vector(k.ir.fmul(k.ir.fmul(slope, up), silu_slope), k.add(grad_first, gate_at), dtype)
            k.store_vector(k.ir.fmul(slope, silu), k.add(grad_first, up_at), dtype)
            return [total]

        (total,) = k.loop(0, width, unit.width, vector, [k.zeros()])
        k.store(k.sum_of(total), k.add(grad_scale, k.mul(number, 4)))

    k.loop(*k.share_of_thread(rows, SHARE), 1, row)
    return k.compile()


def compiled_swiglu(first_NF: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) * up * scale, without gradients; None where the kernel does not take these tensors.

    Args:
        first_NF: [N, 2 * I], gate columns first, float32, bfloat16 or float16, on a CPU. It may lie in memory as [2 * I, N].
        scale_N1: float [N, 1].

    Returns:
        [N, I] in the dtype of `first_NF`, computed in float32, in memory in the order of `first_NF`.
    """
    unit, (rows, double_width) = vector_unit(), first_NF.shape
    width, is_transposed = double_width // 2, first_NF.stride(1) != 1
    if (
        unit is None
        or first_NF.dtype not in DTYPES
        or double_width % 2
        or (rows if is_transposed else width) < unit.width
        or (is_transposed and first_NF.stride(0) != 1)
        or (torch.is_grad_enabled() and (first_NF.requires_grad or scale_N1.requires_grad))
    ):
        return None
    h_NI = first_NF.new_empty((width, rows)).t() if is_transposed else first_NF.new_empty((rows, width))
    scale_N = scale_N1.float().contiguous()
    swiglu_kernel(first_NF.dtype, is_transposed, unit)(
        first_NF.data_ptr(),
        scale_N.data_ptr(),
        h_NI.data_ptr(),
        rows,
        width,
        first_NF.stride(1 if is_transposed else 0),
        parallel=rows * width >= LEAST_WORK,
    )
    return h_NI


def compiled_swiglu_backward(
    first_NF: torch.Tensor, scale_N1: torch.Tensor, grad_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`compiled_swiglu` again, and the gradients of its arguments; None where the kernel does not take these tensors.

    Args:
        first_NF, scale_N1: as for `compiled_swiglu`; here, both projections must lie in memory row by row.
        grad_NI: the gradient of its result, of the dtype of `first_NF`.

    Returns:
        What `compiled_swiglu` returns [N, I], the gradients of `first_NF` [N, 2 * I] and, float32, of the routing weights [N].
    """
    unit, (rows, width) = vector_unit(), grad_NI.shape
    if (
        unit is None
        or not first_NF.dtype == grad_NI.dtype
        or first_NF.dtype not in DTYPES
        or first_NF.shape != (rows, 2 * width)
        or width % unit.width
        or not (first_NF.is_contiguous() and grad_NI.is_contiguous())
        or torch.is_grad_enabled()
    ):
        return None
    h_NI, grad_NF, scale_N = torch.empty_like(grad_NI), torch.empty_like(first_NF), scale_N1.float().contiguous()
    grad_scale_N = scale_N.new_empty((rows,))
    swiglu_backward_kernel(first_NF.dtype, unit)(
        first_NF.data_ptr(),
        scale_N.data_ptr(),
        grad_NI.data_ptr(),
        h_NI.data_ptr(),
        grad_NF.data_ptr(),
        grad_scale_N.data_ptr(),
        rows,
        width,
        parallel=rows * width >= LEAST_WORK,
    )
    return h_NI, grad_NF, grad_scale_N
