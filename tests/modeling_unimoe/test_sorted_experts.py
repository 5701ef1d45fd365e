"""The package's own experts implementation: every kernel it chooses between, every gradient, and life around it."""

import pytest
import torch
from test_sparse_moe import assert_block_equals_oracle, make_block
from torch import nn
from torch.nn.utils import parametrize
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from unimoe.modeling_unimoe import products_llvm
from unimoe.modeling_unimoe.sorted_experts import sort_by_expert

# A multiple of the blocks that few rows are multiplied by.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def gradients(block, hidden_states, index=None, weights=None):
    x = hidden_states.clone().requires_grad_()
    block.zero_grad()
    output = block(x) if index is None else block(x, index, weights)
    output.backward(torch.arange(output.numel(), dtype=torch.float32).reshape(output.shape).cos().to(output.dtype))
    return [output.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [{}, {"gated": False, "bias": True}, {"bias": True, "output_size": 192}], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9, 40, 700])
def test_every_number_of_rows(tokens, kind):
    block = make_block(**WIDE, **kind)
    assert_block_equals_oracle(block, torch.randn(tokens, 64), 1e-5)
    with torch.no_grad():
        hidden_states = torch.randn(tokens, 64)
        own = block(hidden_states)
        block.experts.config._experts_implementation = "eager"
        torch.testing.assert_close(own, block(hidden_states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_bfloat16(tokens):
    block = make_block(dtype=torch.bfloat16, router_dtype="float32", **WIDE)
    assert_block_equals_oracle(block, torch.randn(tokens, 64).bfloat16() / 4, 2e-2)


# Weights that are large enough for compiled kernels.
LARGE = {"hidden_size": 512, "intermediate_size": 1024}


@pytest.mark.parametrize("kind", [{}, {"gated": False, "bias": True}, {"bias": True, "output_size": 576}], ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "PyTorch alone"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_large_weights(tokens, compiled, kind, monkeypatch):
    if not compiled:
        monkeypatch.setattr(products_llvm, "vector_unit", lambda: None)
    block = make_block(**LARGE, **kind)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.2)
    hidden_states = torch.randn(tokens, LARGE["hidden_size"])
    assert_block_equals_oracle(block, hidden_states, 1e-5)
    with torch.no_grad():
        own = block(hidden_states)
        block.experts.config._experts_implementation = "eager"
        torch.testing.assert_close(own, block(hidden_states), rtol=1e-4, atol=1e-4)


def test_a_token_that_is_not_finite_stays_alone():
    block, hidden_states = make_block(**LARGE), torch.randn(40, LARGE["hidden_size"])
    with torch.no_grad():
        expected = block(hidden_states)
        hidden_states[0] = torch.nan
        found = block(hidden_states)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_large_weights_of_half_the_width(tokens, dtype, tolerance):
    block = make_block(dtype=dtype, router_dtype="float32", **LARGE)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.1)
        hidden_states = torch.randn(tokens, LARGE["hidden_size"]).to(dtype)
        alone = torch.cat([block(row[None]) for row in hidden_states])
        torch.testing.assert_close(block(hidden_states), alone, rtol=tolerance, atol=tolerance)
    assert_block_equals_oracle(block, hidden_states, tolerance)


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_one_token_without_gradients_is_the_same(act):
    block = make_block(8, 3, hidden_act=act, bias=True, **WIDE)
    hidden_states = torch.randn(1, 64)
    with torch.no_grad():
        alone = block(hidden_states)
    torch.testing.assert_close(alone, block(hidden_states).detach(), rtol=1e-5, atol=1e-5)


def test_large_gradients_of_starved_experts_are_zero_and_accumulate():
    block = make_block(8, 2, hidden_size=256, intermediate_size=256)
    with torch.no_grad():
        block.gate.weight[3] = -3
    hidden_states = torch.rand(6, 256)
    once = gradients(block, hidden_states)
    assert not block.experts.gate_up_proj.grad[3].any() and block.experts.gate_up_proj.grad.any()
    assert block.experts.gate_up_proj.grad.shape == block.experts.gate_up_proj.shape
    kept = {n: p.grad.clone() for n, p in block.named_parameters()}
    block(hidden_states.requires_grad_()).backward(once[0].new_ones(6, 256))
    assert all(not torch.equal(p.grad, kept[n]) for n, p in block.named_parameters())
    torch.optim.AdamW(block.parameters(), lr=1e-2).step()
    torch.testing.assert_close(block(hidden_states), make_like(block, "eager")(hidden_states), rtol=1e-4, atol=1e-4)


def make_like(block, implementation):
    other = make_block(8, 2, implementation, hidden_size=256, intermediate_size=256)
    other.load_state_dict(block.state_dict())
    return other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_held_elsewhere_are_skipped(tokens, bias):
    block = make_block(bias=bias, **WIDE)
    experts, hidden_states = block.experts, torch.randn(tokens, 64)
    index = torch.tensor([[0, 2], [2, 1], [3, 2], [1, 0], [2, 3], [0, 1]])[:tokens]
    weights = torch.rand(tokens, 2)
    away = index.masked_fill(index == 2, 4)
    expected = gradients(experts, hidden_states, index, weights * (index != 2))
    found = gradients(experts, hidden_states, away, weights)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(experts(hidden_states, away, weights), expected[0], rtol=1e-5, atol=1e-5)
        assert not experts(hidden_states, torch.full_like(index, 4), weights).any()
    everything_away = experts(hidden_states, torch.full_like(index, 4), weights)
    everything_away.sum().backward()
    assert not everything_away.any() and not experts.down_proj.grad.isnan().any()


def test_two_runs_are_bit_equal():
    block = make_block(8, 3, **WIDE)
    hidden_states = torch.randn(100, 64)
    assert all(
        torch.equal(a, b) for a, b in zip(*[[t.clone() for t in gradients(block, hidden_states)] for _ in "12"])
    )


def test_frozen_experts_get_no_gradients():
    block = make_block(**WIDE)
    block.experts.requires_grad_(False)
    block(torch.randn(5, 64)).sum().backward()
    assert block.gate.weight.grad.any() and block.experts.down_proj.grad is None
    block.experts.down_proj.requires_grad_(True)
    block(torch.randn(5, 64)).sum().backward()
    assert block.experts.down_proj.grad.any() and block.experts.gate_up_proj.grad is None


def test_gradients_can_be_differentiated_again():
    block = make_block(3, 2, hidden_size=4, intermediate_size=4, bias=True, dtype=torch.float64)
    names = [name for name, _ in block.experts.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in block.experts.parameters()]
    index = torch.tensor([[0, 2], [2, 0], [0, 2]])

    def run(hidden_states, weights, *parameters):
        return torch.func.functional_call(block.experts, dict(zip(names, parameters)), (hidden_states, index, weights))

    inputs = (torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64))
    inputs = (*(tensor.requires_grad_() for tensor in inputs), *parameters)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_an_adapted_parameter_is_read_once():
    class Count(nn.Module):
        reads = 0

        def forward(self, weight):
            self.reads += 1
            return weight * 1

    block = make_block(**WIDE)
    counts = [Count(), Count()]
    for name, count in zip(("gate_up_proj", "down_proj"), counts):
        parametrize.register_parametrization(block.experts, name, count)
    for count in counts:
        count.reads = 0
    block(torch.randn(20, 64)).sum().backward()
    assert [count.reads for count in counts] == [1, 1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic):
    block = make_block(**WIDE)
    hidden_states = torch.randn(20, 64)
    expected = gradients(block, hidden_states)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for got, wanted in zip(gradients(compiled, hidden_states), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_autocast():
    block = make_block(**WIDE)
    hidden_states = torch.randn(12, 64) / 4
    _, weights, index = block.gate(hidden_states)
    expected = gradients(block.experts, hidden_states, index, weights.detach())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(block.experts, hidden_states, index, weights.detach())
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max().clamp(min=1)


def test_experts_of_transformers_own_models():
    config = MixtralConfig(hidden_size=64, intermediate_size=128, num_local_experts=4)
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = []
    for implementation in ("eager", "unimoe"):
        block.experts.config._experts_implementation = implementation
        found.append(
            [t.clone() for t in gradients(block, torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)))]
        )
    for eager, own in zip(*found, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-4)


def test_weights_of_another_kind_run_the_loop():
    class Wrapped(torch.Tensor):
        pass

    block = make_block(**WIDE)
    hidden_states = torch.randn(5, 64)
    expected = block(hidden_states)
    wrapped = block.experts.down_proj.detach().clone().as_subclass(Wrapped)
    del block.experts.down_proj
    block.experts.down_proj = wrapped
    torch.testing.assert_close(block(hidden_states).as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_weights_that_are_not_loaded_are_refused(tokens):
    # Compiled kernels would end the process.
    block = make_block(hidden_size=512, intermediate_size=1024)
    _, weights, index = block.gate(torch.randn(tokens, 512))
    block.experts.to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="experts or routing on meta"):
        block.experts(torch.randn(tokens, 512), index, weights)


def test_order_is_stable_and_leaves_the_rest_for_the_end():
    order = sort_by_expert(torch.tensor([[2, 0], [3, 2], [0, 4]]), 4)
    assert order.pair_P.tolist() == [1, 4, 0, 3, 2, 5] and order.counts == [2, 0, 2, 1]
    assert sort_by_expert(torch.empty(0, 2, dtype=torch.long), 3).counts == [0, 0, 0]
