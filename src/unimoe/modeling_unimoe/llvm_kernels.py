"""Kernels for CPUs, written in LLVM's intermediate language and compiled in the running process.

Compiling needs `llvmlite`, which comes with librosa (by way of numba), and takes about a tenth of a second for a kernel; each
is compiled once in a process, when it is first used. No compiler has to be installed. Where llvmlite is missing or old, where
PyTorch has no OpenMP, and on processors whose vectors are not known here, `vector_unit()` is None and PyTorch's own operations
run.

A kernel is a function of one block of 64-bit integers: addresses, sizes and strides. All threads of a team call it with the same
block, and each takes its part. The team is that of PyTorch's own operations, so a call never competes with theirs.
"""

import ctypes
import functools
import math
import platform
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

try:
    import llvmlite.binding as llvm
    from llvmlite import ir
except ImportError:
    llvm = ir = None

LINE = 64
"""Bytes of a cache line."""

# From llvmlite 0.45 on, pointers have no types of their own.
LEAST_LLVM = (20,)
# The polynomial nearest to the exponential between -log(2) / 2 and log(2) / 2, from the sixth power down: within 4e-9 of it.
EXP_SERIES = (1.3751407896e-3, 8.3689163414e-3, 4.1669533109e-2, 0.1666651846, 0.49999988595, 1.0, 1.0)
# log(2) to so few digits that multiples of it are exact.
ROUND_LOG_2 = 0.693359375
# What kernels call, and PyTorch's own libraries are linked with.
LIBRARY_FUNCTIONS = ("omp_get_thread_num", "omp_get_num_threads", "expf")


class VectorUnit(NamedTuple):
    """What a processor computes with: float32 numbers in a vector, and how many vectors it can name."""

    width: int
    registers: int
    processor: str
    features: str


@functools.cache
def vector_unit() -> VectorUnit | None:
    """This processor's, or None where no kernels can be compiled."""
    if llvm is None or llvm.llvm_version_info < LEAST_LLVM or _openmp() is None:
        return None
    features = llvm.get_host_cpu_features()
    known = {"processor": llvm.get_host_cpu_name(), "features": features.flatten()}
    if features.get("avx512f"):
        return VectorUnit(16, 32, **known)
    if features.get("avx2") and features.get("fma"):
        return VectorUnit(8, 16, **known)
    if platform.machine() in ("aarch64", "arm64"):
        return VectorUnit(4, 32, **known)
    return None


