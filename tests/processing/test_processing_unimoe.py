"""`UniMoEProcessor`: ids and pixels of the originals, the forms of media, every error, chats, saving."""

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_processor import AUDIO_CHUNK, NUM_TOKENS, SPEECH_CHUNK, frames, image, sound, tiny_processor, tiny_tokenizer
from transformers import AutoProcessor, CLIPImageProcessorPil, LlamaTokenizer, SiglipImageProcessorPil

from unimoe.processing import processing_unimoe
from unimoe.processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoEProcessor

RATE = 16000
SENTINELS = {-200: "image", -300: "sound", -400: "video"}
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def media(text):
    """An item for each placeholder of a text."""
    items = {"image": image(), "video": frames(2), "audio": (sound(), RATE), "speech": (sound(), RATE)}
    counts = {kind: text.count(f"<{kind}>") for kind in items}
    return {ARGUMENTS[kind]: [items[kind]] * count for kind, count in counts.items() if count}


def ids_of(processor, text, **kwargs):
    return processor(text, **media(text), **kwargs)["input_ids"][0]


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
    assert len(probes) == 7 and len(prompts) == 8
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


# Forms of media


def test_names_and_shapes(processor):
    text = "<image><image><video><audio><speech>"
    batch = processor(text, **media(text), return_tensors="pt")
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert shapes == {
        "pixel_values": (2, 3, 16, 16),
        "pixel_values_videos": (1, 2, 3, 16, 16),
        "input_values": (1, 64, 128),
        "input_values_mask": (1, 64),
        "input_features": (1, 80, 40),
    }
    assert {name for name, value in batch.items() if value.dtype == torch.float32} == set(shapes) - {
        "input_values_mask"
    }
    assert set(batch) <= set(processor.model_input_names)
    assert set(processor("the")) == {"input_ids", "attention_mask"}


def test_forms_of_images(processor, tmp_path):
    file = tmp_path / "image.png"
    image().save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    forms = [image(), str(file), file, file.read_bytes(), text, f"data:image/png;base64,{text}", np.asarray(image())]
    forms += [torch.from_numpy(np.asarray(image()).transpose(2, 0, 1).copy()), f"file://{file}"]
    expected = processor("<image>", images=image(), return_tensors="pt")["pixel_values"]
    for form in forms:
        for argument in (form, [form], [[form]]):
            assert torch.equal(processor("<image>", images=argument, return_tensors="pt")["pixel_values"], expected)


def test_flat_and_nested_lists(processor):
    texts = ["<image> the <image>", "what", "<image>"]
    images = [image(0), image(1), image(2)]
    batches = [
        processor(texts, images=images, padding=True, return_tensors="pt"),
        processor(texts, images=[images[:2], [], [images[2]]], padding=True, return_tensors="pt"),
        processor(texts, images=[images[:2], None, images[2]], padding=True, return_tensors="pt"),
        processor(texts, images=np.stack([np.asarray(one) for one in images]), padding=True, return_tensors="pt"),
    ]
    for batch in batches:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batches[0])


def test_forms_of_videos(processor, tmp_path):
    for i, frame in enumerate(frames(3)):
        frame.save(tmp_path / f"{i}.png")
    paths = sorted(map(str, tmp_path.iterdir()))
    array = np.stack([np.asarray(frame) for frame in frames(3)])
    expected = processor("<video>", videos=frames(3), return_tensors="pt")["pixel_values_videos"]
    assert expected.shape == (1, 3, 3, 16, 16)
    for form in (
        frames(3),
        [frames(3)],
        [[frames(3)]],
        list(array),
        array,
        array[None],
        [array],
        paths,
        [paths],
        tmp_path,
    ):
        assert torch.equal(processor("<video>", videos=form, return_tensors="pt")["pixel_values_videos"], expected)
    two = processor(["<video>", "<video>"], videos=[tmp_path, str(tmp_path)], return_tensors="pt")
    assert torch.equal(two["pixel_values_videos"], expected.repeat(2, 1, 1, 1, 1))
    second = processor(["the", "<video>"], videos=[[], frames(3)], padding=True, return_tensors="pt")
    assert torch.equal(second["pixel_values_videos"], expected)


