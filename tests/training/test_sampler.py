"""The grouped sampler: the recorded orders of the originals, and what must hold for every order."""

import json

import pytest

from unimoe.training.sampler import ModalityGroupedSampler

RECORDED = [("unimoe_speech", "cases_v1.5", "shuffled"), ("unimoe_8e", "cases_dense", "sorted")]
TYPES = [0] * 11 + [1] * 7 + [3] * 2 + [6] * 21
LENGTHS = [(7 * i) % 31 + 1 for i in range(len(TYPES))]


@pytest.mark.parametrize("name, cases, variant", RECORDED)
def test_recorded_orders(golden, name, cases, variant):
    recorded = json.loads((golden(name) / f"{cases}.json").read_text())["grouped_sampler"]
    sampler = ModalityGroupedSampler(
        recorded["types"],
        recorded["lengths"],
        recorded["batch_size"],
        num_processes=recorded["world_size_times_accum"],
        variant=variant,
        drop_last=True,
        seed=recorded["torch_manual_seed"],
    )
    assert list(sampler) == recorded["indices"]
    assert len(sampler) == len(recorded["indices"])


@pytest.mark.parametrize("variant", ["shuffled", "sorted"])
@pytest.mark.parametrize("batch_size, processes, accumulation", [(1, 1, 1), (2, 2, 2), (3, 4, 1), (2, 8, 1)])
def test_every_step_has_one_mix_and_nothing_is_lost(variant, batch_size, processes, accumulation):
    sampler = ModalityGroupedSampler(
        TYPES,
        LENGTHS,
        batch_size,
        num_processes=processes,
        gradient_accumulation_steps=accumulation,
        variant=variant,
        seed=3,
    )
    order, step = list(sampler), batch_size * processes
    assert set(order) == set(range(len(TYPES))) and len(order) == len(sampler) and len(order) % step == 0
    for start in range(0, len(order), step):
        assert len({TYPES[i] for i in order[start : start + step]}) == 1
    # Less than a step of each mix comes twice.
    assert len(order) - len(TYPES) < step * len(set(TYPES))


def test_orders_differ_between_epochs_and_are_reproducible():
    def make(epoch, seed=0):
        sampler = ModalityGroupedSampler(TYPES, LENGTHS, 2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert make(1) == make(1)
    assert make(0) != make(1) and make(0, seed=5) != make(0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"variant": "mixed"}, "mixed"),
        ({"types": []}, "at least one"),
        ({"drop_last": True, "num_processes": 100}, "drop_last"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        ModalityGroupedSampler(**{"types": TYPES, "lengths": LENGTHS, "batch_size": 2, **arguments})
