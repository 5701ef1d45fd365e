"""Who finds room in an expert: the definition, counted by hand."""

import pytest
import torch

from unimoe.modeling_unimoe.capacity import ExpertCapacity, expert_capacity, keep_within_capacity
from unimoe.modeling_unimoe.configuration_unimoe import UniMoESparsityConfig
from unimoe.modeling_unimoe.sparse_moe import UniMoESparseMoeBlock


def kept_by_counting(index_TK, capacity):
    """All first choices in order, then all second ones; a place is taken even by a choice that is turned away."""
    taken: dict[int, int] = {}
    kept = torch.zeros_like(index_TK, dtype=torch.bool)
    for k in range(index_TK.shape[1]):
        for t, expert in enumerate(index_TK[:, k].tolist()):
            kept[t, k] = taken.get(expert, 0) < capacity
            taken[expert] = taken.get(expert, 0) + 1
    return kept


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0, 1, 4, 40])
def test_kept_choices(top_k, capacity):
    generator = torch.Generator().manual_seed(capacity)
    index_TK = torch.rand(20, 5, generator=generator).topk(top_k).indices
    assert torch.equal(keep_within_capacity(index_TK, 5, capacity), kept_by_counting(index_TK, capacity))


def test_priority_instead_of_order():
    index_TK = torch.tensor([[0], [0], [1], [0]])
    priority_T = torch.tensor([0.1, 0.9, 0.2, 0.5])
    assert keep_within_capacity(index_TK, 2, 2, priority_T)[:, 0].tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "arguments, expected", [((26, 4, 2, 1.5), 20), ((26, 4, 2, 0.6), 8), ((26, 4, 1, 0.5), 4), ((1, 4, 2, 0.2, 4), 4)]
)
def test_capacity(arguments, expected):
    assert expert_capacity(*arguments) == expected


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_for_new_tensors_do_not_matter(default):
    limits = ExpertCapacity(4, 1, 1.0, None, random_selection=True)
    index_T1 = torch.zeros(8, 1, dtype=torch.long)
    try:
        with torch.device("meta" if default == "meta" else "cpu"):
            torch.set_default_dtype(torch.float32 if default == "meta" else default)
            # 400.00003 in float32, 400 in float64 and 402 in bfloat16.
            assert expert_capacity(1000, 3, 1, 1.2) == 401
            priority_T = limits.sample_priority(index_T1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert priority_T.dtype == torch.float32 and priority_T.device == index_T1.device


def test_limits_only_where_a_token_can_be_turned_away():
    assert not ExpertCapacity(4, 2, None, None).limits(True)
    both = ExpertCapacity(4, 2, 1.5, 2.0)
    assert both.limits(True) and not both.limits(False)


def test_dropped_tokens_get_zeros_and_the_rest_full_weight():
    """Capacity 1: the second token loses both choices, the third its first one."""
    weights_TK = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    index_TK = torch.tensor([[0, 1], [0, 1], [0, 2]])
    capacity = ExpertCapacity(3, 2, 0.5, None)
    expected = torch.tensor([[0.7, 0.3], [0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(capacity.apply(weights_TK, index_TK, training=True), expected)
    torch.testing.assert_close(capacity.apply(weights_TK, index_TK, training=False), weights_TK)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_block_drops_whatever_runs_its_experts(implementation):
    torch.manual_seed(0)
    block = UniMoESparseMoeBlock(16, 16, 4, 2, capacity_factor=0.3, residual=True)
    block.experts.config._experts_implementation = implementation
    hidden = torch.randn(1, 12, 16, requires_grad=True)
    dropping = block.train()(hidden)
    whole = block.eval()(hidden)
    assert dropping.shape == whole.shape and not torch.allclose(dropping, whole)
    dropping.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "x", True, [1.0]])
@pytest.mark.parametrize("name", ["capacity_factor", "eval_capacity_factor"])
def test_a_factor_without_room_for_a_token_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number"):
        UniMoESparseMoeBlock(16, 32, 4, 2, **{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, "x", True, None])
def test_a_least_capacity_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="`min_capacity` must be a whole number"):
        UniMoESparseMoeBlock(16, 32, 4, 2, capacity_factor=1.0, min_capacity=value)


def test_configurations_have_the_same_bounds():
    for name, value in {"capacity_factor": float("nan"), "eval_capacity_factor": -1, "min_capacity": -1}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            UniMoESparsityConfig(**{name: value})


def test_random_selection_needs_one_expert_per_token():
    with pytest.raises(ValueError, match="top_k=1"):
        UniMoESparseMoeBlock(8, 8, 4, 2, random_token_selection=True)
