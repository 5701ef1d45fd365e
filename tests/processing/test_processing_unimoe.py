"""`UniMoEProcessor`: ids and pixels of the originals, texts to ids, saving and loading."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_processor import AUDIO_CHUNK, NUM_TOKENS, SPEECH_CHUNK, ids_of, image, media, tiny_processor, tiny_tokenizer
from transformers import AutoProcessor, CLIPImageProcessorPil, LlamaTokenizer, SiglipImageProcessorPil

from unimoe.processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoEProcessor

SENTINELS = {-200: "image", -300: "sound", -400: "video"}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


# What the original systems give


def golden_processor(root, base, **kwargs):
    checkpoint = root / "checkpoint"
    return UniMoEProcessor(
        CLIPImageProcessorPil.from_pretrained(checkpoint / "clip-vit-large-patch14-336"),
        LlamaTokenizer.from_pretrained(checkpoint / base),
        UniMoEFeatureExtractor(audio_chunk_samples=AUDIO_CHUNK, speech_chunk_samples=SPEECH_CHUNK),
        **{"num_image_tokens": 1, "num_video_tokens": 1, **kwargs},
    )


@pytest.fixture(scope="module")
def audio_golden(golden):
    root = golden("unimoe_audio")
    return (
        root,
        golden_processor(root, "Uni-MoE-audio-base", num_audio_tokens=1),
        json.loads((root / "cases.json").read_text()),
    )


@pytest.fixture(scope="module", params=["e2", "v1.5"])
def speech_golden(golden, request):
    root = golden("unimoe_speech")
    base = {"e2": "Uni-MoE-speech-base", "v1.5": "Uni-MoE-speech-base-interval"}[request.param]
    cases = json.loads((root / f"cases_{request.param}.json").read_text())
    return root, golden_processor(root, base, num_speech_tokens=1), cases, f"cases_{request.param}.safetensors"


def assert_same_ids(processor, text, expected):
    """The originals have one negative id where an item stands, this processor the item's tokens (here one)."""
    sound_token = processor.audio_token_id or processor.speech_token_id
    tokens = {"image": processor.image_token_id, "video": processor.video_token_id, "sound": sound_token}
    assert ids_of(processor, text) == [tokens[SENTINELS[i]] if i < 0 else i for i in expected], text


def test_ids_of_uni_moe_audio(audio_golden):
    _, processor, cases = audio_golden
    # The last probe is the empty text, which is refused here.
    probes = [probe for probe in cases["component_tokenizer"] if probe["text"]]
    prompts = [case for case in cases.values() if isinstance(case, dict) and "prompt" in case]
    assert len(probes) == 7 and prompts
    for probe in probes:
        assert_same_ids(processor, probe["text"], probe["multimodal_ids"])
    for case in prompts:
        ids = case["input_ids"]
        assert_same_ids(processor, case["prompt"], ids[0] if isinstance(ids[0], list) else ids)


def test_ids_of_uni_moe_speech(speech_golden):
    # Its sounds have `<audio>` in the text and its one sound tower is for speech.
    _, processor, cases, _ = speech_golden
    probes = cases["tokenizer_probes"]
    prompts = [case for case in cases["cases"].values() if "prompt" in case]
    assert probes and prompts
    for probe in probes:
        assert_same_ids(processor, probe["text"], probe["ids"])
    for case in prompts:
        assert_same_ids(processor, case["prompt"], case["input_ids"])


def test_template_renders_the_prompts_of_uni_moe(audio_golden):
    _, processor, cases = audio_golden
    for name in ("text", "image", "video", "audio", "image_audio", "video_audio", "audio_long"):
        inputs = cases[name]["inputs"]
        blocks = [
            {"type": kind}
            for kind, key in (("image", "image"), ("audio", "voice"), ("video", "video"))
            if key in inputs
        ]
        content = [*blocks, {"type": "text", "text": inputs["query"]}]
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert rendered == cases[name]["prompt"]


def test_pixels_of_uni_moe_audio(audio_golden):
    root, processor, cases = audio_golden
    tensors = load_file(root / "cases.safetensors")
    names = [
        name.split(".")[1]
        for name in tensors
        if name.startswith("component_clip_preprocess.") and name.count(".") == 1
    ]
    assert len(names) == 4
    for name in names:
        pixels = processor("<image>", images=root / "assets" / f"{name}.png", return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], tensors[f"component_clip_preprocess.{name}"])
    paths = [str(root / "assets" / "video_frames" / name) for name in cases["video"]["frame_order_used"]]
    video = processor("<video>", videos=paths, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(video, tensors["video.video_pixel_values"])


def test_pixels_of_uni_moe_speech(speech_golden):
    root, processor, cases, tensors = speech_golden
    tensors = load_file(root / tensors)
    for name in ("odd", "gray", "tall"):
        pixels = processor("<image>", images=root / "inputs" / f"{name}.png", return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], tensors[f"clip_preprocess.{name}"])
    folder = processor("<video>", videos=root / cases["cases"]["video"]["media"]["video"], return_tensors="pt")
    # The original takes a folder's files in no particular order.
    found, expected = folder["pixel_values_videos"][0], tensors["video.video_pixel_values"][0]
    assert torch.equal(found[found.sum((1, 2, 3)).argsort()], expected[expected.sum((1, 2, 3)).argsort()])


def test_pixels_padded_to_a_square(golden):
    root = golden("unimoe_speech")
    processor = golden_processor(root, "Uni-MoE-speech-base", num_speech_tokens=1, image_aspect_ratio="pad")
    pixels = processor("<image>", images=root / "inputs" / "tall.png", return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], load_file(root / "cases_e2.safetensors")["clip_preprocess_pad.tall"])


