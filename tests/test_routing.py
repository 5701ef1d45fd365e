"""Counts of the experts that were chosen, against the router logits and in every way in which a model is called."""

import math

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_config, tiny_inputs
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import unimoe
from unimoe import UniMoEForConditionalGeneration, record_routing, sparsify
from unimoe.modeling_unimoe.modality_routing import TOKEN_TYPES
from unimoe.training.lora import lora_config

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniMoEForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4)).eval()


def choices_of(logits_TE, top_k=2):
    return logits_TE.topk(top_k).indices.flatten().bincount(minlength=logits_TE.shape[-1])


def test_counts_are_those_of_the_router_logits(model):
    inputs = tiny_inputs(model.config)
    inputs["attention_mask"][:, :1] = 0
    with torch.no_grad(), record_routing(model) as routing:
        router_logits = model(**inputs, output_router_logits=True).router_logits
    kinds, real = model.model.token_types(inputs["input_ids"]).flatten(), inputs["attention_mask"].flatten() == 1
    assert not real.all() and len(routing.counts) == len(router_logits)
    for logits, counts, shares, entropy in zip(
        router_logits, routing.counts.values(), routing.shares.values(), routing.entropy.values()
    ):
        assert set(counts) == set(TOKEN_TYPES)
        for number, kind in enumerate(TOKEN_TYPES):
            own = logits[(kinds == number) & real]
            assert torch.equal(counts[kind], choices_of(own))
            torch.testing.assert_close(shares[kind], counts[kind] / counts[kind].sum(), check_dtype=False)
            expected = torch.distributions.Categorical(logits=own).entropy().mean() / math.log(own.shape[-1])
            assert entropy[kind] == pytest.approx(expected.item(), abs=1e-5)


def test_table(model):
    with torch.no_grad(), record_routing(model) as routing:
        assert str(routing) == "no token has been routed yet"
        model(**tiny_inputs(model.config))
    lines = str(routing).splitlines()
    assert lines[0].split()[:4] == ["router", "tokens", "of", "number"] and lines[0].endswith("expert 3")
    assert len(lines) == 1 + len(routing.counts) * len(TOKEN_TYPES)
    name = next(iter(routing.counts))
    share = routing.shares[name]["image"][0].item()
    (line,) = [line for line in lines if line.startswith(f"{name} ") and " image " in line]
    assert line.split()[3] == f"{share:.0%}"


def test_nothing_is_counted_outside(model):
    inputs = tiny_inputs(model.config)
    with torch.no_grad(), record_routing(model) as routing:
        model(**inputs)
    before = routing.counts
    with torch.no_grad():
        model(**inputs)
    for name, kinds in routing.counts.items():
        assert all(torch.equal(count, before[name][kind]) for kind, count in kinds.items())
    with pytest.raises(RuntimeError, match="inside"), record_routing(model) as routing:
        raise RuntimeError("inside")
    with torch.no_grad():
        model(**inputs)
    assert not any(routing.counts.values())


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_leaves_padding_out(mixtral, use_cache):
    ids = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    mask = (ids > 0).long()
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": use_cache,
    }
    with record_routing(mixtral) as routing:
        found = mixtral.generate(ids, attention_mask=mask, **options)
    # The prompts, and two of the three new tokens of each; without a cache all that stands before is computed again.
    tokens = (3 + 5) + 2 * 2 if use_cache else (3 + 5) + (4 + 6) + (5 + 7)
    assert found.shape == (2, 8) and len(routing.counts) == 2
    assert all(counts["all"].sum() == 2 * tokens for counts in routing.counts.values())


def test_a_stock_model_made_sparse():
    torch.manual_seed(0)
    model = sparsify(LlamaForCausalLM(LlamaConfig(**TINY)), layers=[1], num_experts=3, top_k=1)
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad(), record_routing(model) as routing:
        logits = model(ids, output_router_logits=True).router_logits[0]
    ((name, counts),) = routing.counts.items()
    assert "layers.1." in name and torch.equal(counts["all"], choices_of(logits, 1))


@pytest.mark.parametrize("routers", [False, True])
def test_names_under_an_adapter_are_the_models_own(routers):
    torch.manual_seed(0)
    model = UniMoEForConditionalGeneration(tiny_config())
    inputs = tiny_inputs(model.config)
    with torch.no_grad(), record_routing(model.eval()) as plain:
        model(**inputs)
    adapter = get_peft_model(model, lora_config(model, r=2, routers=routers)).eval()
    with torch.no_grad(), record_routing(adapter) as routing:
        adapter(**inputs)
    assert list(routing.counts) == list(plain.counts)
    for name, kinds in routing.counts.items():
        assert all(torch.equal(count, plain.counts[name][kind]) for kind, count in kinds.items())
    with torch.no_grad(), record_routing(adapter) as routing:
        adapter.generate(**inputs, max_new_tokens=2, eos_token_id=None)
    assert all(set(TOKEN_TYPES) == set(kinds) for kinds in routing.counts.values())


def test_a_sparse_vision_tower_and_connector():
    torch.manual_seed(0)
    config = tiny_config()
    model = unimoe.upcycle(
        UniMoEForConditionalGeneration(config).eval(),
        vision={"num_experts": 3, "top_k": 1},
        connector={"num_experts": 4, "top_k": 2},
    )
    with torch.no_grad(), record_routing(model) as routing:
        model(**tiny_inputs(model.config))
    towers = {name: kinds for name, kinds in routing.counts.items() if "language_model" not in name}
    assert any("vision_tower" in name for name in towers) and any("connector" in name for name in towers)
    assert all(set(kinds) == {"all"} and kinds["all"].sum() > 0 for kinds in towers.values())


def test_a_dense_model_is_refused():
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no router"),
        record_routing(LlamaForCausalLM(LlamaConfig(**TINY))),
    ):
        pass
