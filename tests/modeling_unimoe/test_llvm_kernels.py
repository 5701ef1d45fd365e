"""Where kernels are compiled, and where PyTorch's own operations run instead."""

import builtins
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from unimoe.modeling_unimoe import few_tokens_llvm, llvm_kernels, products_llvm, router_llvm
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock


def test_without_llvmlite_the_module_is_there_and_compiles_nothing(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("llvmlite"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("llvmlite")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    spec = importlib.util.find_spec("unimoe.modeling_unimoe.llvm_kernels")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.llvm is None and module.vector_unit() is None


@pytest.mark.parametrize("missing", ["a new LLVM", "OpenMP", "known vectors"])
def test_what_a_machine_may_lack(missing, monkeypatch):
    real = llvm_kernels.llvm
    if real is None:
        pytest.skip("llvmlite is not installed")
    fake = SimpleNamespace(
        llvm_version_info=(15, 0, 0) if missing == "a new LLVM" else (22, 1, 0),
        get_host_cpu_features=lambda: {} if missing == "known vectors" else real.get_host_cpu_features(),
        get_host_cpu_name=real.get_host_cpu_name,
    )
    if missing == "known vectors":
        fake.get_host_cpu_features = lambda: type("Features", (dict,), {"flatten": lambda self: ""})()
        monkeypatch.setattr(llvm_kernels.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(llvm_kernels, "llvm", fake)
    if missing == "OpenMP":
        monkeypatch.setattr(llvm_kernels, "_openmp", lambda: None)
    assert llvm_kernels.vector_unit.__wrapped__() is None


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_block_gives_the_same_with_and_without_kernels(tokens, monkeypatch):
    if llvm_kernels.vector_unit() is None:
        pytest.skip("no kernels are compiled on this processor")
    torch.manual_seed(0)
    block = UniMoESparseMoeBlock(512, 1024, 4, 2)
    hidden_states = torch.randn(tokens, 512)
    found = []
    for module in (None, products_llvm, few_tokens_llvm, router_llvm):
        if module is not None:
            monkeypatch.setattr(module, "vector_unit", lambda: None)
        with torch.no_grad():
            found.append(block(hidden_states))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_an_exponential_and_a_loop(monkeypatch):
    """A kernel of one's own: y[i] = exp(x[i]) for a share of i, and what it gives back."""
    unit = llvm_kernels.vector_unit()
    if unit is None:
        pytest.skip("no kernels are compiled on this processor")
    k = llvm_kernels.KernelBuilder(unit, "exponentials", 4)
    x, y, count, _ = k.arguments

    def body(place):
        offset = k.mul(place, 4)
        k.store(k.exp(k.load(k.add(x, offset), k.float32, 4)), k.add(y, offset))

    k.loop(*k.share_of_thread(count, 8), 1, body)
    k.give_back(7)
    kernel = k.compile()
    numbers, before = torch.randn(1003), torch.get_num_threads()
    for threads in (1, 3):
        found = torch.zeros(1003)
        torch.set_num_threads(threads)
        try:
            assert kernel(numbers.data_ptr(), found.data_ptr(), 1003, 0) == 7
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found, numbers.exp())


@pytest.mark.parametrize("tokens", [1, 4, 20, 60])
def test_defaults_for_new_tensors_do_not_matter(tokens):
    """Kernels write float32 where they are told to; what PyTorch makes by default may be narrower, or elsewhere."""
    torch.manual_seed(0)
    block = UniMoESparseMoeBlock(512, 1024, 4, 2)
    hidden_states = torch.randn(tokens, 512)
    with torch.no_grad():
        expected = block(hidden_states)
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(block(hidden_states), expected)
            finally:
                torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(block(hidden_states), expected)


def test_ids_of_experts_may_be_short_integers():
    torch.manual_seed(0)
    block = UniMoESparseMoeBlock(512, 1024, 4, 2)
    hidden_states = torch.randn(3, 512)
    with torch.no_grad():
        _, weights, index = block.gate(hidden_states)
        found = block.experts(hidden_states, index.int(), weights)
        torch.testing.assert_close(found, block.experts(hidden_states, index, weights))
