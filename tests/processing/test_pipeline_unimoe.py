"""`AnyToTextPipeline` with a random model: forms of input, forms of output, batches, options."""

import pytest
import torch
from PIL import Image
from tiny_processor import RATE, frames, image, sound, tiny_config_for, tiny_processor
from transformers import TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from unimoe import UniMoEForConditionalGeneration
from unimoe.processing.pipeline_batches import join_requests
from unimoe.processing.pipeline_unimoe import AnyToTextPipeline

NEW = 6


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def pipe(processor):
    torch.manual_seed(0)
    model = UniMoEForConditionalGeneration(tiny_config_for(processor)).eval()
    # Weights this large make every answer depend on all of its prompt.
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data *= 10
    # Random weights would often end an answer at once, or answer with bytes that are no text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [
        *range(259),
        *range(len(processor.tokenizer) - 4, len(processor.tokenizer)),
    ]
    return pipeline("any-to-text", model=model, processor=processor, device="cpu", max_new_tokens=NEW)


def chat(*content, answer=None):
    blocks = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    messages = [{"role": "user", "content": blocks}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


CHATS = [
    chat({"type": "image", "image": image(1)}, "what is the"),
    chat("is the USER"),
    chat({"type": "video", "video": frames(3)}, {"type": "speech", "speech": sound(), "sampling_rate": RATE}, "what"),
    chat({"type": "video", "video": frames(1, seed=7)}, {"type": "image", "image": image(2)}, "is it"),
    chat({"type": "audio", "audio": sound(20000), "sampling_rate": RATE}, "the"),
]


@torch.no_grad()
def expected_ids(pipe, messages):
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return pipe.model.generate(**inputs, max_new_tokens=NEW)[0]


def test_chat(pipe):
    messages = CHATS[0]
    output = pipe(messages)
    assert len(output) == 1 and set(output[0]) == {"input_text", "generated_text"}
    assert output[0]["input_text"] == messages
    assert output[0]["generated_text"][:-1] == messages
    answer = output[0]["generated_text"][-1]
    ids = expected_ids(pipe, messages)
    assert answer == {"role": "assistant", "content": pipe.processor.decode(ids[-NEW:], skip_special_tokens=True)}
    assert answer["content"]
    assert pipe(messages, return_full_text=False)[0]["generated_text"] == answer["content"]
    assert torch.equal(pipe(messages, return_tensors=True)[0]["generated_token_ids"], ids)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_chats_in_batches_give_what_each_gives_alone(pipe, batch_size):
    alone = [pipe(messages, return_full_text=False) for messages in CHATS]
    assert pipe(CHATS, return_full_text=False, batch_size=batch_size) == alone
    assert len({output[0]["generated_text"] for output in alone}) >= 3


def test_requests_join_to_what_the_processor_makes_of_them_together(pipe):
    joined = pipe._collate([pipe.preprocess(pipe_input) for pipe_input in CHATS])["features"]
    options = dict(padding=True, padding_side="left", return_mm_token_type_ids=False)
    together = pipe.processor.apply_chat_template(
        CHATS, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )
    assert set(joined) == set(together)
    assert all(torch.equal(joined[name], together[name]) for name in together)


def test_prompt_with_media(pipe):
    text = "USER: <image>\n<speech> what ASSISTANT:"
    output = pipe(text=text, images=image(), speech=sound(), sampling_rate=RATE)
    assert len(output) == 1 and output[0]["input_text"] == text
    assert output[0]["generated_text"].startswith(text) and output[0]["generated_text"] != text
    new = pipe(text=text, images=image(), speech=(sound(), RATE), return_full_text=False)
    assert text + new[0]["generated_text"] == output[0]["generated_text"]
    request = {"text": text, "images": image(), "speech": sound(), "sampling_rate": RATE}
    assert pipe(request) == output
    assert pipe({"text": text, "image": image(), "speech": (sound(), RATE)}) == output
    assert pipe([request, request], batch_size=2) == [output, output]


def test_prompt_without_media(pipe):
    output = pipe("what is the")
    assert output[0]["generated_text"].startswith("what is the")
    assert pipe(text=["what is the", "USER"], batch_size=2) == [output, pipe("USER")]


def test_prompts_with_media(pipe):
    texts = ["<image> what", "the <image><image>", "is"]
    images = [[image(0)], [image(1), image(2)], []]
    together = pipe(text=texts, images=images)
    alone = [pipe(text=text, images=items or None)[0] for text, items in zip(texts, images)]
    assert together == alone
    assert pipe(text=texts, images=[image(0), image(1), image(2)], batch_size=2) == alone
    videos = [[frames(2), frames(1)], [frames(3, seed=5)]]
    sounds = [(sound(seed=1), RATE), (sound(seed=2), RATE)]
    together = pipe(text=["<video><video> the <audio>", "<audio> is <video>"], videos=videos, audio=sounds)
    alone = pipe(text="<audio> is <video>", videos=videos[1], audio=[sounds[1]])
    assert together[1:] == alone


REQUESTS_OF_SEVERAL_TEXTS = [
    {"text": ["<image> what is", "the <image>"], "images": [image(0), image(1)]},
    {"text": "<speech> is it", "speech": (sound(), RATE)},
    ["the", "is the USER", "what"],
    {"text": ["<video> is", "it <video><audio>"], "videos": [frames(3), frames(1)], "audio": (sound(), RATE)},
    "USER what",
]


def test_videos_are_joined_where_they_are():
    """On an accelerator that is PyTorch's default device (for which "meta" stands here), too."""
    requests = [
        {"features": {"pixel_values_videos": torch.ones(1, length, 3, 2, 2)}, "prompts": [[]]} for length in (1, 3)
    ]
    with torch.device("meta"):
        features = join_requests(requests, 0)["features"]
    assert features["video_frame_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_requests_of_several_texts_keep_their_answers_in_batches(pipe, batch_size):
    alone = [pipe(request, return_full_text=False) for request in REQUESTS_OF_SEVERAL_TEXTS[:2]]
    alone.append([pipe(text, return_full_text=False)[0] for text in REQUESTS_OF_SEVERAL_TEXTS[2]])
    alone += [pipe(request, return_full_text=False) for request in REQUESTS_OF_SEVERAL_TEXTS[3:]]
    assert [len(records) for records in alone] == [2, 1, 3, 2, 1]
    assert pipe(REQUESTS_OF_SEVERAL_TEXTS, batch_size=batch_size, return_full_text=False) == alone
    streamed = pipe((request for request in REQUESTS_OF_SEVERAL_TEXTS), batch_size=batch_size, return_full_text=False)
    assert list(streamed) == alone


def test_requests_of_several_texts_with_several_answers_each(pipe):
    options = dict(num_beams=3, num_return_sequences=2, return_full_text=False)
    requests = REQUESTS_OF_SEVERAL_TEXTS[:3]
    alone = pipe(requests, **options)
    assert [len(records) for records in alone] == [4, 2, 6]
    texts = requests[0]["text"]
    assert [record["input_text"] for record in alone[0]] == [texts[0], texts[0], texts[1], texts[1]]
    assert pipe(requests, batch_size=3, **options) == alone


def test_tuples_of_prompts_are_as_lists(pipe):
    listed = pipe([["the", "is"], ["what"]])
    assert pipe([("the", "is"), ("what",)]) == listed
    assert pipe((["the", "is"], ["what"]), batch_size=2) == listed
    assert pipe(("the", "is")) == pipe(["the", "is"])


def test_datasets_and_generators(pipe):
    expected = [pipe(messages) for messages in CHATS[:3]]
    assert list(pipe(messages for messages in CHATS[:3])) == expected
    rows = [{"chat": messages} for messages in CHATS[:3]]
    assert list(pipe(KeyDataset(rows, "chat"), batch_size=2)) == expected
    requests = ({"text": f"<image> {word}", "images": image()} for word in ("the", "is"))
    assert len(list(pipe(requests, batch_size=2))) == 2


def test_several_answers(pipe):
    options = dict(num_beams=3, num_return_sequences=2, return_full_text=False)
    output = pipe(CHATS[3], generate_kwargs={"num_beams": 3, "num_return_sequences": 2}, return_full_text=False)
    assert len(output) == 2 and output[0]["input_text"] == output[1]["input_text"] == CHATS[3]
    assert pipe(CHATS[3], **options) == output
    assert pipe([CHATS[3], CHATS[0]], batch_size=2, **options) == [output, pipe(CHATS[0], **options)]


def test_continued_answer(pipe):
    messages = chat("what is", answer="the dog")
    continued = pipe(messages)[0]["generated_text"]
    assert continued[:-1] == messages[:-1] and continued[-1]["role"] == "assistant"
    assert continued[-1]["content"].startswith("the dog") and len(continued[-1]["content"]) > len("the dog")
    blocks = chat("what is", answer=[{"type": "text", "text": "the dog"}])
    assert pipe(blocks)[0]["generated_text"][-1]["content"] == [{"type": "text", "text": continued[-1]["content"]}]
    assert "the dog" + pipe(messages, return_full_text=False)[0]["generated_text"] == continued[-1]["content"]
    new_turn = pipe(messages, continue_final_message=False)[0]["generated_text"]
    assert len(new_turn) == 3 and new_turn[:2] == messages
    assert messages[-1]["content"] == "the dog"


def test_generation_prompt(pipe):
    messages = CHATS[0]
    assert pipe(messages, add_generation_prompt=True) == pipe(messages)
    inputs = pipe.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    ids = pipe.model.generate(**inputs, max_new_tokens=NEW)[0]
    without = pipe(messages, add_generation_prompt=False, return_tensors=True)[0]["generated_token_ids"]
    assert torch.equal(without, ids) and len(ids) < len(expected_ids(pipe, messages))

    answered = chat("what is", answer="the dog")
    assert pipe(answered, add_generation_prompt=False) == pipe(answered), "goes on with the answer"
    assert pipe(answered, add_generation_prompt=True) == pipe(answered, continue_final_message=False)
    with pytest.raises(ValueError, match="exclude each other"):
        pipe(answered, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("text", [CHATS[1], "is the USER"])
def test_options_that_the_pipeline_sets_itself(pipe, text):
    expected = pipe(text)
    assert pipe(text, tokenize=True, return_dict=True, return_assistant_tokens_mask=False) == expected
    assert pipe(text, processor_kwargs={"return_tensors": "pt"}, return_tensors=False) == expected
    ids = pipe(text, return_tensors=True)[0]["generated_token_ids"]
    assert torch.equal(pipe(text, return_tensors="pt")[0]["generated_token_ids"], ids)
    refused = [
        {"tokenize": False},
        {"return_dict": False},
        {"return_assistant_tokens_mask": True},
        {"return_tensors": "np"},
        {"processor_kwargs": {"return_tensors": "np"}},
    ]
    for options in refused:
        (name,) = options.get("processor_kwargs", options)
        with pytest.raises(ValueError, match=f"{name}=.*(leave it out|use True)"):
            pipe(text, **options)


def test_streamer(pipe):
    for how in ("direct", "generate_kwargs"):
        streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"streamer": streamer} if how == "direct" else {"generate_kwargs": {"streamer": streamer}}
        answer = pipe(CHATS[0], return_full_text=False, **options)[0]["generated_text"]
        assert "".join(streamer) == answer


def test_generation_options(pipe):
    whole = pipe(CHATS[0], return_full_text=False)[0]["generated_text"]
    assert len(pipe(CHATS[0], max_new_tokens=2, return_tensors=True)[0]["generated_token_ids"]) + NEW - 2 == len(
        pipe(CHATS[0], return_tensors=True)[0]["generated_token_ids"]
    )
    stopped = pipe(CHATS[0], return_full_text=False, stop_sequence=whole[1:3])[0]["generated_text"]
    assert whole.startswith(stopped) and len(stopped) < len(whole)
    shown = pipe("the", skip_special_tokens=False)[0]["generated_text"]
    assert shown.startswith("the")
    assert AnyToTextPipeline(pipe.model, processor=pipe.processor)._generation_defaults["max_new_tokens"] == 256


def test_processor_options(pipe):
    video = chat({"type": "video", "video": frames(2)}, {"type": "audio", "audio": sound()}, "the")
    with pytest.raises(ValueError, match="needs its sampling rate"):
        pipe(video)
    assert pipe(video, processor_kwargs={"sampling_rate": RATE}) == pipe(video, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "text= is missing"),
        ({"text": CHATS[1], "images": image()}, "images= go with a prompt"),
        ({"text": "the", "add_generation_prompt": True}, "add_generation_prompt= goes with a chat"),
        ({"text": {"text": "the", "picture": image()}}, "unknown key 'picture'"),
        ({"text": "the", "max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}, "max_new_tokens: given both"),
        ({"text": "the", "return_full_text": True, "return_tensors": True}, "exclude each other"),
        (
            {"text": ["<image>", "the"], "images": [image(), image()]},
            r"images=: the 2 texts have \(1 \+ 0\) 1 <image>",
        ),
        ({"text": ["<image>", "<image>"], "images": [image(), "/nowhere.png"]}, r"images\[1\].*no such file"),
        ({"text": "<image>"}, "images=: the text has 1 <image>, but 0 items"),
        ({"text": chat("the", {"type": "image"})}, "this image block gives no item; add it under 'image', 'path'"),
    ],
)
def test_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_from_a_folder(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    image().save(tmp_path / "image.png")
    loaded = pipeline("any-to-text", model=str(tmp_path), device="cpu", max_new_tokens=NEW)
    assert type(loaded) is AnyToTextPipeline
    messages = chat({"type": "image", "path": str(tmp_path / "image.png")}, "what is")
    same = chat({"type": "image", "image": Image.open(tmp_path / "image.png")}, "what is")
    assert (
        loaded(messages, return_full_text=False)[0]["generated_text"]
        == (pipe(same, return_full_text=False)[0]["generated_text"])
    )
