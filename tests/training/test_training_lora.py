"""Adapters on attention, dense FFNs, 3-D experts and routers: reach, equal logits after saving and merging, refusals."""

import json

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_inputs, tiny_text_config
from transformers import AutoModelForMultimodalLM, AutoProcessor

from unimoe import UniMoEForConditionalGeneration
from unimoe.training.lora import load_adapter, lora_config, merge_adapter
from unimoe.training.parts import part_of, train_only, training_report

LORA = {"r": 4, "alpha": 8}


def adapted(model, seed=1, **options):
    """A model with an adapter whose weights are not zero."""
    adapter = get_peft_model(model, lora_config(model, **{**LORA, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_saved_reloaded_and_merged_models_are_equal(model_folder, processor, tmp_path, implementation):
    base = model_folder("sparse")

    def load(folder):
        model = AutoModelForMultimodalLM.from_pretrained(folder).eval()
        model.set_experts_implementation(implementation)
        return model

    model = load(base)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        plain = model(**inputs).logits
        adapter = adapted(model, routers=True)
        assert model.config.text_config._experts_implementation == implementation
        outputs = adapter(**inputs, output_router_logits=True)
        assert len(outputs.router_logits) == 2 and (outputs.logits - plain).abs().max() > 0.1
        expected = outputs.logits
        adapter.save_pretrained(tmp_path / "adapter")
        close(load_adapter(load(base), tmp_path / "adapter").eval()(**inputs).logits, expected)
        close(load(tmp_path / "adapter")(**inputs).logits, expected)
        merged = merge_adapter(adapter, tmp_path / "merged", processor)
        close(merged(**inputs).logits, expected)
        close(load(tmp_path / "merged")(**inputs).logits, expected)
    assert (tmp_path / "merged" / "modeling_unimoe.py").is_file()
    assert AutoProcessor.from_pretrained(tmp_path / "merged").towers == processor.towers


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"attention", "ffn", "experts"}),
        ({"experts": False, "ffn": False, "lora_dropout": 0.1}, {"attention"}),
        ({"attention": False, "ffn": False}, {"experts"}),
        ({"routers": True}, {"attention", "ffn", "experts", "routers"}),
        (
            {"language_model_only": False},
            {"attention", "ffn", "experts", "vision_tower", "audio_tower", "speech_tower"},
        ),
    ],
)
def test_what_is_reached(make_model, options, expected):
    model = make_model()
    adapter = get_peft_model(model, lora_config(model, connectors=False, **LORA, **options))
    trained = {part_of(name) for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert trained == expected
    adapter(**tiny_inputs(model.config)).logits.sum().backward()
    without = [n for n, p in adapter.named_parameters() if p.requires_grad and p.grad is None]
    # The features are those of CLIP's last layer but one.
    assert all("vision_tower" in name for name in without), without


def test_connectors_are_trained_whole_by_default(make_model):
    adapter = get_peft_model(make_model(), lora_config(make_model(), **LORA))
    names = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    for connector in ("vision_connector", "audio_connector", "speech_connector"):
        assert any(f"{connector}.modules_to_save" in name for name in names)


def test_gradient_checkpointing(make_model):
    model = make_model()
    model.gradient_checkpointing_enable()
    adapter = get_peft_model(model, lora_config(model, routers=True, **LORA)).train()
    inputs = tiny_inputs(model.config)
    adapter(**inputs, labels=inputs["input_ids"].clamp(max=98)).loss.backward()
    assert all(p.grad is not None for n, p in adapter.named_parameters() if p.requires_grad and "language" in n)


def test_refusals(make_model, model_folder, processor, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="lora_dropout"):
        lora_config(model, lora_dropout=0.1)
    with pytest.raises(ValueError, match="nothing to adapt: attention, ffn, experts are all off"):
        lora_config(model, attention=False, ffn=False, experts=False)
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(model, tmp_path)
    adapted(make_model()).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = model.config
    text = tiny_text_config(vocab_size=config.text_config.vocab_size)
    for changed, sparsity, words in (
        ({**text, "hidden_size": 48}, config.text_sparsity, "another model.*48"),
        (text, None, "another model.*has no model.language_model.layers.0.mlp.experts"),
        ({**text, "num_hidden_layers": 1}, config.text_sparsity, "another model.*layers"),
        (text, type(config.text_sparsity)(layers="even", num_experts=6), "another model.*experts"),
    ):
        other = type(config)(**{**config.to_dict(), "text_config": changed, "text_sparsity": sparsity})
        other = UniMoEForConditionalGeneration(other)
        with pytest.raises(ValueError, match=words):
            load_adapter(other, tmp_path / "adapter")
        # Also where the base of an adapter has been replaced since.
        other.save_pretrained(tmp_path / "base")
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=words):
            AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter")


def test_freezing_and_the_report(make_model):
    model = make_model()
    trained = train_only(model, ["experts", "audio_connector"])
    assert {part_of(name) for name in trained} == {"experts", "audio_connector"}
    report = training_report(model).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in report[1:-1]}
    assert rows["experts"] == ["36,864", "36,864"] and rows["attention"][1] == "frozen"
    weights = 4 * model.num_parameters()
    trained_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"weights {weights / 1e3:.1f} KB" in report[-1]
    assert f"optimizer {2 * trained_bytes / 1e3:.1f} KB" in report[-1]
    train_only(model, ["language_model"])
    assert model.lm_head.weight.requires_grad and not next(model.model.vision_tower.parameters()).requires_grad
    with pytest.raises(ValueError, match="no ffn|unknown part"):
        train_only(model, ["elbows"])