def test_videos_of_different_lengths(processor):
    batch = processor(["<video>", "<video>"], videos=[frames(1), frames(3, seed=5)], return_tensors="pt")
    assert (
        batch["video_frame_mask"].tolist() == [[1, 0, 0], [1, 1, 1]] and batch["video_frame_mask"].dtype == torch.int64
    )
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 16, 16)
    assert not batch["pixel_values_videos"][0, 1:].any()
    alone = processor("<video>", videos=frames(1), return_tensors="pt")
    assert torch.equal(batch["pixel_values_videos"][0, :1], alone["pixel_values_videos"][0])
    assert "video_frame_mask" not in alone


def test_long_sounds_take_several_chunks(processor):
    batch = processor(
        "<audio><speech>", audio=sound(AUDIO_CHUNK + 1), speech=sound(3 * SPEECH_CHUNK), sampling_rate=RATE
    )
    assert len(batch["input_values"]) == 2 and len(batch["input_features"]) == 3
    row = batch["input_ids"][0]
    assert row.count(processor.audio_token_id) == 2 * 3 and row.count(processor.speech_token_id) == 3 * 5


def test_forms_of_sounds(processor):
    expected = processor("<speech>", speech=sound(), sampling_rate=RATE)["input_features"]
    forms = [(sound(), RATE), [(sound(), RATE)], {"array": sound(), "sampling_rate": RATE}, [[(sound(), RATE)]]]
    for form in forms:
        assert np.array_equal(processor("<speech>", speech=form)["input_features"], expected)
    stereo = np.stack([sound(), sound()])
    assert np.allclose(
        processor("<speech>", speech=torch.from_numpy(stereo), sampling_rate=RATE)["input_features"], expected
    )


@pytest.mark.parametrize("tower", ["audio", "speech"])
def test_one_sound_tower_takes_both_kinds(tower):
    processor = tiny_processor((tower,))
    name = {"audio": "input_values", "speech": "input_features"}[tower]
    first, second = (sound(seed=1), RATE), (sound(seed=2), RATE)
    expected = processor(f"<{tower}><{tower}>", **{tower: [first, second]})
    mixed = [
        processor("<speech><audio>", audio=second, speech=first),
        processor("<audio><speech>", audio=first, speech=second),
        processor("<audio><audio>", speech=[first, second]),
        processor("<speech><audio>", audio=[first, second]),
    ]
    for batch in mixed:
        assert batch["input_ids"] == expected["input_ids"]
        assert np.array_equal(batch[name], expected[name])
    with pytest.raises(ValueError, match="speech=: the text has 2 <audio> or <speech>, but 3 items were"):
        processor("<audio><speech>", speech=[first, second, first])
    with pytest.raises(ValueError, match="audio=: the text has 0 <audio>, but 1 item was"):
        processor("<speech><speech>", audio=first, speech=second)


def test_media_without_a_text(processor):
    batch = processor(images=[image()], audio=(sound(), RATE), return_tensors="pt")
    assert set(batch) == {"pixel_values", "input_values", "input_values_mask"}


