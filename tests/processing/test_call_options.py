"""`CallOptions`, and the options that `UniMoEProcessor` takes in the manner of Transformers' processors."""

import re

import av
import numpy as np
import pytest
from tiny_processor import image, tiny_processor

from unimoe.processing.call_options import CallOptions
from unimoe.processing.media import load_video


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def test_groups_and_none():
    options = CallOptions.read(
        {
            "common_kwargs": {"return_tensors": "np"},
            "text_kwargs": {"padding": True},
            "videos_kwargs": None,
            "num_frames": 3,
            "fps": None,
        },
        {},
    )
    assert (options.return_tensors, options.padding_mode, options.num_frames) == ("np", "longest", 3)


def test_common_group_gives_way():
    options = CallOptions.read({"common_kwargs": {"return_tensors": "np"}, "return_tensors": "pt"}, {})
    assert options.return_tensors == "pt"


def test_given_twice():
    with pytest.raises(ValueError, match="padding= is given twice"):
        CallOptions.read({"text_kwargs": {"padding": True}, "padding": True}, {})


def test_unknown():
    with pytest.raises(TypeError, match="unknown argument image_options; known are "):
        CallOptions.read({"image_options": {}}, {})


def test_tokenizer_options_are_defaults():
    tokenizer_options = {"padding": "max_length", "max_length": 9, "model_max_length": 5}
    options = CallOptions.read({"max_length": 12}, tokenizer_options)
    assert (options.padding_mode, options.max_length) == ("max_length", 12)


def test_image_options(processor):
    whole = processor("<image>", images=image())["pixel_values"]
    raw = processor("<image>", images=image(), do_rescale=False, do_normalize=False)["pixel_values"]
    mean = np.reshape(processor.image_processor.image_mean, (3, 1, 1))
    std = np.reshape(processor.image_processor.image_std, (3, 1, 1))
    np.testing.assert_allclose((raw / 255 - mean) / std, whole, atol=1e-5)
    video = processor("<video>", videos=[image()], images_kwargs={"do_rescale": False, "do_normalize": False})
    np.testing.assert_array_equal(video["pixel_values_videos"][:, 0], raw)


@pytest.mark.parametrize("num_frames", [0, -1, 2.5, float("inf"), float("nan"), "3", True])
def test_impossible_numbers_of_frames(processor, num_frames):
    with pytest.raises(ValueError, match="num_frames=.*: use a whole number of at least 1"):
        processor("<video>", videos=[image()], num_frames=num_frames)


@pytest.mark.parametrize("option", ["max_length", "pad_to_multiple_of"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3"])
def test_impossible_lengths(processor, option, value):
    with pytest.raises(ValueError, match=f"{option}=.*: use a whole number of at least 1"):
        processor("what is", padding="longest", **{option: value})


@pytest.mark.parametrize(
    "truncation, cut",
    [(True, True), ("longest_first", True), ("only_first", True), (False, False), ("do_not_truncate", False)],
)
def test_truncation_by_its_names(processor, truncation, cut):
    whole = processor("what is the")["input_ids"][0]
    ids = processor("what is the", truncation=truncation, max_length=3)["input_ids"][0]
    assert ids == (whole[:3] if cut else whole)


def test_an_unknown_truncation(processor):
    with pytest.raises(ValueError, match="truncation='end': use True, False, 'longest_first'"):
        processor("what is", truncation="end")


@pytest.mark.parametrize("option", ["padding", "truncation"])
@pytest.mark.parametrize("value", [["longest"], {}, 2, "long"])
def test_settings_of_another_kind(processor, option, value):
    with pytest.raises(ValueError, match=f"{option}={re.escape(repr(value))}: use True, False, "):
        processor("what is", **{option: value})


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 32
        for index in range(12):
            picture = np.full((32, 32, 3), 20 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("num_frames", [3, np.int64(3), np.uint8(3), 3.0])
def test_number_of_frames(processor, video, num_frames):
    assert processor("<video>", videos=video, num_frames=num_frames)["pixel_values_videos"].shape[1] == 3
    assert len(load_video(video, num_frames)) == 3


def test_every_frame_of_a_video(processor, video):
    lengths = {
        "as configured": processor("<video>", videos=video),
        "all": processor("<video>", videos=video, do_sample_frames=False),
    }
    assert [inputs["pixel_values_videos"].shape[1] for inputs in lengths.values()] == [8, 12]