# Texts to ids


def test_placeholders_take_the_models_token_counts(processor):
    text = "the <image> is <video><audio>x<speech>"
    row = ids_of(processor, text)
    for kind, count in NUM_TOKENS.items():
        assert row.count(getattr(processor, f"{kind}_token_id")) == count
    assert row[0] == processor.tokenizer.bos_token_id and row.count(row[0]) == 1


def test_chunks_are_tokenised_alone(processor):
    tokenizer = processor.tokenizer
    first, second = tokenizer("what ")["input_ids"], tokenizer("\nis", add_special_tokens=False)["input_ids"]
    assert ids_of(processor, "what <image>\nis") == [*first, *[processor.image_token_id] * 4, *second]
    assert ids_of(processor, "<image>") == [tokenizer.bos_token_id, *[processor.image_token_id] * 4]
    assert ids_of(processor, "<image>", add_special_tokens=False) == [processor.image_token_id] * 4


def test_prefix_space_before_a_leading_space(processor):
    space = processor.tokenizer.convert_tokens_to_ids("▁")
    row = ids_of(processor, "<image> ASSISTANT:", add_special_tokens=False)[4:]
    assert row == [space, *processor.tokenizer("ASSISTANT:", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor, side):
    texts = ["what is <image>", "the"]
    batch = processor(
        texts, images=image(), padding=True, padding_side=side, return_tensors="pt", return_mm_token_type_ids=True
    )
    for i, text in enumerate(texts):
        row = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert row == ids_of(processor, text)
    padded = batch["input_ids"][1] == processor.tokenizer.pad_token_id
    assert padded.sum() == len(padded) - len(ids_of(processor, "the"))
    assert padded[0 if side == "left" else -1]
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)


def test_padding_to_a_length(processor):
    assert processor(["the", "what is"], padding="max_length", max_length=40, return_tensors="np")[
        "input_ids"
    ].shape == (2, 40)
    assert processor("the", padding=True, pad_to_multiple_of=16, return_tensors="pt")["input_ids"].shape == (1, 16)
    assert [len(row) for row in processor(["the", "what is"])["input_ids"]] == [2, 3]


def test_truncation(processor):
    whole = ids_of(processor, "<image> the the the")
    assert ids_of(processor, "<image> the the the", truncation=True, max_length=7) == whole[:7]
    with pytest.raises(ValueError, match="would cut away a medium"):
        ids_of(processor, "<image> the", truncation=True, max_length=3)


# Saving


@pytest.mark.parametrize("kinds", [tuple(NUM_TOKENS), ("image",), ("speech",), ()], ids=str)
def test_save_and_load(tmp_path, kinds):
    processor = tiny_processor(
        kinds, max_length=77, num_video_frames=4, image_aspect_ratio="pad", chat_template="{{ 1 }}"
    )
    processor.save_pretrained(tmp_path)
    for loaded in (UniMoEProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is UniMoEProcessor
        assert {**loaded.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
        assert loaded.chat_template == "{{ 1 }}"
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert type(loaded.image_processor) is (CLIPImageProcessorPil if "image" in kinds else type(None))
        text = " ".join(["what is", *(f"<{kind}>\nthe" for kind in kinds)])
        before, after = processor(text, **media(text)), loaded(text, **media(text))
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert "UniMoEProcessor" in str(loaded)
    assert UniMoEProcessor.from_pretrained(tmp_path, max_length=99).max_length == 99


def test_another_image_processor(tmp_path):
    processor = UniMoEProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        tiny_tokenizer(),
        num_image_tokens=4,
        image_aspect_ratio="pad",
    )
    processor.save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is SiglipImageProcessorPil
    pixels = loaded("<image>", images=image(width=16, height=8))["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    # The canvas has the mean colour, which is 0 after normalisation but for its rounding to a whole number.
    assert abs(pixels[0, :, 0]).max() < 0.01


def test_other_backends_are_exchanged():
    # With torchvision this is another class.
    given = transformers.CLIPImageProcessor(crop_size={"height": 8, "width": 8})
    processor = UniMoEProcessor(given, tiny_tokenizer(), num_image_tokens=4)
    assert type(processor.image_processor) is CLIPImageProcessorPil
    assert processor.image_processor.crop_size["height"] == 8

    class HomemadeImageProcessor:
        pass

    with pytest.raises(ValueError, match="HomemadeImageProcessor has no PIL backend"):
        UniMoEProcessor(HomemadeImageProcessor(), tiny_tokenizer(), num_image_tokens=4)


def test_remote_code_without_the_package(tmp_path):
    """A saved folder brings all the code it needs, the pipeline's too, and passes it on when it is saved again."""
    tiny_processor().save_pretrained(tmp_path / "first")
    program = """
import sys
sys.modules["unimoe"] = None
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained("first", trust_remote_code=True)
processor.save_pretrained("second")
processor = AutoProcessor.from_pretrained("second", trust_remote_code=True)
print(processor("what is", padding=True)["input_ids"])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(str(tiny_processor()("what is")["input_ids"]))
    assert (tmp_path / "second" / "pipeline_unimoe.py").is_file()


def test_decode(processor):
    rows = [ids_of(processor, "what is <image>the"), ids_of(processor, "the")]
    assert processor.batch_decode(rows, skip_special_tokens=True) == ["what is  the", "the"]
    assert processor.post_process_image_text_to_text(rows)[1] == "the"


def test_tokens_for_serving_engines(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[(20, 30), (5, 5)])
    assert data.num_image_tokens == [4, 4] and data.num_image_patches == [1, 1]
