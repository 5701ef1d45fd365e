import base64
import http.server
import io
import math
import os
import struct
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unimoe.processing.media import MediaError, check_media, load_audio, load_image, load_video
from unimoe.processing.video_frames import read_frames


@pytest.fixture(scope="module")
def picture():
    """40 x 24 with a white corner at the top left, so that every turn shows."""
    pixels = np.random.default_rng(0).integers(0, 200, (24, 40, 3), dtype=np.uint8)
    pixels[:6, :8] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def tone():
    return (np.sin(np.arange(44100) * 2 * math.pi * 440 / 44100) * 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory, picture):
    folder = tmp_path_factory.mktemp("served")
    picture.save(folder / "picture.png")
    (folder / "empty.png").write_bytes(b"")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_video(
    path, count, codec="libx264", rate=30, size=(64, 48), gop=12, pix_fmt="yuv420p", format=None, b_frames=0
):
    """Frame i is of the even grey 2 i."""
    with av.open(path, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        stream.max_b_frames = b_frames
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), 2 * index % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound_track(path, sound, rate, layout="mono", codec="aac", format=None):
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
        frame = av.AudioFrame.from_ndarray(np.tile(sound, (channels, 1)), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(frames):
    return [float(np.asarray(frame).mean()) / 2 for frame in frames]


class Pipe:
    """A file that cannot be sought: the muxer leaves durations and indices out."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, data):
        return self.file.write(data)


# Images


def test_clip_pixels_match_golden(golden):
    folder = golden("unimoe_audio")
    tensors = load_file(folder / "cases.safetensors")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "checkpoint" / "clip-vit-large-patch14-336")
    for stem in ("img_83x57", "img_40x131", "img_gray_64x64", "img_201x155"):
        pixels = processor(load_image(folder / "assets" / f"{stem}.png"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, tensors[f"component_clip_preprocess.{stem}"].clone()), stem


def test_video_folder_matches_golden(golden):
    folder = golden("unimoe_speech")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "checkpoint" / "clip-vit-large-patch14-336")
    frames = load_video(folder / "inputs" / "frames")
    expected = load_file(folder / "cases_e2.safetensors")["video.video_pixel_values"].clone()[0]
    pixels = processor(frames, return_tensors="pt")["pixel_values"]
    assert pixels.shape == expected.shape
    # The original takes the files in the order of the file system.
    assert all(any(torch.equal(frame, other) for other in pixels) for frame in expected)


def test_image_from_every_source(tmp_path, server, picture):
    content = encoded(picture, "PNG")
    (tmp_path / "a picture.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    array = np.asarray(picture)
    items = [
        tmp_path / "a picture.png", str(tmp_path / "a picture.png"), (tmp_path / "a picture.png").as_uri(),
        f"{server}/picture.png", content, bytearray(content), memoryview(content), text,
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)), f"data:image/png;base64,{text}", picture,
        array, array.transpose(2, 0, 1), array / 255, (array / 255).astype(np.float16), array.astype(np.int64),
        array.astype(np.uint16) * 257, torch.tensor(array), torch.tensor(array).permute(2, 0, 1),
        torch.tensor(array).permute(2, 0, 1) / 255, np.dstack([array, array[..., :1]]),
    ]  # fmt: skip
    for item in items:
        check_media(item, "image", "image")
        image = load_image(item)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), array), type(item)
    half = load_image((torch.tensor(array).permute(2, 0, 1) / 255).bfloat16())
    assert np.abs(np.asarray(half).astype(int) - array).max() <= 1


@pytest.mark.parametrize("format,options,modes", [
    ("PNG", {}, "RGB L P 1 LA RGBA"), ("JPEG", {}, "RGB L 1 CMYK"), ("JPEG", {"progressive": True}, "RGB L 1 CMYK"),
    ("WEBP", {}, "RGB L P 1 LA RGBA CMYK"), ("WEBP", {"lossless": True}, "RGB L P 1 LA RGBA CMYK"),
    ("GIF", {}, "RGB L P 1 LA RGBA"), ("BMP", {}, "RGB L P 1 RGBA"), ("TIFF", {}, "RGB L P 1 LA RGBA CMYK"),
])  # fmt: skip
def test_formats_and_modes_are_pillows_own_rgb(picture, format, options, modes):
    for mode in modes.split():
        image = picture.convert("RGBA").convert(mode) if mode == "LA" else picture.convert(mode)
        content = encoded(image, format, **options)
        expected = Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(np.asarray(load_image(content)), np.asarray(expected)), mode


def test_palette_with_transparency_gives_no_warning(picture):
    content = encoded(picture.convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(content)
    assert np.array_equal(np.asarray(image), np.asarray(picture.convert("P").convert("RGB")))


def test_alpha_is_dropped_not_blended(picture):
    transparent = picture.copy()
    transparent.putalpha(7)
    assert np.array_equal(np.asarray(load_image(encoded(transparent, "PNG"))), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(picture, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture, format, exif=exif)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    plain = Image.open(io.BytesIO(content)).convert("RGB")
    expected = plain.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else plain
    image = load_image(content)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert np.array_equal(np.asarray(load_image(Image.open(io.BytesIO(content)))), np.asarray(expected))
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(expected)), "turned twice"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(format):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values), format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert np.asarray(load_image(big_endian))[0, :, 0].tolist() == [0, 1, 128, 255]
    integers = Image.fromarray(values.astype(np.int32))
    assert integers.mode == "I" and np.asarray(load_image(integers))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(load_image(Image.new("L", (1, 1), 77).convert("I"))).tolist() == [[[77, 77, 77]]]


def test_animations_give_their_first_frame(picture):
    others = [Image.new("RGB", picture.size, colour) for colour in ("red", "blue")]
    first = Image.new("RGB", picture.size, "lime")
    for format in ("GIF", "WEBP", "PNG"):
        content = encoded(first, format, save_all=True, append_images=others, duration=50)
        assert np.abs(np.asarray(load_image(content)).astype(int) - [0, 255, 0]).max() <= 3


def test_one_channel_arrays():
    for shape in ((5, 7), (5, 7, 1), (1, 5, 7)):
        assert load_image(np.full(shape, 9, np.uint8)).size == (7, 5)
    assert load_image(torch.zeros(3, 5, 3)).size == (3, 5)
    assert load_image(np.full((5, 7), 9, ">i4")).getpixel((0, 0)) == (9, 9, 9)
    assert load_image(np.full((5, 7), 32768, ">u2")).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(np.full((5, 7), 0.5, ">f4")).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(np.zeros((3, 5, 3))).size == (5, 3)


@pytest.mark.parametrize("array,complaint", [
    (np.zeros((2, 5, 7), np.uint8), r"must have shape .* got \[2, 5, 7\]"),
    (np.zeros(5, np.uint8), r"must have shape .* got \[5\]"),
    (np.zeros((0, 5, 3), np.uint8), r"at least one pixel, got \[0, 5, 3\]"),
    (np.full((4, 4, 3), 255.0), r"0\.\.1, got 255\.\.255; divide by 255"),
    (np.full((4, 4, 3), np.nan), r"0\.\.1, got nan"),
    (np.full((4, 4, 3), -1), r"0\.\.255, got -1"),
    (np.full((4, 4, 3), 300), r"0\.\.255, got 300"),
    (np.full((4, 4, 3), "x"), "integers 0..255 or floats"),
    (np.zeros((4, 4, 3), bool), "got bool"),
])  # fmt: skip
def test_bad_image_arrays(array, complaint):
    with pytest.raises(MediaError, match=rf"^images\[2\]: .*{complaint}"):
        load_image(array, "images[2]")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.05])
def test_truncated_images(picture, format, kept):
    content = encoded(picture.resize((200, 120)), format)
    with pytest.raises(MediaError, match=r"^images\[0\]: not a readable image"):
        load_image(content[: int(len(content) * kept)], "images[0]")


def test_huge_image_is_refused(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="decompression bomb"):
        load_image(encoded(picture, "PNG"))


# Sounds


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_resampling_is_the_originals(tmp_path, rate, channels):
    sound = (np.random.default_rng(0).standard_normal((rate // 2 + 7, channels)) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "sound.wav", sound, rate, subtype="PCM_16")
    read, _ = soundfile.read(tmp_path / "sound.wav", dtype="float32")
    expected = librosa.to_mono(read.T)
    if rate != 16000:
        expected = librosa.resample(expected, orig_sr=rate, target_sr=16000)
    waveform = load_audio(tmp_path / "sound.wav")
    assert waveform.dtype == np.float32 and np.array_equal(waveform, expected)
    for array in (read.T, torch.tensor(read.T), read.T.astype(np.float64)):
        from_array = load_audio(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array, rate)
        np.testing.assert_allclose(from_array, expected, atol=1e-6)


def test_resampled_waveform_matches_golden(golden):
    folder = golden("unimoe_audio")
    expected = load_file(folder / "cases.safetensors")["component_fbank.stereo_44k.resampled_16k_mono"].numpy().copy()
    np.testing.assert_allclose(load_audio(folder / "assets" / "stereo_44k.wav"), expected, atol=1e-6)


@pytest.mark.parametrize("suffix,subtype,error", [
    ("wav", "PCM_U8", 0.01), ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-6), ("wav", "PCM_32", 1e-6),
    ("wav", "FLOAT", 0), ("wav", "DOUBLE", 0), ("flac", "PCM_16", 1e-4), ("flac", "PCM_24", 1e-6),
    ("aiff", "PCM_16", 1e-4), ("mp3", None, 0.02), ("ogg", None, 0.03),
])  # fmt: skip
def test_sound_files(tmp_path, tone, suffix, subtype, error):
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, tone, 44100, subtype=subtype)
    expected = load_audio(tone, 44100)
    content = path.read_bytes()
    for item in (path, str(path), content, base64.b64encode(content).decode()):
        waveform = load_audio(item)
        assert waveform.shape == expected.shape
        assert np.abs(waveform - expected).max() <= error


@pytest.mark.parametrize("name,codec,rate,layout", [
    ("mono.mp4", "aac", 44100, "mono"), ("stereo.mp4", "aac", 48000, "stereo"), ("six.mp4", "aac", 44100, "5.1"),
    ("slow.mp4", "aac", 8000, "mono"), ("sound.m4a", "aac", 22050, "stereo"), ("sound.webm", "libopus", 48000, "mono"),
    ("sound.mka", "aac", 44100, "mono"),
])  # fmt: skip
def test_sound_tracks(tmp_path, name, codec, rate, layout):
    time = np.arange(rate) / rate
    sound = (np.sin(time * 2 * math.pi * 440) * 0.3).astype(np.float32)
    format = {"m4a": "ipod", "mka": "matroska"}.get(name.split(".")[1])
    path = write_sound_track(tmp_path / name, sound, rate, layout, codec, format)
    expected = load_audio(sound, rate)
    waveform = load_audio(path)
    assert len(expected) <= len(waveform) <= len(expected) + 0.3 * 16000
    middle = slice(4000, 12000)
    # The sixth channel of 5.1 is for low tones only, and the encoder mutes others.
    loudness = 1.0 if layout != "5.1" else np.std(waveform[middle]) / np.std(expected[middle])
    assert loudness > 0.7
    # Lossy: compared by correlation at the best of a few lags, since some encoders leave their delay in.
    correlations = [np.corrcoef(np.roll(waveform, -lag)[middle], expected[middle])[0, 1] for lag in range(37)]
    assert max(correlations) > 0.99


def test_sound_track_of_a_video(tmp_path, tone):
    path = str(tmp_path / "both.mp4")
    with av.open(path, "w") as container:
        video, audio = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=44100, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        for stream, last in ((video, None), (audio, frame), (audio, None)):
            container.mux(stream.encode(last))
    assert len(load_video(path, 4)) == 4
    assert 16000 <= len(load_audio(path)) < 17000


def test_sound_arrays(tone):
    expected = load_audio(tone, 44100)
    assert np.array_equal(load_audio({"array": tone, "sampling_rate": 44100}), expected)
    assert np.array_equal(load_audio((tone, 44100)), expected)
    assert np.array_equal(load_audio(torch.tensor(tone), 44100), expected)
    assert np.array_equal(load_audio(np.stack([tone, tone]), 44100.0), expected)
    assert np.array_equal(load_audio(np.stack([tone, -tone]), 44100), np.zeros(16000, np.float32))
    assert load_audio(tone, 16000) is not None and len(load_audio(tone, 16000)) == 44100
    assert len(load_audio(tone, 44100, target_sampling_rate=8000)) == 8000
    assert load_audio(torch.tensor(tone).bfloat16(), 16000).dtype == np.float32


@pytest.mark.parametrize("dtype,values", [
    (np.int16, [-32768, 0, 16384]), (np.int32, [-(2**31), 0, 2**30]), (np.int8, [-128, 0, 64]),
    (np.uint8, [0, 128, 192]),
])  # fmt: skip
def test_integer_sounds_are_scaled(dtype, values):
    assert load_audio(np.array(values, dtype), 16000).tolist() == [-1, 0, 0.5]
    assert load_audio(np.array(values, np.dtype(dtype).newbyteorder(">")), 16000).tolist() == [-1, 0, 0.5]
    assert load_audio(torch.tensor(np.array(values, dtype)), 16000).tolist() == [-1, 0, 0.5]


@pytest.mark.parametrize("item,rate,complaint", [
    (np.zeros(10), None, "needs its sampling rate"),
    (np.zeros(10), 0, "positive number of Hz, got 0"),
    (np.zeros(10), "16000", "positive number of Hz"),
    (np.zeros(10), float("inf"), "positive number of Hz, got inf"),
    (np.zeros(10), 16000.5, "whole number of Hz"),
    ({"array": np.zeros(10)}, 16000, "keys 'array' and 'sampling_rate'"),
    (np.zeros(0), 16000, "zero samples"),
    (np.zeros((2, 0)), 16000, "zero samples"),
    (np.array([0, np.nan]), 16000, "NaN or infinite"),
    (np.array([[0, np.inf], [0, 0]]), 8000, "NaN or infinite"),
    (np.zeros((1000, 2)), 16000, r"got \[1000, 2\]; transpose"),
    (np.zeros((1, 2, 3)), 16000, r"got \[1, 2, 3\]"),
    (np.zeros(10, np.int64), 16000, "got int64"),
    (np.zeros(10, complex), 16000, "got complex128"),
    ([0.0, 0.1], 16000, "got list, but a sound must be"),
    (None, None, "sampling rate|got NoneType"),
])  # fmt: skip
def test_bad_sound_arrays(item, rate, complaint):
    with pytest.raises(MediaError, match=rf"^audio\[3\]: .*({complaint})"):
        load_audio(item, rate, name="audio[3]")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "aiff", "mp4", "webm"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01])
def test_truncated_sounds(tmp_path, tone, suffix, kept):
    path = tmp_path / f"sound.{suffix}"
    if suffix in ("mp4", "webm"):
        write_sound_track(path, tone, 48000, codec="aac" if suffix == "mp4" else "libopus")
    else:
        soundfile.write(path, np.tile(tone, 2), 44100)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(MediaError, match=r"^audio \('.*sound\."):
        load_audio(path)


def test_sound_file_whose_name_is_no_text(tmp_path, tone):
    """On Linux a name is bytes, such as those of a disc that was written in Latin-1."""
    path = tmp_path / os.fsdecode(b"t\xf6n.wav")
    with path.open("wb") as file:
        soundfile.write(file, tone, 16000, format="WAV")
    assert len(load_audio(path)) == len(tone)


def test_bad_sound_files(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    write_video(str(tmp_path / "silent.mp4"), 5)
    (tmp_path / "headerless.raw").write_bytes(os.urandom(1000))
    for file, complaint in (("none.wav", "zero samples"), ("nan.wav", "NaN or infinite"),
                            ("silent.mp4", "no sound track"), ("headerless.raw", "not a readable sound")):  # fmt: skip
        with pytest.raises(MediaError, match=rf"^speech\[0\] \('.*{file}'\): .*{complaint}"):
            load_audio(tmp_path / file, name="speech[0]")


# Videos


@pytest.mark.parametrize("name,options", [
    ("a.mp4", {}), ("b.mp4", {"b_frames": 2}), ("c.mov", {"codec": "mpeg4"}), ("d.webm", {"codec": "libvpx"}),
    ("e.webm", {"codec": "libvpx-vp9"}), ("f.mkv", {"b_frames": 2}), ("g.avi", {"codec": "mpeg4"}),
    ("h.avi", {"codec": "mpeg4", "b_frames": 2}), ("i.avi", {"codec": "rawvideo", "pix_fmt": "rgb24"}),
    ("j.gif", {"codec": "gif", "pix_fmt": "rgb8", "rate": 20}), ("k.ts", {"format": "mpegts"}),
    ("l.mp4", {"gop": 250}), ("m.mp4", {"rate": Fraction(30000, 1001)}),
])  # fmt: skip
@pytest.mark.parametrize("size", [(64, 48), (65, 47)])
def test_frames_are_the_originals_choice(tmp_path, name, options, size):
    if size[0] % 2:
        # Subsampled colours need even sizes with some encoders; the others are tried with odd ones.
        options = {**options, "pix_fmt": "yuv444p"} if options.get("codec", "libx264") == "libx264" else options
    path = write_video(str(tmp_path / name), 90, **{"size": size, **options})
    frames = load_video(path, 8)
    wanted = [i * (90 // 8) for i in range(8)]
    with av.open(path) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    assert len(every) == 90
    assert all(frame.mode == "RGB" and frame.size == size for frame in frames)
    assert [np.array_equal(frame, every[index]) for frame, index in zip(frames, wanted)] == [True] * 8
    # Lossy codecs and the palette of GIF change the greys a little.
    np.testing.assert_allclose(frame_numbers(frames), wanted, atol=3)


def test_video_from_every_source(tmp_path, server):
    path = write_video(str(tmp_path / "v.mp4"), 24)
    content = Path(path).read_bytes()
    expected = [np.asarray(frame) for frame in load_video(path, 4)]
    for item in (Path(path), content, base64.b64encode(content).decode(), "data:video/mp4;base64," +
                 base64.b64encode(content).decode()):  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in zip(load_video(item, 4), expected))


@pytest.mark.parametrize("name", ["long.mp4", "long.webm", "long.avi"])
def test_long_video_is_read_by_seeking(tmp_path, name):
    codec = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4"}[name.split(".")[1]]
    path = write_video(str(tmp_path / name), 900, codec=codec, size=(32, 32), gop=10)
    frames, num_decoded = read_frames(Path(path), 8, "video")
    assert len(frames) == 8
    assert num_decoded <= 8 * 12, f"{num_decoded} of 900 frames decoded"


def test_number_of_frames_is_counted_as_the_original_does(tmp_path):
    # 4.004 s is printed as 4.00 s, which makes 119 frames of 120, and 119 // 8 is 14.
    path = write_video(str(tmp_path / "v.mp4"), 120, rate=Fraction(30000, 1001))
    np.testing.assert_allclose(frame_numbers(load_video(path, 8)), [i * 14 for i in range(8)], atol=1)


def test_sound_that_outlasts_the_video(tmp_path, tone):
    path = str(tmp_path / "v.webm")
    with av.open(path, "w") as container:
        video, audio = container.add_stream("libvpx", rate=10), container.add_stream("libopus", rate=48000)
        audio.layout = "mono"
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for index in range(10):
            pixels = np.full((32, 32, 3), 20 * index, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.tile(tone, 4)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        for stream, last in ((video, None), (audio, frame), (audio, None)):
            container.mux(stream.encode(last))
    # 3.68 s at 10 frames a second are 36 frames, a quarter of which is 9; what is beyond the end is its last frame.
    np.testing.assert_allclose(frame_numbers(load_video(path, 4)), [0, 90, 90, 90], atol=2)


def test_near_frames_are_not_sought_twice(tmp_path):
    path = write_video(str(tmp_path / "v.mp4"), 40, gop=250)
    _, num_decoded = read_frames(Path(path), 8, "video")
    assert num_decoded <= 40


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "name,codec", [("v.mp4", "libx264"), ("v.webm", "libvpx-vp9"), ("v.gif", "gif"), ("v.avi", "mpeg4")]
)
def test_never_more_frames_than_there_are(tmp_path, name, codec, count):
    path = write_video(str(tmp_path / name), count, codec=codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    assert len(load_video(path, 8)) == count


def test_video_without_duration_or_index(tmp_path):
    path = tmp_path / "live.webm"
    pipe = Pipe(path)
    write_video(pipe, 90, codec="libvpx", format="webm")
    pipe.file.close()
    with av.open(str(path)) as container:
        assert container.duration is None
    np.testing.assert_allclose(frame_numbers(load_video(path, 8)), [i * 11 for i in range(8)], atol=1.4)


def test_gif_with_uneven_frames():
    colours = [(i * 20,) * 3 for i in range(10)]
    images = [Image.new("RGB", (20, 20), colour) for colour in colours]
    content = encoded(images[0], "GIF", save_all=True, append_images=images[1:], duration=[100] * 5 + [300] * 5)
    frames = load_video(content, 2)
    # Mean 1800 / 9 ms a frame up to the last one, so the second of two is at 0.89 s: the eighth frame's.
    assert [np.asarray(frame)[0, 0, 0] for frame in frames] == [0, 120]


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_animations(format):
    images = [Image.new("RGB", (21, 20), (i * 10,) * 3) for i in range(20)]
    content = encoded(images[0], format, save_all=True, append_images=images[1:], duration=40)
    frames = load_video(content, 5)
    assert [frame.size for frame in frames] == [(21, 20)] * 5
    np.testing.assert_allclose([np.asarray(frame).mean() for frame in frames], [0, 40, 80, 120, 160], atol=3)
    assert len(load_video(content, 30)) == 20


@pytest.mark.parametrize("matrix,corner", [
    ((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0)),
])  # fmt: skip
def test_rotated_video(tmp_path, matrix, corner):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32] = 255
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * value for value in matrix)
    content = path.read_bytes()
    track = content.index(b"tkhd")
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content = content[:track] + content[track:].replace(upright, turned, 1)
    frame = np.asarray(load_video(content, 2)[0])
    assert frame.shape == ((32, 64, 3) if matrix[0] else (64, 32, 3))
    bright = {(y, x): frame[y, x, 0] > 128 for y in (0, -1) for x in (0, -1)}
    assert [place for place, value in bright.items() if value] == [corner]


def test_given_frames_are_used_as_given(tmp_path, picture):
    array = np.stack([np.full((6, 8, 3), value, np.uint8) for value in range(20)])
    for item in (list(array), tuple(array), array, array.transpose(0, 3, 1, 2), torch.tensor(array),
                 torch.tensor(array).permute(0, 3, 1, 2) / 255):  # fmt: skip
        check_media(item, "video", "video")
        frames = load_video(item, 8)
        assert len(frames) == 20 and [np.asarray(frame)[0, 0, 0] for frame in frames] == list(range(20))
    for index in (10, 2, 1):
        Image.new("RGB", (8, 6), (index,) * 3).save(tmp_path / f"{index:03d}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [np.asarray(frame)[0, 0, 0] for frame in load_video(str(tmp_path))] == [1, 2, 10]
    mixed = [picture, tmp_path / "001.png", encoded(picture, "PNG")]
    assert [frame.size for frame in load_video(mixed)] == [(40, 24), (8, 6), (40, 24)]


@pytest.mark.parametrize(
    "name,codec", [("v.mp4", "libx264"), ("v.webm", "libvpx"), ("v.avi", "mpeg4"), ("v.gif", "gif")]
)
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.02])
def test_truncated_videos(tmp_path, name, codec, kept):
    path = write_video(str(tmp_path / name), 60, codec=codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    content = Path(path).read_bytes()
    with pytest.raises(MediaError, match=r"^videos\[1\]: .*(truncated|not a readable)"):
        load_video(content[: int(len(content) * kept)], 8, "videos[1]")


def test_damaged_video(tmp_path):
    path = write_video(str(tmp_path / "v.mp4"), 60, codec="mpeg4", gop=1)
    content = bytearray(Path(path).read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 3000] = bytes(3000)
    with pytest.raises(MediaError, match="^video: "):
        load_video(bytes(content), 8)


def test_bad_videos(tmp_path, tone):
    write_sound_track(tmp_path / "sound.mp4", tone, 44100)
    with pytest.raises(MediaError, match=r"sound.mp4'\): the file has no video stream"):
        load_video(tmp_path / "sound.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MediaError, match=r"folder'\): the folder holds no images"):
        load_video(tmp_path / "folder")
    with pytest.raises(MediaError, match=r"^videos\[0\]: the list of frames is empty"):
        load_video([], name="videos[0]")
    with pytest.raises(MediaError, match=r"^video\[1\] \('gone.png'\): no such file"):
        load_video([np.zeros((4, 4, 3)), "gone.png"])
    with pytest.raises(MediaError, match=r"got \[4, 4, 3\]"):
        load_video(np.zeros((4, 4, 3)))
    with pytest.raises(MediaError, match="`num_frames` must be"):
        load_video(np.zeros((1, 4, 4, 3)), num_frames=0)
    with pytest.raises(MediaError, match="got Image, but a video must be"):
        load_video(Image.new("RGB", (4, 4)))


# All kinds


LOADERS = {"image": load_image, "audio": load_audio, "video": load_video}


@pytest.mark.parametrize("kind", LOADERS)
def test_bad_sources(tmp_path, server, kind):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("This is no media file. " * 100)
    closed = "http://127.0.0.1:9"
    for item, complaint in (
        (tmp_path / "gone.bin", r"\('.*gone.bin'\): no such file"),
        ("gone.bin", r"\('gone.bin'\): no such file"),
        ("", r"\(''\): no such file"),
        ("x" * 5000, r"no such file"),
        ("nul\0byte", r"no such file"),
        ("abcd", r"\('abcd'\): no such file"),
        (tmp_path / "empty", r"\('.*empty'\): the file is empty"),
        (b"", "the bytes are empty"),
        (b"\0" * 1000, "not a readable"),
        (tmp_path / "text", r"\('.*text'\): not a readable"),
        ("data:image/png;base64,", "data URI"),
        ("data:image/png;base64,@@@", "data URI"),
        ("data:nothing", "data URI"),
        (f"{server}/gone.png", r"\('http.*gone.png'\): the URL cannot be fetched \(HTTP 404"),
        (f"{server}/empty.png", "the URL gives an empty file"),
        (f"{closed}/x.png", "the URL cannot be fetched"),
        ("http://", "the URL cannot be fetched"),
        ("https://[bad/x.png", "the URL cannot be fetched"),
    ):
        with pytest.raises(MediaError, match=rf"^{kind}\[7\].*{complaint}") as caught:
            LOADERS[kind](item, name=f"{kind}[7]")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert issubclass(MediaError, ValueError)
    with pytest.raises(MediaError, match="got int, but|sampling rate"):
        LOADERS[kind](7)


def test_folder_instead_of_file(tmp_path):
    for load in (load_image, load_audio):
        with pytest.raises(MediaError, match="this is a folder"):
            load(tmp_path)


def test_slow_host_times_out(monkeypatch):
    import socket

    from unimoe.processing import media_source

    monkeypatch.setattr(media_source, "URL_TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(MediaError, match="cannot be fetched .*timed out"):
            load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/x.png")


def test_play_lists_are_not_followed(tmp_path, tone):
    """A play list could make the reader open other files and addresses."""
    soundfile.write(tmp_path / "secret.wav", tone, 44100)
    for play_list in (f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n",
                      f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n"):  # fmt: skip
        for load in (load_audio, load_video):
            with pytest.raises(MediaError, match="not a readable"):
                load(play_list.encode())


@pytest.mark.parametrize("kind", ["image", "video", "audio", "speech"])
def test_check_media_is_cheap_and_finds_what_is_missing(tmp_path, kind):
    (tmp_path / "text").write_text("not looked into")
    check_media(tmp_path / "text", kind, kind)
    # Nothing answers there, and nothing is asked.
    check_media("http://127.0.0.1:9/x", kind, kind)
    for item in ("gone.bin", tmp_path / "gone.bin", b"", 7, None):
        with pytest.raises(MediaError, match=rf"^{kind}s\[2\]"):
            check_media(item, kind, f"{kind}s[2]", 16000)
