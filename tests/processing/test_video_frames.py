"""Frames found by seeking, against those that decoding everything gives."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from unimoe.processing.video_frames import read_frames

COUNT = 90


def write_video(
    path, codec, format, b_frames=0, gop=12, flat=False, rate=30, options=None, pix_fmt="yuv420p", sound=False
):
    """`flat`: pictures so small that one packet of a program stream holds many."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = (
            96,
            64,
            pix_fmt,
            gop,
            b_frames,
        )
        stream.bit_rate = 100_000 if flat else 4_000_000
        audio = container.add_stream("mp2", rate=48000, layout="mono") if sound else None
        for index in range(COUNT):
            pixels = np.full((64, 96, 3), 37 * index % 200) if flat else random.integers(0, 256, (64, 96, 3))
            pixels = pixels.astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if audio is not None:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
                samples.sample_rate, samples.pts = 48000, 1600 * index
                container.mux(audio.encode(samples))
        container.mux(stream.encode())
    return path


def check_frames(frames, path, expected):
    """Are these a file's frames of the expected numbers, by decoding all of it?"""
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(expected)
    same = [[i for i, other in enumerate(every) if np.array_equal(frame, other)] for frame in frames]
    assert all(number in found for number, found in zip(expected, same)), f"{expected} expected, got {same}"


TRANSPORT_AND_PROGRAM_STREAMS = [
    ("h264", "ts", {"codec": "libx264", "format": "mpegts"}),
    ("mpeg2", "ts", {"codec": "mpeg2video", "format": "mpegts"}),
    ("mpeg4", "ts", {"codec": "mpeg4", "format": "mpegts"}),
    ("h264", "mpg", {"codec": "libx264", "format": "mpeg"}),
    ("mpeg2", "mpg", {"codec": "mpeg2video", "format": "mpeg"}),
    ("mpeg1", "mpg", {"codec": "mpeg1video", "format": "mpeg"}),
    ("mpeg2", "vob", {"codec": "mpeg2video", "format": "vob"}),
]
OTHERS = [
    ("h264", "mp4", {"codec": "libx264", "format": "mp4"}),
    ("mpeg4", "mov", {"codec": "mpeg4", "format": "mov"}),
    ("h264", "mkv", {"codec": "libx264", "format": "matroska"}),
    ("mpeg2", "mkv", {"codec": "mpeg2video", "format": "matroska"}),
    ("mpeg4", "avi", {"codec": "mpeg4", "format": "avi"}),
    ("h264", "flv", {"codec": "libx264", "format": "flv"}),
    ("mpeg4", "asf", {"codec": "mpeg4", "format": "asf"}),
    ("mpeg4", "nut", {"codec": "mpeg4", "format": "nut"}),
]


@pytest.mark.parametrize("flat", [False, True], ids=["textured", "flat"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("codec,suffix,options", TRANSPORT_AND_PROGRAM_STREAMS + OTHERS)
def test_same_frames_as_by_decoding_everything(tmp_path, codec, suffix, options, b_frames, flat):
    path = write_video(tmp_path / f"v.{suffix}", b_frames=b_frames, flat=flat, **options)
    frames, _ = read_frames(path, 8, "video")
    check_frames(frames, path, [i * (COUNT // 8) for i in range(8)])
    check_frames(read_frames(path.read_bytes(), 8, "video")[0], path, [i * (COUNT // 8) for i in range(8)])


@pytest.mark.parametrize("codec,suffix,options", [
    ("vp8", "webm", {"codec": "libvpx", "format": "webm"}), ("vp9", "webm", {"codec": "libvpx-vp9", "format": "webm"}),
    ("gif", "gif", {"codec": "gif", "format": "gif", "pix_fmt": "rgb8", "rate": 20}),
])  # fmt: skip
def test_same_frames_without_b_frames(tmp_path, codec, suffix, options):
    path = write_video(tmp_path / f"v.{suffix}", **options)
    check_frames(read_frames(path, 8, "video")[0], path, [i * (COUNT // 8) for i in range(8)])


@pytest.mark.parametrize("codec,suffix,options", TRANSPORT_AND_PROGRAM_STREAMS)
def test_every_frame_of_a_stream(tmp_path, codec, suffix, options):
    path = write_video(tmp_path / f"v.{suffix}", b_frames=2, flat=True, **options)
    assert len(read_frames(path, sys.maxsize, "video")[0]) == COUNT


def test_number_of_frames_of_a_stream_is_the_originals(tmp_path):
    # 3.003 s are printed as 3.00 s: 89 frames at 29.97 a second, so with 9 frames the step is 9, not 10.
    for name, format in (("v.ts", "mpegts"), ("v.mpg", "mpeg")):
        path = write_video(tmp_path / name, "mpeg2video", format, rate=Fraction(30000, 1001))
        check_frames(read_frames(path, 9, "video")[0], path, [i * 9 for i in range(9)])


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_transport_stream_is_read_by_seeking(tmp_path, codec, b_frames):
    path = write_video(tmp_path / "v.ts", codec, "mpegts", b_frames, gop=4, sound=True)
    frames, num_decoded = read_frames(path, 4, "video")
    check_frames(frames, path, [i * (COUNT // 4) for i in range(4)])
    assert num_decoded <= 4 * (4 + 3)


def packets_between_key_frames(path, b_frames):
    """A recording that begins in the middle of a group of pictures."""
    source = path.with_name("whole.mp4")
    write_video(source, "libx264", "mp4", b_frames, options={"x264-params": "scenecut=0"})
    with av.open(str(source)) as whole, av.open(str(path), "w", format="mpegts") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for index, packet in enumerate(whole.demux(video=0)):
            if packet.dts is not None and index > 5:
                packet.stream = stream
                cut.mux(packet)
    return path


@pytest.mark.parametrize("b_frames", [0, 2])
def test_recording_that_begins_between_key_frames(tmp_path, b_frames):
    path = packets_between_key_frames(tmp_path / "v.ts", b_frames)
    frames, num_decoded = read_frames(path, 4, "video")
    # 84 packets, the first six of which come before a key frame, are 2.8 s.
    check_frames(frames, path, [0, 21, 42, 63])
    assert num_decoded < 4 * 15
    assert len(read_frames(path, sys.maxsize, "video")[0]) == COUNT - 12


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_pictures_renewed_bit_by_bit(tmp_path, suffix):
    options = {"x264-params": "intra-refresh=1:keyint=24:scenecut=0"}
    path = write_video(tmp_path / f"v.{suffix}", "libx264", None, options=options)
    check_frames(read_frames(path, 8, "video")[0], path, [i * (COUNT // 8) for i in range(8)])