# Errors


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("<image>", {}, "images=: the text has 1 <image>, but 0 items were passed"),
        ("the", {"images": image()}, "images=: the text has 0 <image>, but 1 item was passed"),
        ("what does <image> do", {}, "'< image >'"),
        (["<image><image>", "<image>"], {"images": [image()]}, r"the 2 texts have \(2 \+ 1\) 3 <image>, but 1 item was"),
        (["<image>", "<image>"], {"images": [[], [image(), image()]]}, r"text\[0\] has 1 <image>, but 0 items"),
        (["<image>", "the"], {"images": [[image()]]}, "lists for 1 texts, but there are 2 texts"),
        ("<video>", {"videos": [frames(1), frames(1)]}, "videos=: the text has 1 <video>, but 2 items"),
        ("<audio>", {"speech": sound(), "sampling_rate": RATE}, "audio=: the text has 1 <audio>, but 0 items"),
        ("<speech>", {"speech": sound()}, "speech: an array of sound needs its sampling rate"),
        ("", {}, "text= is empty"),
        (["the", " "], {}, r"text\[1\] is empty"),
        ([], {}, "empty list"),
        ("<image>", {"images": 3}, "images: got int"),
        ("<image>", {"images": "/nowhere/x.png"}, "images.*/nowhere/x.png.*no such file"),
        (["<image>", "<image>"], {"images": [image(), "/nowhere/x.png"]}, r"images\[1\].*no such file"),
        (["the", "what is"], {"return_tensors": "pt"}, "pass padding=True"),
        ("the", {"padding": "both"}, "padding='both'"),
        ("the", {"padding_side": "top"}, "padding_side='top'"),
        ("the", {"return_tensors": "tf"}, "return_tensors='tf'"),
        ("the", {"padding": "max_length"}, "padding='max_length' needs max_length="),
        (None, {}, "nothing to prepare"),
    ],
)  # fmt: skip
def test_refused_values(processor, text, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(text, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [(3, {}, "a string or a list of strings, not int"), ("the", {"image": 3}, "unknown argument image; known are")],
)
def test_refused_types(processor, text, arguments, message):
    with pytest.raises(TypeError, match=message):
        processor(text, **arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("<video>", {}), ("the", {"videos": frames(1)}), ("<video>", {"videos": frames(1)})],
)
def test_absent_tower(text, arguments):
    with pytest.raises(ValueError, match="this model takes no video; it takes text, image, speech"):
        tiny_processor(("image", "speech"))(text, **arguments)


def test_errors_come_before_decoding(processor, monkeypatch):
    monkeypatch.setattr(processing_unimoe, "load_image", lambda *_: pytest.fail("decoded an image"))
    with pytest.raises(ValueError, match="no such file"):
        processor("<image><video>", images=image(), videos="/nowhere/x.mp4")
    with pytest.raises(ValueError, match="60 more than the 20 "):
        tiny_processor(max_length=20)("<image>" * 20, images=[image()] * 20, add_special_tokens=False)


def test_too_long(processor):
    limited = tiny_processor(max_length=20)
    with pytest.raises(ValueError, match=r"text\[1\] takes 21 tokens, 1 more than the 20 .*\(text: 1, image: 20\)"):
        limited(["the", "<image>" * 5], images=[image()] * 5)
    # How many chunks a sound has is only known when it is loaded.
    with pytest.raises(ValueError, match="speech: 25"):
        limited("<speech>", speech=sound(5 * SPEECH_CHUNK), sampling_rate=RATE)
    assert len(limited("<image>" * 4, images=[image()] * 4)["input_ids"][0]) == 17
    assert len(limited("the " * 30, truncation=True)["input_ids"][0]) == 20


def test_missing_parts():
    with pytest.raises(ValueError, match="num_image_tokens=4 needs the image_processor"):
        UniMoEProcessor(tokenizer=tiny_tokenizer(), num_image_tokens=4)
    with pytest.raises(ValueError, match="image_aspect_ratio='anyres'"):
        tiny_processor(image_aspect_ratio="anyres")
    with pytest.raises(TypeError, match="tokenizer"):
        UniMoEProcessor()


# Chats

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def user(*content):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in content],
    }


def assistant(text):
    return {"role": "assistant", "content": text}


def test_chat_template(processor):
    chat = [
        user({"type": "image"}, {"type": "audio"}, "What?"),
        assistant("A dog."),
        {"role": "user", "content": "Sure?"},
    ]
    rendered = f"{SYSTEM} USER: <image>\n<audio>\nWhat? ASSISTANT: A dog.</s>USER: Sure? "
    assert processor.apply_chat_template(chat) == rendered
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == rendered + "ASSISTANT:"
    assert processor.apply_chat_template([chat, chat]) == [rendered, rendered]
    own = [{"role": "system", "content": "Be brief."}, user("Look:", {"type": "video"})]
    assert processor.apply_chat_template(own) == "Be brief. USER: Look:<video>\n "
    open_end = processor.apply_chat_template([user("Hi"), assistant("Hello")], continue_final_message=True)
    assert open_end == f"{SYSTEM} USER: Hi ASSISTANT: Hello"