def is_recorded(tensor: torch.Tensor) -> bool:
    """Whether someone records or replaces the operations on a tensor: kernels and choices by value would escape them."""
    return (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """PyTorch's own library, through which the OpenMP that it uses is found; None where it uses another."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
    except OSError:
        return None
    return library if all(hasattr(library, name) for name in ("GOMP_parallel", *LIBRARY_FUNCTIONS)) else None


class Kernel:
    """A compiled kernel: `kernel(*integers)` runs it on PyTorch's threads, without Python's lock.

    It returns the last of the integers, which a kernel may change. Nothing is checked: an address must point to as much memory as
    the sizes say.
    """

    def __init__(self, engine: Any, name: str, num_arguments: int):
        # The engine owns the code.
        self._engine = engine
        self._address = engine.get_function_address(name)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)
        self._block_type = ctypes.c_int64 * num_arguments
        # Packing is faster than making an array of Python's integers.
        self._pack_into = struct.Struct(f"{num_arguments}q").pack_into

    def __call__(self, *integers: int, parallel: bool = True) -> int:
        block = self._block_type()
        self._pack_into(block, 0, *integers)
        if parallel and torch.get_num_threads() > 1:
            _openmp().GOMP_parallel(ctypes.c_void_p(self._address), block, torch.get_num_threads(), 0)
        else:
            self._function(block)
        return block[-1]


class KernelBuilder:
    """Writes one kernel; a thin layer over llvmlite's `IRBuilder`, which is at `self.ir`.

    Numbers are 64-bit integers, addresses too; `int` is taken for a constant.

    Args:
        unit: the processor to compile for.
        name: of the kernel.
        num_arguments: how many integers it takes, to be found in `self.arguments`.
    """

    def __init__(self, unit: VectorUnit, name: str, num_arguments: int):
        self.unit, self.name = unit, name
        self.int64, self.int32, self.float32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
        self.vector, self.whole_vector = (ir.VectorType(kind, unit.width) for kind in (self.float32, self.int32))
        self.module = ir.Module(name)
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [self.int64]), name)
        self.ir = ir.IRBuilder(function.append_basic_block())
        self._block = function.args[0]
        self.arguments = [self.load(self.add(self._block, 8 * n), self.int64, 8) for n in range(num_arguments)]

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """Declares a function from elsewhere, and gives one that calls it."""
        declared = self.module.globals.get(name)
        if declared is None:
            declared = ir.Function(self.module, ir.FunctionType(result, arguments), name)
        return lambda *values: self.ir.call(declared, values)

    def number(self, value: Any) -> Any:
        return ir.Constant(self.int64, value) if isinstance(value, int) else value

    def truth(self, value: bool) -> Any:
        return ir.Constant(ir.IntType(1), int(value))

    def integer(self, bits: int) -> Any:
        return ir.IntType(bits)

    def to_int64(self, value: Any) -> Any:
        """An integer of any width, taken to be positive."""
        bits = value.type.width
        return value if bits == 64 else (self.ir.zext if bits < 64 else self.ir.trunc)(value, self.int64)

    def vector_of(self, count: int) -> Any:
        return ir.VectorType(self.float32, count)

    def float_number(self, value: float) -> Any:
        return ir.Constant(self.float32, value)

    def add(self, left: Any, right: Any) -> Any:
        return self.ir.add(self.number(left), self.number(right))

    def sub(self, left: Any, right: Any) -> Any:
        return self.ir.sub(self.number(left), self.number(right))

    def mul(self, left: Any, right: Any) -> Any:
        return self.ir.mul(self.number(left), self.number(right))

    def div(self, left: Any, right: Any) -> Any:
        return self.ir.sdiv(self.number(left), self.number(right))

    def ceil_div(self, left: Any, right: Any) -> Any:
        return self.div(self.add(left, self.sub(right, 1)), right)

    def min(self, left: Any, right: Any) -> Any:
        left, right = self.number(left), self.number(right)
        return self.ir.select(self.ir.icmp_signed("<", left, right), left, right)

    def pointer(self, address: Any) -> Any:
        return self.ir.inttoptr(address, ir.PointerType())

    def load(self, address: Any, type_: Any, align: int) -> Any:
        return self.ir.load(self.pointer(address), align=align, typ=type_)

    def store(self, value: Any, address: Any) -> None:
        self.ir.store(value, self.pointer(address), align=4)

    def give_back(self, value: Any) -> None:
        """Makes it what the call returns."""
        self.ir.store(self.number(value), self.pointer(self.add(self._block, 8 * (len(self.arguments) - 1))))

    def zeros(self) -> Any:
        """A vector of zeros."""
        return ir.Constant(self.vector, [0.0] * self.unit.width)

    def load_vector(self, address: Any, dtype: torch.dtype = torch.float32) -> Any:
        """The next `width` numbers of a type, as float32."""
        width = self.unit.width
        if dtype == torch.float32:
            return self.load(address, self.vector, 4)
        bits = self.load(address, ir.VectorType(ir.IntType(16), width), 2)
        if dtype == torch.float16:
            return self.ir.fpext(self.ir.bitcast(bits, ir.VectorType(ir.HalfType(), width)), self.vector)
        # bfloat16: the upper half of a float32.
        shifted = self.ir.shl(self.ir.zext(bits, self.whole_vector), self.whole_number(16))
        return self.ir.bitcast(shifted, self.vector)

    def store_vector(self, value: Any, address: Any, dtype: torch.dtype = torch.float32) -> None:
        """Stores `width` float32 numbers as numbers of a type, rounded to the nearest."""
        if dtype == torch.float32:
            self.store(value, address)
            return
        if dtype == torch.float16:
            bits = self.ir.fptrunc(value, ir.VectorType(ir.HalfType(), self.unit.width))
        else:
            bits, half = self.ir.bitcast(value, self.whole_vector), self.whole_number(16)
            is_odd = self.ir.and_(self.ir.lshr(bits, half), self.whole_number(1))
            rounded = self.ir.lshr(self.ir.add(self.ir.add(bits, self.whole_number(0x7FFF)), is_odd), half)
            # What is not a number could become one by rounding up.
            is_none = self.ir.fcmp_unordered("uno", value, value)
            rounded = self.ir.select(is_none, self.whole_number(0x7FC0), rounded)
            bits = self.ir.trunc(rounded, ir.VectorType(ir.IntType(16), self.unit.width))
        self.ir.store(bits, self.pointer(address), align=2)

    def broadcast(self, value: Any, width: int | None = None) -> Any:
        """A vector whose numbers are all `value`."""
        vector, mask = self.vector_of(width or self.unit.width), ir.VectorType(self.int32, width or self.unit.width)
        first = self.ir.insert_element(ir.Constant(vector, ir.Undefined), value, self._lane(0))
        return self.ir.shuffle_vector(first, first, ir.Constant(mask, [0] * vector.count))

    def vector_number(self, value: float) -> Any:
        """A vector whose numbers are all this constant."""
        return ir.Constant(self.vector, [value] * self.unit.width)

    def whole_number(self, value: int) -> Any:
        """The same of 32-bit integers."""
        return ir.Constant(self.whole_vector, [value] * self.unit.width)

    def of_vectors(self, name: str, *vectors: Any) -> Any:
        """One of LLVM's functions of vectors ("rint", "fma", ...)."""
        name = f"llvm.{name}.v{self.unit.width}f32"
        return self.function(name, self.vector, *[self.vector] * len(vectors))(*vectors)

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        return self.of_vectors("fma", left, right, total)

    def exp(self, value: Any) -> Any:
        """The exponential of a float32, by the C library's function."""
        return self.function("expf", self.float32, self.float32)(value)

    def exp_of(self, vector: Any) -> Any:
        """The exponentials of a vector's numbers, to two units in the last place: 2^n by its bits, times a polynomial. From -88
        down it is that of -88, beyond 89 it is infinite, and for what is not a number it is some number.
        """
        least, most, per_power = (self.vector_number(value) for value in (-88.0, 89.0, math.log2(math.e)))
        vector = self.of_vectors("minnum", self.of_vectors("maxnum", vector, least), most)
        power = self.of_vectors("rint", self.ir.fmul(vector, per_power))
        # What is left of the exponent after the power of two, whose logarithm is taken off in two steps, the first of them exact.
        rest = self.multiply_add(power, self.vector_number(-ROUND_LOG_2), vector)
        rest = self.multiply_add(power, self.vector_number(ROUND_LOG_2 - math.log(2)), rest)
        series = self.vector_number(EXP_SERIES[0])
        for factor in EXP_SERIES[1:]:
            series = self.multiply_add(series, rest, self.vector_number(factor))
        exponent = self.ir.add(self.ir.fptosi(power, self.whole_vector), self.whole_number(127))
        power = self.ir.bitcast(self.ir.shl(exponent, self.whole_number(23)), self.vector)
        return self.ir.fmul(series, power)

    def sum_of(self, vector: Any) -> Any:
        """The sum of a vector's numbers."""
        width = self.unit.width
        while width > 1:
            width //= 2
            halves = []
            for start in (0, width):
                lanes = list(range(start, start + width))
                mask = ir.Constant(ir.VectorType(self.int32, width), lanes)
                halves.append(self.ir.shuffle_vector(vector, vector, mask))
            vector = self.ir.fadd(*halves)
        return self.ir.extract_element(vector, self._lane(0))

    def largest_of(self, vector: Any, width: int) -> Any:
        """The largest of a vector's numbers."""
        return self.function(f"llvm.vector.reduce.fmax.v{width}f32", self.float32, vector.type)(vector)

    def prefetch(self, address: Any) -> None:
        """Asks for a cache line, to be read soon. Any address will do."""
        call = self.function("llvm.prefetch.p0", ir.VoidType(), ir.PointerType(), *[self.int32] * 3)
        # To be read, into the second-level cache, as data.
        call(self.pointer(address), *(ir.Constant(self.int32, value) for value in (0, 2, 1)))

    def loop(
        self,
        start: Any,
        stop: Any,
        step: int,
        body: Callable[..., Sequence[Any] | None],
        carried: Sequence[Any] = (),
    ) -> list[Any]:
        """`for i in range(start, stop, step)`: `body(i, *values)` gives the next values, of which the last are returned."""
        before = self.ir.block
        head, inside, after = (self.ir.append_basic_block() for _ in range(3))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        index, *values = (self.ir.phi(value.type) for value in (self.number(start), *carried))
        for phi, value in zip((index, *values), (self.number(start), *carried)):
            phi.add_incoming(value, before)
        self.ir.cbranch(self.ir.icmp_signed("<", index, self.number(stop)), inside, after)
        self.ir.position_at_end(inside)
        following = body(index, *values) or ()
        following = (self.add(index, step), *following)
        for phi, value in zip((index, *values), following):
            phi.add_incoming(value, self.ir.block)
        self.ir.branch(head)
        self.ir.position_at_end(after)
        return values

    def share_of_thread(self, count: Any, unit: int) -> tuple[Any, Any]:
        """From where to where this thread works, of `count` things in blocks of `unit`."""
        thread, threads = (
            self.ir.sext(self.function(name, self.int32)(), self.int64)
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        )
        blocks = self.ceil_div(count, unit)
        start = self.mul(self.div(self.mul(blocks, thread), threads), unit)
        stop = self.mul(self.div(self.mul(blocks, self.add(thread, 1)), threads), unit)
        return start, self.min(stop, count)

    def compile(self) -> Kernel:
        self.ir.ret_void()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        for name in LIBRARY_FUNCTIONS:
            llvm.add_symbol(name, ctypes.cast(getattr(_openmp(), name), ctypes.c_void_p).value)
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=self.unit.processor, features=self.unit.features, opt=3)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(self.module)), machine)
        engine.finalize_object()
        return Kernel(engine, self.name, len(self.arguments))

    def _lane(self, place: int) -> Any:
        return ir.Constant(self.int32, place)
