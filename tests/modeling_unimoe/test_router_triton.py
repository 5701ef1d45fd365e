"""The router's GPU kernels, run on the CPU by Triton's interpreter, against the definition."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import itertools
import torch
from unimoe.modeling_unimoe.router import naive_topk_router
from unimoe.modeling_unimoe.router_triton import triton_topk_router

def compare(tokens, experts, top_k, norm, dtype, linear, hidden=72):
    generator = torch.Generator().manual_seed(tokens + experts)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    x, w, cotangent_K, cotangent_E = make(tokens, hidden), make(experts, hidden), make(tokens, top_k), make(tokens, experts)
    cotangent_P = torch.arange(1.0, experts + 1).cos()
    found = []
    for naive in (True, False):
        xs, ws = (t.clone().requires_grad_() for t in (x, w))
        if naive:
            logits, weights, index = naive_topk_router(xs, ws, top_k, norm_topk_prob=norm, router_dtype=linear)
            counts = torch.bincount(index.flatten(), minlength=experts)
            probability = logits.float().softmax(-1).sum(0) / max(tokens, 1)
            z = logits.float().logsumexp(-1).square().sum() / max(tokens, 1)
        else:
            logits, weights, index, counts, probability, z = triton_topk_router(
                xs, ws, top_k, norm_topk_prob=norm, linear_dtype=linear, statistics=True)
        loss = (weights * cotangent_K).sum() + (logits * cotangent_E).sum() + (probability * cotangent_P).sum() + z
        loss.backward()
        found.append((logits, weights, index, counts, probability, z, xs.grad, ws.grad))
    limit = 1e-5 if (linear or dtype) == dtype == torch.float32 else 2e-2
    for name, expected, got in zip("logits weights index counts probability z dx dw".split(), *found):
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if got.numel():
            error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
            assert error <= limit, (name, float(error), tokens, experts, top_k, norm, dtype)

for (experts, top_k), norm in itertools.product([(2, 1), (5, 3), (8, 2), (64, 2)], [True, False]):
    compare(40, experts, top_k, norm, torch.float32, None)
for tokens in (0, 1):
    compare(tokens, 8, 2, True, torch.float32, None)
compare(33, 8, 2, True, torch.bfloat16, torch.float32)

x, w = torch.ones(3, 64), torch.zeros(6, 64)
logits, weights, index, counts, probability, z = triton_topk_router(x, w, 2)
assert index.tolist() == [[0, 1]] * 3 and torch.equal(weights, torch.full((3, 2), 0.5))
"""


def test_kernels_equal_the_definition():
    # The interpreter is chosen when Triton is imported, so the kernels get a process of their own.
    run = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
