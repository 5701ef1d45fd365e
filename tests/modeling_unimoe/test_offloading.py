"""Weights that accelerate keeps away from their modules until these run."""

import pytest
import torch
from tiny_models import tiny_config, tiny_inputs
from transformers import AutoModelForMultimodalLM

from unimoe import UniMoEForConditionalGeneration

accelerate = pytest.importorskip("accelerate")
IDS_INSIDE = {"image_token_id": 95, "video_token_id": 96, "audio_token_id": 97, "speech_token_id": 98}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniMoEForConditionalGeneration(tiny_config(**IDS_INSIDE)).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offloading")
    model.save_pretrained(folder / "model")
    return folder


def offloaded(saved, where):
    """The saved model with everything, or one part, away from the CPU's memory."""
    if where == "cpu_offload":
        return accelerate.cpu_offload(AutoModelForMultimodalLM.from_pretrained(saved / "model").eval())
    parts = UniMoEForConditionalGeneration(tiny_config()).model.named_children()
    device_map = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name, _ in parts}, where: "disk"}
    if where == "":
        device_map = {"": "disk"}
    return AutoModelForMultimodalLM.from_pretrained(
        saved / "model", device_map=device_map, offload_folder=saved / "away"
    ).eval()


@pytest.mark.parametrize("where", ["", "cpu_offload", "model.audio_tower", "model.audio_connector"])
@pytest.mark.parametrize("modality", ["image", "video", "audio", "speech"])
@torch.no_grad()
def test_every_modality(model, saved, modality, where):
    inputs = tiny_inputs(model.config, modalities=(modality,))
    found = offloaded(saved, where)
    assert any(parameter.is_meta for parameter in found.parameters())
    torch.testing.assert_close(found(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("where", ["", "cpu_offload", "model.language_model"])
@torch.no_grad()
def test_placing_by_embeddings(model, saved, where):
    inputs = tiny_inputs(model.config, modalities=("image",))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, pixel_values=pixels, **options)[:, ids.shape[1] :]
    found = offloaded(saved, where)
    embeds = found.get_input_embeddings()(ids)
    assert torch.equal(found.generate(inputs_embeds=embeds, pixel_values=pixels, **options), expected)
