"""The account of a plan: nothing of the model is left empty, nothing of the sources is lost in silence."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from unimoe import UniMoEForConditionalGeneration
from unimoe.conversion.errors import ConversionError
from unimoe.conversion.expressions import Concatenate, Reshape, Stack, evaluate
from unimoe.conversion.plan import Account, Plan, format_bytes, model_shapes
from unimoe.conversion.reader import SourceTensor

SHAPES = {"a": (2, 3), "b": (4,)}


def source(name, *shape):
    return SourceTensor(
        Path("weights.bin"),
        name,
        shape,
        torch.float32,
        loaded=torch.arange(float(torch.Size(shape).numel())).view(shape),
    )


def test_a_whole_plan_passes():
    a, b, old = source("a", 2, 3), source("b", 4), source("old", 1)
    Plan({"a": a, "b": b}, ignored={old: "not needed"}, known=[a, b, old]).check(SHAPES)


@pytest.mark.parametrize(
    "targets, message",
    [
        ({"a": source("a", 2, 3)}, "1 tensors of the model are in none of the files: b"),
        ({"a": source("a", 3, 2), "b": source("b", 4)}, r"a is \[3, 2\] instead of \[2, 3\]"),
        ({"a": source("a", 2, 3), "b": source("b", 4), "c": source("c", 1)}, "have no place in the model: c"),
    ],
)
def test_an_incomplete_plan_names_its_faults(targets, message):
    with pytest.raises(ConversionError, match=message):
        Plan(targets).check(SHAPES)


def test_a_source_that_nobody_wants_is_named():
    a, b, extra = source("a", 2, 3), source("b", 4), source("extra", 1)
    with pytest.raises(ConversionError, match="belong nowhere: extra in weights.bin"):
        Plan({"a": a, "b": b}, known=[a, b, extra]).check(SHAPES)


def test_overlay_keeps_the_newer_and_accounts_for_the_older():
    account = Account()
    older = account.add({"a": source("a", 2, 3), "b": source("b", 4)})
    newer = account.add({"a": source("a2", 2, 3)})
    weights = account.overlay(older, newer, "replaced")
    plan = account.plan(dict(weights))
    plan.check(SHAPES)
    assert weights == {"a": newer["a"], "b": older["b"]}
    assert plan.ignored == {older["a"]: "replaced"}
    # What one target no longer needs, another may.
    plan = account.plan({**weights, "c": older["a"]})
    assert not plan.ignored


def test_expressions_compute_what_their_names_say():
    a, b = source("a", 2, 3), source("b", 2, 3)
    assert torch.equal(evaluate(Stack([a, b]), torch.float32), torch.stack([a.loaded, b.loaded]))
    for dim in (0, 1):
        assert torch.equal(evaluate(Concatenate([a, b], dim), torch.float32), torch.cat([a.loaded, b.loaded], dim))
    assert torch.equal(evaluate(Reshape(a, (3, 2)), torch.float32), a.loaded.view(3, 2))
    nested = Stack([Concatenate([a, b]), Concatenate([b, a])])
    assert nested.shape == (2, 4, 3) and nested.sources == [a, b, b, a]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Stack([source("a", 2, 3), source("b", 3, 2)]),
        lambda: Concatenate([source("a", 2, 3), source("b", 2, 4)]),
        lambda: Reshape(source("a", 2, 3), (4,)),
    ],
)
def test_expressions_refuse_shapes_that_do_not_fit(build):
    with pytest.raises(ConversionError, match=r"a \(weights\.bin\)"):
        build()


def test_model_shapes_are_those_of_the_checkpoint():
    config = tiny_config()
    model = UniMoEForConditionalGeneration(config)
    assert model_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_description_counts_files_and_reasons():
    a, b, old = source("a", 2, 3), source("b", 4), source("old", 1)
    text = Plan({"a": a, "b": b}, ignored={old: "not needed"}, known=[a, b, old]).describe(torch.float16)
    assert "weights.bin: 2 of 3 tensors, 40 B" in text
    assert "1 tensors: not needed" in text
    assert "writes: 2 tensors, 20 B in float16" in text


@pytest.mark.parametrize("count, text", [(12, "12 B"), (1500, "1.50 kB"), (26_400_000_000, "26.40 GB")])
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
