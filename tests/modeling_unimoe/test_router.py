"""The fused router against its definition: values, gradients, ties, dtypes and refusals."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unimoe.modeling_unimoe import router_triton
from unimoe.modeling_unimoe.router import UniMoETopKRouter, fused_topk_router, naive_topk_router, route


def make_inputs(tokens=12, hidden=16, experts=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(experts, hidden, generator=generator).to(dtype).requires_grad_()
    return hidden_states, weight


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("experts, top_k", [(e, k) for e in (2, 4, 8, 64) for k in (1, 2, 3) if k <= e])
def test_fused_equals_definition(experts, top_k, norm_topk_prob):
    results = []
    for router in (naive_topk_router, fused_topk_router):
        hidden_states, weight = make_inputs(experts=experts)
        logits, weights, index = router(hidden_states, weight, top_k, norm_topk_prob=norm_topk_prob)
        # Uneven factors, so that no gradient cancels (the normalised weights sum to a constant).
        loss = (weights * torch.arange(1.0, 1 + weights.numel()).reshape_as(weights).cos()).sum() + logits.sin().sum()
        loss.backward()
        results.append((logits, weights, index, hidden_states.grad, weight.grad))
    for naive, fused in zip(*results):
        torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-5)
    assert results[1][2].dtype == torch.int64


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_many_tokens_equal_definition(top_k):
    results = []
    for router in (naive_topk_router, fused_topk_router):
        hidden_states, weight = make_inputs(tokens=300)
        _, weights, index = router(hidden_states, weight, top_k)
        (weights * torch.arange(1.0, 1 + weights.numel()).reshape_as(weights).cos()).sum().backward()
        results.append((weights, index, hidden_states.grad, weight.grad))
    for naive, fused in zip(*results):
        torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [12, 0])
def test_order_counts_and_statistics_on_request(tokens):
    hidden_states, weight = make_inputs(tokens=tokens)
    logits, weights, index = fused_topk_router(hidden_states, weight, 2)
    plain = route(hidden_states, weight, 2)
    assert torch.equal(plain.weights, weights) and torch.equal(plain.index, index)
    assert plain.order is plain.counts is plain.mean_probability is plain.mean_square_z is None
    routing = route(hidden_states, weight, 2, return_order=True, return_statistics=True)
    assert torch.equal(routing.counts, torch.bincount(index.flatten(), minlength=8))
    assert routing.order.counts == routing.counts.tolist()
    assert torch.equal(index.flatten()[routing.order.pair_P], index.flatten().sort().values)
    assert all(
        a < b
        for a, b in zip(routing.order.pair_P, routing.order.pair_P[1:])
        if index.flatten()[a] == index.flatten()[b]
    )
    torch.testing.assert_close(routing.mean_probability, logits.softmax(-1).sum(0) / max(tokens, 1))
    torch.testing.assert_close(routing.mean_square_z, logits.logsumexp(-1).square().sum() / max(tokens, 1))
    (routing.mean_probability[0] + routing.mean_square_z).backward()
    assert weight.grad.isfinite().all()


def test_normalised_weights_sum_to_one_and_come_in_order():
    _, weights, _ = fused_topk_router(*make_inputs(), 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert (weights[:, :-1] >= weights[:, 1:]).all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_are_those_of_topk_on_the_logits(top_k):
    hidden_states = torch.ones(5, 4)
    weight = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 2.0])[:, None].expand(6, 4).contiguous()
    logits, weights, index = fused_topk_router(hidden_states, weight, top_k)
    assert torch.equal(index, logits.topk(top_k).indices)
    torch.testing.assert_close(weights, torch.full((5, top_k), 1 / top_k))


def test_router_dtype_is_that_of_the_linear_map_and_weights_keep_the_working_dtype():
    hidden_states, weight = make_inputs(dtype=torch.bfloat16)
    logits, weights, _ = fused_topk_router(hidden_states, weight, 2)
    assert (logits.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = hidden_states.float() @ weight.float().T
    for router in (fused_topk_router, naive_topk_router, route):
        for router_dtype in (torch.float32, "float32"):
            logits, weights, index, *_ = router(hidden_states, weight, 2, router_dtype=router_dtype)
            assert (logits.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-5)
            assert torch.equal(index, exact.topk(2).indices)
    with pytest.raises(ValueError, match="router_dtype"):
        fused_topk_router(hidden_states, weight, 2, router_dtype="float31")


def test_logits_only_on_request():
    hidden_states, weight = make_inputs()
    logits, weights, index = fused_topk_router(hidden_states, weight, 2, return_logits=False)
    _, expected_weights, expected_index = fused_topk_router(hidden_states, weight, 2)
    assert logits is None
    assert torch.equal(weights, expected_weights) and torch.equal(index, expected_index)


def test_huge_logits_stay_finite():
    hidden_states = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for norm_topk_prob in (True, False):
        _, weights, _ = fused_topk_router(hidden_states, weight, 2, norm_topk_prob=norm_topk_prob)
        weights.sum().backward()
        assert weights.isfinite().all() and hidden_states.grad.isfinite().all()


def test_no_tokens():
    hidden_states, weight = make_inputs(tokens=0)
    logits, weights, index = fused_topk_router(hidden_states, weight, 2)
    assert (logits.shape, weights.shape, index.shape) == ((0, 8), (0, 2), (0, 2))
    weights.sum().backward()
    assert not weight.grad.any()


def test_module_flattens_tokens_and_returns_logits_first():
    router = UniMoETopKRouter(16, 8, 2, router_dtype="float32")
    hidden_states, weight = make_inputs()
    router.weight.data.copy_(weight)
    logits, weights, index = router(hidden_states.reshape(3, 4, 16))
    for got, expected in zip((logits, weights, index), fused_topk_router(hidden_states, weight, 2)):
        torch.testing.assert_close(got, expected)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"num_experts": 0}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 5}, "top_k"),
        ({"router_dtype": "float31"}, "router_dtype"),
        ({"router_dtype": "int32"}, "router_dtype"),
        ({"router_dtype": 32}, "router_dtype"),
        ({"router_dtype": "float8_e4m3fn"}, "router_dtype"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        UniMoETopKRouter(**{"hidden_size": 8, "num_experts": 4, "top_k": 2, **arguments})


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("top_k, error", [(-1, RuntimeError), (9, RuntimeError), (2.0, TypeError), (None, TypeError)])
def test_choices_that_there_cannot_be_are_refused_with_and_without_gradients(tokens, top_k, error):
    for hidden_states, weight in (make_inputs(tokens, 128), [t.detach() for t in make_inputs(tokens, 128)]):
        with pytest.raises(error, match="k out of range|'k'"):
            fused_topk_router(hidden_states, weight, top_k)


@pytest.mark.parametrize("tokens", [1, 5])
def test_numbers_of_numpy_are_numbers(tokens):
    hidden_states, weight = (t.detach() for t in make_inputs(tokens, 128))
    # No other test chooses five, so no kernel for it is there yet.
    for got, wanted in zip(
        fused_topk_router(hidden_states, weight, np.int64(5)), naive_topk_router(hidden_states, weight, 5)
    ):
        torch.testing.assert_close(got, wanted)


class Launches:
    """In the place of a Triton kernel: notes the device that is current when it is launched."""

    def __init__(self, current):
        self.current, self.seen = current, []

    def __getitem__(self, grid):
        return lambda *arguments: self.seen.append(self.current[-1])


@pytest.fixture
def stand_in_for_triton(monkeypatch):
    """Triton as it would be there, with kernels that compute nothing."""
    current = ["another"]

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    arithmetic = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    for name, value in {
        "HAS_TRITON": True,
        "triton": arithmetic,
        "_TRITON_DTYPES": {torch.float32: "float32"},
        "_forward_kernel": Launches(current),
        "_backward_kernel": Launches(current),
    }.items():
        monkeypatch.setattr(router_triton, name, value, raising=False)


def test_kernels_of_a_gpu_are_launched_on_the_device_of_the_tokens(stand_in_for_triton):
    hidden_states, weight = make_inputs()
    logits, *_ = router_triton.triton_topk_router(hidden_states, weight, 2)
    logits.sum().backward()
    for kernel in (router_triton._forward_kernel, router_triton._backward_kernel):
        assert kernel.seen == [hidden_states.device]


def test_kernels_of_a_gpu_leave_what_is_recorded_or_too_large_to_pytorch(stand_in_for_triton, monkeypatch):
    with FakeTensorMode():
        assert not router_triton.can_route(torch.empty(4, 8, device="cuda:0"), torch.float32)
    monkeypatch.setattr(router_triton, "is_recorded", lambda tensor: False)
    for tokens, expected in ((1 << 10, True), (1 << 21, False)):
        shape = torch.empty(tokens, 1024, device="meta")
        hidden_states = SimpleNamespace(is_cuda=True, dtype=shape.dtype, numel=shape.numel)
        assert router_triton.can_route(hidden_states, torch.float32) == expected
