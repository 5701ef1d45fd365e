"""Experts from dense checkpoints, and folders that do not fit."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_text_config

from unimoe import UniMoEForConditionalGeneration
from unimoe.training.parts import part_of
from unimoe.training.upcycling import assemble_experts


@pytest.fixture(scope="module")
def dense(model_folder):
    return model_folder("dense", text_sparsity=None)


def tuned(dense, folder, part, amount):
    model = UniMoEForConditionalGeneration.from_pretrained(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == part:
                parameter.add_(amount)
    model.save_pretrained(folder)
    return folder


def test_copies_change_nothing(dense):
    model = assemble_experts(dense, [dense] * 3, layers="all").eval()
    inputs = tiny_inputs(model.config)
    expected = UniMoEForConditionalGeneration.from_pretrained(dense).eval()(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert model.config.text_sparsity.num_experts == 3


def test_each_expert_is_its_checkpoint(dense, tmp_path):
    other = tuned(dense, tmp_path / "other", "ffn", 0.1)
    heard = tuned(dense, tmp_path / "heard", "audio_connector", 0.2)
    model = assemble_experts(dense, [dense, other], layers=[1], connectors={"audio_connector": heard})
    assert [hasattr(layer.mlp, "experts") for layer in model.model.language_model.layers] == [False, True, False]
    base = UniMoEForConditionalGeneration.from_pretrained(dense)
    experts, mlp = model.model.language_model.layers[1].mlp.experts, base.model.language_model.layers[1].mlp
    torch.testing.assert_close(experts.gate_up_proj[1], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) + 0.1)
    torch.testing.assert_close(experts.down_proj[0], mlp.down_proj.weight)
    torch.testing.assert_close(model.model.audio_connector.query_tokens, base.model.audio_connector.query_tokens + 0.2)
    # Saved and loaded, it is the same model, with routers that depend on the seed alone.
    model.save_pretrained(tmp_path / "sparse")
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "sparse")
    again = assemble_experts(dense, [dense, other], layers=[1], connectors={"audio_connector": heard})
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_decoder_with_biases(make_model, tmp_path):
    config = make_model().config
    text = tiny_text_config(model_type="phi", vocab_size=config.text_config.vocab_size, num_key_value_heads=4)
    config = type(config)(**{**config.to_dict(), "text_config": text, "text_sparsity": None})
    folder = tmp_path / "phi"
    UniMoEForConditionalGeneration(config).save_pretrained(folder)
    other = tuned(folder, tmp_path / "tuned", "ffn", 0.1)
    model = assemble_experts(folder, [folder, other])
    experts = model.model.language_model.layers[0].mlp.experts
    torch.testing.assert_close(experts.up_proj_bias[1], experts.up_proj_bias[0] + 0.1)


def test_refusals(dense, model_folder, make_model, tmp_path, caplog):
    sparse = model_folder("sparse")
    config = make_model().config
    text = tiny_text_config(vocab_size=config.text_config.vocab_size, intermediate_size=64)
    wide = type(config)(**{**config.to_dict(), "text_config": text, "text_sparsity": None})
    UniMoEForConditionalGeneration(wide).save_pretrained(tmp_path / "wide")
    (tmp_path / "empty").mkdir()
    for experts, options, words in (
        ([dense], {}, "at least two"),
        (str(dense), {}, "each with its folder"),
        ([dense, dense], {"layers": 2}, "layers: must be one of .* got 2"),
        ([dense, dense], {"router_loss_scope": "token"}, "router_loss_scope"),
        ([dense, sparse], {}, "sparse.*does not match the base"),
        ([dense, tmp_path / "wide"], {}, r"wide.*\[32, 64\] there and \[32, 48\]"),
        ([dense, tmp_path / "empty"], {}, "empty.*no config.json"),
        ([dense, dense], {"connectors": {"nose": dense}}, "nose"),
        ([dense, dense], {"layers": [9]}, "9"),
        ([dense, dense], {"top_k": 3}, "top_k"),
    ):
        with pytest.raises(ValueError, match=words):
            assemble_experts(dense, experts, **options)
    with pytest.raises(ValueError, match="sparse already"):
        assemble_experts(sparse, [sparse] * 2)


def test_tuning_that_is_lost_is_named(dense, tmp_path, monkeypatch):
    import unimoe.training.upcycling as upcycling

    seen = []
    monkeypatch.setattr(upcycling.logger, "warning", seen.append)
    assemble_experts(dense, [dense, tuned(dense, tmp_path / "other", "attention", 0.1)])
    assert len(seen) == 1 and "12 tensors outside FFNs" in seen[0]