def test_chat_to_inputs(processor, tmp_path):
    file = tmp_path / "image.png"
    image().save(file)
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    expected = processor(f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", images=image(), return_tensors="pt")
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    blocks = [
        {"type": "image", "image": image()},
        {"type": "image", "path": str(file)},
        {"type": "image", "url": url},
        {"type": "image", "base64": url.split(",")[1]},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    for block in blocks:
        batch = processor.apply_chat_template([user(block, "What?")], **options)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    filled = processor.apply_chat_template(
        [user({"type": "image"}, "What?")], **options, processor_kwargs={"images": image()}
    )
    assert torch.equal(filled["pixel_values"], expected["pixel_values"])
    ids = processor.apply_chat_template([user(blocks[0], "What?")], **{**options, "return_dict": False})
    assert torch.equal(ids, expected["input_ids"])


def test_chats_with_every_kind(processor):
    chats = [
        [
            user(
                {"type": "video", "video": frames(2)},
                {"type": "speech", "speech": sound(), "sampling_rate": RATE},
                "What?",
            ),
            assistant("That."),
            user({"type": "audio", "audio": sound(), "sampling_rate": RATE}),
        ],
        [user("Hi", {"type": "video", "video": frames(3)})],
    ]
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert batch["pixel_values_videos"].shape[:2] == (2, 3)
    assert len(batch["input_values"]) == len(batch["input_features"]) == 1
    same_rate = [user({"type": "audio", "audio": sound()})]
    assert processor.apply_chat_template(same_rate, tokenize=True, processor_kwargs={"sampling_rate": RATE})
    assert processor.apply_chat_template(same_rate, tokenize=True, sampling_rate=RATE)


def test_assistant_tokens_mask(processor):
    chat = [user({"type": "image", "image": image()}, "what is"), assistant("the dog"), user("is"), assistant(" the ")]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", padding="max_length", max_length=250)
    batch = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0].bool()
    assert batch["assistant_masks"].shape == batch["input_ids"].shape == (1, 250)
    assert not mask[batch["attention_mask"][0] == 0].any()
    assert processor.decode(ids[mask]) == "the dog</s>  the </s>"
    assert mask[ids == processor.tokenizer.eos_token_id].all()


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([user("what is <image>")], r"conversation\[0\]\['content'\]\[0\]: the text holds the placeholder <image>"),
        ([user("Hi"), assistant("Use <audio>.")], r"conversation\[1\]: the text holds the placeholder <audio>"),
        ([[user("Hi")], [user({"type": "picture"})]], r"conversation\[1\]\[0\]\['content'\]\[0\]: type 'picture' is unknown"),
        ([user({"type": "image", "image": image(), "path": "x"})], "more than once"),
        ([user({"type": "image", "image": image()}, {"type": "image"})], "some image blocks give no item"),
        ([user({"type": "image"})], "images=: .* has 1 <image>, but 0 items"),
        ([user({"type": "image", "path": "nowhere.png"})], "no such file"),
        ([user({"type": "speech", "speech": sound()})], "needs its sampling rate"),
        ([{"role": "user"}], "a message is a dict with a 'role' and a 'content'"),
        ([], "the conversation is empty"),
        ([[]], "at least one message"),
        ([user({"text": "Hi"})], "a block is a dict with a 'type'"),
        ([user({"type": "text"})], "needs a string under 'text'"),
        ([{"role": "user", "content": 3}], "a string or a list of blocks, not int"),
    ],
)  # fmt: skip
def test_refused_chats(processor, chat, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat, tokenize=True)


def test_refused_chat_options(processor):
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template([user("Hi")], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="use one of the two ways"):
        chat = [user({"type": "image", "image": image()})]
        processor.apply_chat_template(chat, tokenize=True, processor_kwargs={"images": [image()]})
    with pytest.raises(Exception, match="role 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(TypeError, match="a conversation is a list of messages"):
        processor.apply_chat_template("Hi")


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


def test_other_backends_are_exchanged(monkeypatch):
    class CLIPImageProcessor:
        def to_dict(self):
            return {**CLIPImageProcessorPil(crop_size={"height": 8, "width": 8}).to_dict()}

    processor = UniMoEProcessor(CLIPImageProcessor(), tiny_tokenizer(), num_image_tokens=4)
    assert type(processor.image_processor) is CLIPImageProcessorPil
    assert processor.image_processor.crop_size["height"] == 8

    class HomemadeImageProcessor(CLIPImageProcessor):
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
