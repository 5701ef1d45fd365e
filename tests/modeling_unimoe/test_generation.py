"""Generation: caches, padding, beams, sampling, streaming give what plain repeated forward passes give."""

import copy

import pytest
import torch
from test_modeling_unimoe import join, media_of, ragged_batch
from tiny_models import tiny_config, tiny_inputs
from transformers import TextStreamer

from unimoe import UniMoEForConditionalGeneration

STEPS = 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = UniMoEForConditionalGeneration(tiny_config()).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def by_hand(model, inputs):
    """Greedy ids from full forward passes, without a cache."""
    inputs = dict(inputs)
    for _ in range(STEPS):
        new = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    return inputs["input_ids"][:, -STEPS:]


def generate(model, inputs, **kwargs):
    output = model.generate(**inputs, max_new_tokens=STEPS, do_sample=kwargs.pop("do_sample", False), **kwargs)
    return output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_ids_of_every_cache(model, options):
    inputs = tiny_inputs(model.config)
    assert torch.equal(generate(model, inputs, **options), by_hand(model, inputs))


def test_a_row_alone_and_in_a_left_padded_batch(model):
    rows = ragged_batch(model.config)
    batch = generate(model, join(rows, "left"))
    for index, inputs in enumerate(rows):
        assert torch.equal(batch[index : index + 1], generate(model, inputs))
        assert torch.equal(batch[index : index + 1], by_hand(model, inputs))


@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model):
    inputs = tiny_inputs(model.config)
    options = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(**inputs, **options)
    full = model(**{**inputs, "input_ids": cached.sequences, "attention_mask": torch.ones_like(cached.sequences)})
    start = inputs["input_ids"].shape[1] - 1
    for step, logits in enumerate(cached.logits):
        torch.testing.assert_close(logits, full.logits[:, start + step], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_towers_run_once(model, options):
    inputs = tiny_inputs(model.config)
    calls = []
    towers = [model.model.vision_tower, model.model.audio_tower, model.model.speech_tower]
    hooks = [tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__)) for tower in towers]
    generate(model, inputs, **options)
    for hook in hooks:
        hook.remove()
    # The vision tower sees the images and the video frames, one pass each.
    assert len(calls) == 4, calls


def test_beam_search_keeps_every_rows_items_together(model):
    rows = ragged_batch(model.config)
    batch = generate(model, join(rows, "left"), num_beams=3)
    for index, inputs in enumerate(rows):
        assert torch.equal(batch[index : index + 1], generate(model, inputs, num_beams=3))


def test_several_sequences_per_row(model):
    rows = ragged_batch(model.config)
    torch.manual_seed(0)
    output = generate(model, join(rows, "left"), do_sample=True, num_return_sequences=2)
    assert output.shape == (6, STEPS)


def test_sampling_is_reproducible_by_seed(model):
    inputs = tiny_inputs(model.config)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generate(model, inputs, do_sample=True, temperature=2.0))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_streaming_yields_the_generated_ids(model):
    class Collect(TextStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value)

        def end(self):
            pass

    inputs = tiny_inputs(model.config, batch_size=1)
    streamer = Collect()
    expected = generate(model, inputs, streamer=streamer)
    assert torch.equal(torch.cat([ids.reshape(-1) for ids in streamer.ids])[-STEPS:], expected[0])


