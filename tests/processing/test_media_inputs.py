"""Every form in which media may be handed over, and every way in which they may be wrong."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processor import AUDIO_CHUNK, RATE, SPEECH_CHUNK, frames, image, media, sound, tiny_processor, tiny_tokenizer

from unimoe.processing import processing_unimoe
from unimoe.processing.processing_unimoe import UniMoEProcessor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


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


@pytest.mark.parametrize("rate", [np.int64(RATE), np.int32(RATE), float(RATE), np.float32(RATE)])
def test_rate_of_a_pair_may_be_of_any_numeric_type(processor, rate):
    expected = processor("<speech>", speech=(sound(), RATE))["input_features"]
    for form in ((sound(), rate), [(sound(), rate)], [[(sound(), rate)]]):
        assert np.array_equal(processor("<speech>", speech=form)["input_features"], expected)


def animation(path, count, size=(24, 20)):
    images = [Image.new("RGB", size, (10 * i, 0, 0)) for i in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    return path


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_animations_in_a_list_are_videos(processor, tmp_path, suffix):
    path = animation(tmp_path / f"a.{suffix}", 5)
    uri = f"data:image/{suffix};base64,{base64.b64encode(path.read_bytes()).decode()}"
    expected = processor("<video>", videos=path)["pixel_values_videos"]
    assert expected.shape[1] == 5
    for item in (path, str(path), uri):
        for form in ([item], [[item]]):
            assert np.array_equal(processor("<video>", videos=form)["pixel_values_videos"], expected)
        two = processor("<video><video>", videos=[item, item])["pixel_values_videos"]
        assert np.array_equal(two, np.concatenate([expected, expected]))


def test_still_webps_in_a_list_are_frames(processor, tmp_path):
    paths, exif = [], Image.Exif()
    exif[0x0112] = 1
    for i, frame in enumerate(frames(3)):
        paths.append(tmp_path / f"{i}.webp")
        # With EXIF or alpha a still picture too is an extended file.
        frame.convert("RGBA" if i else "RGB").save(paths[-1], lossless=True, exif=exif)
    expected = processor("<video>", videos=frames(3))["pixel_values_videos"]
    uris = [f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths]
    for form in (paths, list(map(str, paths)), [paths], uris):
        assert np.array_equal(processor("<video>", videos=form)["pixel_values_videos"], expected)
    with pytest.raises(ValueError, match=r"videos\[1\].*gone.webp'\): no such file"):
        processor("<video>", videos=[str(paths[0]), "gone.webp"])


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
        ("<image>", {"images": Image.new("RGB", (0, 5))}, r"images: the image has no pixels \(0 x 5\)"),
        ("<image>", {"images": Image.new("RGB", (5, 0))}, r"images: the image has no pixels \(5 x 0\)"),
        ("<image>", {"images": Image.new("L", (0, 0))}, r"images: the image has no pixels \(0 x 0\)"),
        ("<video>", {"videos": [image(), Image.new("RGB", (0, 5))]}, r"videos\[1\]: the image has no pixels \(0 x 5\)"),
        ("<speech>", {"speech": ("x.wav", RATE)}, "got str, but a sound with its sampling rate must be an array"),
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
