"""The experiments of docs/claims.md, with a random model, random features and two steps."""

import json

import numpy as np
import pytest
import torch

import unimoe
from scripts.experiments import claims
from scripts.experiments.comparisons import fluctuation, verdict
from scripts.experiments.conditions import CONDITIONS, Condition, Settings
from scripts.experiments.report import main as report
from scripts.experiments.starts import decoder_parameters, starting_model, widened
from scripts.experiments.tables import all_tables
from scripts.tiny.items import CONTENT_TYPES
from scripts.tiny.tower_features import FeatureBank
from scripts.tiny.towers import CLASSES
from scripts.tiny.training import build

ITEMS = 12
# [tokens, width] of the features of one part. Sounds have more tokens in truth.
SHAPES = {"image": (36, 128), "video": (36, 128), "audio": (8, 96), "speech": (10, 96)}
TINY = Settings(align_steps=1, expert_steps=1, mixed_steps=2, batch_size=4, warmup_steps=1, questions=3)


class Items:
    """Items of one part each that show every class once at least."""

    def __init__(self, kind: str):
        self.facts = [{name: values[i % len(values)] for name, values in CLASSES[kind].items()} for i in range(ITEMS)]

    def parts(self, index: int) -> list[int]:
        return [index]


def random_banks(seed: int) -> dict[str, FeatureBank]:
    rng = np.random.default_rng(seed)
    return {
        kind: FeatureBank(
            Items(kind), rng.normal(size=(ITEMS, *SHAPES[CONTENT_TYPES[kind]])).astype(np.float16), ITEMS
        )
        for kind in CLASSES
    }


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage-1")
    model, processor = build(0)
    model.save_pretrained(folder)
    return folder, processor


@pytest.fixture(scope="module")
def experiment(aligned, tmp_path_factory):
    folder, processor = aligned
    return claims.Experiment(
        TINY, folder, processor, random_banks(0), random_banks(1), tmp_path_factory.mktemp("runs")
    )


@pytest.mark.parametrize("name", ["two", "tuned_aux", "wide"])
def test_a_run_is_measured_and_kept(experiment, name):
    result = experiment.run(name, seed=0)
    assert set(result["accuracy"]) == {"image", "video", "audio", "speech", "mixed"}
    assert all(0 <= value <= 1 for value in result["accuracy"].values())
    assert len(result["curve"]) == TINY.steps(CONDITIONS[name])
    assert np.isfinite([*result["curve"], *result["loss"].values()]).all()
    if name == "wide":
        assert result["expert_load"] == {}
    else:
        assert sum(result["expert_load"]["text"]) == pytest.approx(1)
        assert 0 < result["router_entropy"]["text"] <= 1.001
    file = claims.run_file(experiment.folder, name, 0)
    file.write_text(json.dumps(result | {"seed": "kept"}))
    assert experiment.run(name, seed=0)["seed"] == "kept"
    file.write_text(json.dumps(result))


def test_runs_with_other_settings_stay_apart(experiment):
    with pytest.raises(ValueError, match="other settings"):
        claims.claim_folder(experiment.folder, Settings())


def first_logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="module")
def dense(aligned):
    return unimoe.UniMoEForConditionalGeneration.from_pretrained(aligned[0])


@pytest.mark.parametrize("start", ["wide", "copies"])
def test_starts_that_compute_what_stage_1_computes(aligned, dense, start):
    model = starting_model(Condition("", start), "all", aligned[0], [], seed=1)
    torch.testing.assert_close(first_logits(model), first_logits(dense), rtol=1e-4, atol=1e-4)


def test_wide_activates_as_much_as_two_experts(aligned, dense):
    sparse = starting_model(Condition("", "copies"), "all", aligned[0], [], seed=1)
    routers = sum(layer.mlp.gate.weight.numel() for layer in sparse.model.language_model.layers)
    ffn, _ = decoder_parameters(dense)
    assert decoder_parameters(sparse) == (2 * ffn + routers, 4 * ffn + routers)
    wide = starting_model(Condition("", "wide"), "all", aligned[0], [], seed=1)
    assert decoder_parameters(wide) == (2 * ffn, 2 * ffn)


def test_the_halves_of_a_wide_ffn_learn_apart(aligned):
    model = widened(unimoe.UniMoEForConditionalGeneration.from_pretrained(aligned[0]), "all", seed=1)
    first_grads = model(input_ids=torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None])
    first_grads.loss.backward()
    halves = model.model.language_model.layers[0].mlp.down_proj.weight.grad.chunk(2, dim=1)
    assert not torch.allclose(*halves)
    assert halves[1].abs().max() > 0


def test_fresh_experts_are_new_and_differ(aligned, dense):
    model = starting_model(Condition("", "fresh"), "all", aligned[0], [], seed=1)
    down = model.model.language_model.layers[0].mlp.experts.down_proj
    assert not torch.allclose(down[0], down[1])
    assert not torch.allclose(down[0], dense.model.language_model.layers[0].mlp.down_proj.weight)
    assert down.std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.05)


def test_report_from_runs(experiment, tmp_path):
    for name in ("two", "tuned_aux", "wide"):
        experiment.run(name, seed=0)
    results = tmp_path / "results.json"
    claims.gather(experiment.folder, TINY, results)
    page = tmp_path / "page.md"
    tables = all_tables(json.loads(results.read_text())["runs"])
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in tables))
    report(["--results", str(results), "--page", str(page)])
    assert "old" not in page.read_text()
    assert "| 2 tuned experts |" in page.read_text()
    assert all((tmp_path / f"{name}.png").stat().st_size < 200_000 for name in ("accuracy", "loss", "routing"))


def test_verdicts():
    assert verdict([1.0, 1.2, 0.9], +1) == "holds"
    assert verdict([1.0, 1.2, 0.9], -1) == "does not hold"
    assert verdict([-0.1, 1.2, 0.9], +1) == "cannot be told"
    # All of one sign, but too far apart.
    assert verdict([0.1, 4.0, 0.1], +1) == "cannot be told"
    assert verdict([1.0], +1) == "cannot be told"


def test_fluctuation_leaves_out_the_trend():
    falling = list(np.linspace(2, 1, 100))
    noisy = [value + 0.1 * (-1) ** step for step, value in enumerate(falling)]
    assert fluctuation({"curve": falling}) < 1e-6
    assert fluctuation({"curve": noisy}) == pytest.approx(0.1, rel=0.06)
