"""Chats: the rendered prompt, media inside messages, masks of the answers, malformed messages."""

import base64

import numpy as np
import pytest
import soundfile
import torch
from tiny_processor import RATE, frames, image, sound, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


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
        ([user({"type": "image", "image": image()}, {"type": "image"})], r"\['content'\]\[1\]: this image block gives no item; add"),
        ([user("Hi", {"type": "image"})], r"\['content'\]\[1\]: .* no item; add it under 'image', 'path', 'url' or 'base64'"),
        ([[user("Hi")], [user({"type": "image", "bytes": b"x"})]], r"conversation\[1\]\[0\].* no item, only 'bytes'; add"),
        ([user({"type": "speech", "audio": sound(), "sampling_rate": RATE})], "no item, only 'audio'; add it under 'speech'"),
        ([user({"type": "audio", "array": sound(), "sampling_rate": RATE})], "no item, only 'array'; add it under 'audio'"),
        ([user({"type": "image_url", "image_url": {}})], "no item; add it under 'image_url'"),
        ([user({"type": "image", "path": ""})], r"images\[0\]\[0\] \(''\): no such file"),
        ([user({"type": "video", "path": ""})], r"videos\[0\]\[0\] \(''\): no such file"),
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


def test_items_passed_beside_a_chat(processor):
    chat = [user({"type": "image", "id": 7}, {"type": "audio"}, "What?")]
    options = dict(tokenize=True, return_dict=True, sampling_rate=RATE)
    inputs = processor.apply_chat_template(chat, images=[image()], audio=sound(), **options)
    assert len(inputs["pixel_values"]) == len(inputs["input_values"]) == 1
    with pytest.raises(ValueError, match=r"\[1\]: this audio block gives no item"):
        processor.apply_chat_template(chat, images=[image()], audio=[], **options)
    # A model with one sound tower takes the sounds of both arguments for the blocks of both types.
    hears = tiny_processor(("image", "speech"))
    inputs = hears.apply_chat_template(chat, images=[image()], speech=sound(), **options)
    assert len(inputs["input_features"]) == 1


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_sampling_rate_of_a_file_is_its_own(processor, tmp_path, kind):
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(), 8000, subtype="FLOAT")
    content = path.read_bytes()
    options = dict(tokenize=True, return_dict=True)
    name = {"audio": "input_values", "speech": "input_features"}[kind]
    expected = processor.apply_chat_template([user({"type": kind, "path": str(path)})], **options)[name]
    text = base64.b64encode(content).decode()
    for given in ({"path": str(path)}, {kind: str(path)}, {kind: path}, {kind: content}, {"base64": text},
                  {"url": path.as_uri()}, {kind: (sound(), 8000)}):  # fmt: skip
        chat = [user({"type": kind, **given, "sampling_rate": RATE})]
        assert np.array_equal(processor.apply_chat_template(chat, **options)[name], expected), given


def test_refused_chat_options(processor):
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template([user("Hi")], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="use one of the two ways"):
        chat = [user({"type": "image", "image": image()})]
        processor.apply_chat_template(chat, tokenize=True, processor_kwargs={"images": [image()]})
    with pytest.raises(TypeError, match="unknown argument max_new_token: neither"):
        processor.apply_chat_template([user("Hi")], max_new_token=3)
    assert processor.apply_chat_template([user("Hi")], chat_template="{{ mood }}", mood="glad") == "glad"
    with pytest.raises(Exception, match="role 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(TypeError, match="a conversation is a list of messages"):
        processor.apply_chat_template("Hi")