def test_inputs_embeds(model):
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        embeds = model.model._splice(inputs["input_ids"], None, model.model.encode_media(**media_of(inputs)))
    found = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(found, by_hand(model, inputs))


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_logits_processors_that_index_by_id(model, in_vocabulary):
    ids = dict(image_token_id=95, video_token_id=96, audio_token_id=97, speech_token_id=98) if in_vocabulary else {}
    other = UniMoEForConditionalGeneration(tiny_config(**ids)).eval() if in_vocabulary else model
    other.generation_config.pad_token_id = 0
    inputs = tiny_inputs(other.config)
    output = generate(other, inputs, repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert (output < 95).all() or not in_vocabulary
    assert output.shape == (2, STEPS)


def test_placeholders_are_never_generated(model):
    ids = dict(image_token_id=95, video_token_id=96, audio_token_id=97, speech_token_id=98)
    biased = copy.deepcopy(model)
    biased.config = tiny_config(**ids)
    biased.model.config = biased.config
    with torch.no_grad():
        biased.lm_head.weight[95:] = 0
        biased.lm_head.weight[:95] *= 1e-3
    output = generate(biased, tiny_inputs(biased.config, modalities=()))
    assert (output < 95).all()


def test_encoded_media_may_be_given_instead_of_raw_media(model):
    inputs = tiny_inputs(model.config)
    expected = generate(model, inputs)
    with torch.no_grad():
        encoded = model.model.encode_media(**media_of(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generate(model, {**text, "mm_encoder_outputs": encoded}), expected)


def test_placeholders_inside_the_vocabulary_without_items():
    ids = dict(image_token_id=95, video_token_id=96, audio_token_id=97, speech_token_id=98)
    model = UniMoEForConditionalGeneration(tiny_config(**ids)).eval()
    inputs = tiny_inputs(model.config, modalities=("image", "audio"))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match="6 audio placeholder tokens.*`input_values` gives 0"):
        generate(model, given)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_a_wrong_number_of_items_for_several_sequences_per_row(model, options):
    inputs = tiny_inputs(model.config, modalities=("image",))
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(ValueError, match="8 image placeholder tokens.*gives 4"):
        generate(model, inputs, **options)


def test_a_new_picture_behind_a_kept_cache_for_several_sequences_per_row(model):
    first, second = (tiny_inputs(model.config, 1, ("image",), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        cache = model(**first).past_key_values
    whole = {name: torch.cat([first[name], second[name]], dim=1) for name in ("input_ids", "attention_mask")}
    both = torch.cat([first["pixel_values"], second["pixel_values"]])
    options = dict(num_beams=2, num_return_sequences=2)
    expected = generate(model, {**whole, "pixel_values": both}, **options)
    cache.batch_repeat_interleave(2)
    new = {**whole, "pixel_values": second["pixel_values"], "past_key_values": cache}
    assert torch.equal(generate(model, new, **options), expected)


def test_prompt_lookup_of_a_model_without_towers():
    towers = ("vision", "audio", "speech")
    none = dict.fromkeys([f"{tower}_{part}" for tower in towers for part in ("config", "connector_config")])
    model = UniMoEForConditionalGeneration(tiny_config(**none)).eval()
    model.generation_config.pad_token_id = 0
    inputs = tiny_inputs(model.config, 1)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), generate(model, inputs))


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_prompt_lookup_in_front_of_an_item(model, in_vocabulary):
    ids = dict(image_token_id=95, video_token_id=96, audio_token_id=97, speech_token_id=98) if in_vocabulary else {}
    other = UniMoEForConditionalGeneration(tiny_config(**ids)).eval() if in_vocabulary else model
    other.generation_config.pad_token_id = 0
    inputs = tiny_inputs(other.config, 1, ("image",))
    before = inputs["input_ids"][0, 3].item()
    # The generated token stands in the prompt in front of the picture, so what is looked up are placeholders.
    options = dict(sequence_bias={(before,): 100.0})
    assert torch.equal(
        generate(other, inputs, prompt_lookup_num_tokens=3, **options), generate(other, inputs, **options)
    )


def test_speech_only_model_with_beams():
    none = dict.fromkeys(["vision_config", "vision_connector_config", "audio_config", "audio_connector_config"])
    model = UniMoEForConditionalGeneration(tiny_config(**none)).eval()
    model.generation_config.pad_token_id = 0
    inputs = tiny_inputs(model.config)
    batch = generate(model, inputs, num_beams=2)
    for index in range(2):
        alone = {name: value[index : index + 1] for name, value in inputs.items()}
        assert torch.equal(batch[index : index + 1], generate(model, alone, num_beams=2))
