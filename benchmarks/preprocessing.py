"""How fast are images, sounds and videos prepared, against Transformers' processors and against decoding a whole video?

Images: `UniMoEProcessor` against `CLIPImageProcessorPil`. Sounds: filterbanks against `ASTFeatureExtractor` and log-mels
against `WhisperFeatureExtractor`, each for sounds of the same length, to the same shape. Videos: eight frames of one minute
against decoding all frames and keeping eight.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from transformers import ASTFeatureExtractor, AutoProcessor, CLIPImageProcessorPil, WhisperFeatureExtractor
from transformers.utils import is_speech_available
from transformers.video_utils import load_video as transformers_load_video

import unimoe
from unimoe.processing.media import load_video
from unimoe.processing.spectrograms import BLOCK
from unimoe.processing.video_frames import read_frames

from .common import Report, arguments, compare

RATE, CHUNK_SECONDS = 16000, 30
SIDE = 336
NUM_FRAMES, FPS = 8, 25
SOUND_GOAL, VIDEO_GOAL = 2.0, 5.0


def image_rows(report: Report, sizes: list[tuple[int, int]], batches: list[int], rounds: int) -> None:
    peer = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    ours = unimoe.UniMoEProcessor(
        image_processor=peer,
        tokenizer=AutoProcessor.from_pretrained(unimoe.tiny_checkpoint()).tokenizer,
        num_image_tokens=(SIDE // 14) ** 2,
        num_video_tokens=(SIDE // 14) ** 2,
    )
    generator = np.random.default_rng(0)
    for width, height in sizes:
        for batch in batches:
            images = [_picture(generator, width, height) for _ in range(batch)]
            runs = {
                "ours": lambda images=images: ours(images=images, return_tensors="pt")["pixel_values"],
                "peer": lambda images=images: peer(images=images, return_tensors="pt")["pixel_values"],
            }
            assert torch.equal(*(run() for run in runs.values())), "the pixels differ"
            times = compare(runs, rounds)
            case = f"{batch} x {width}x{height} to {SIDE}x{SIDE}"
            report.add("images", case, "CLIPImageProcessorPil", times["peer"] / times["ours"])


def _picture(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def sound_rows(report: Report, lengths: list[float], rounds: int) -> None:
    ours = unimoe.UniMoEFeatureExtractor()
    with warnings.catch_warnings():
        # Its own filters: one of them is narrower than a bin.
        warnings.simplefilter("ignore", UserWarning)
        filterbanks = ASTFeatureExtractor(max_length=ours.audio_num_frames)
    log_mels = WhisperFeatureExtractor()
    backend = "torchaudio" if is_speech_available() else "numpy, without torchaudio"
    generator = np.random.default_rng(0)
    for seconds in lengths:
        sound = generator.normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
        chunks = [sound[i : i + CHUNK_SECONDS * RATE] for i in range(0, len(sound), CHUNK_SECONDS * RATE)]
        case = f"{seconds:g} s of sound, in chunks of {CHUNK_SECONDS} s"
        runs = {
            "ours": lambda s=sound: ours(audio=s, sampling_rate=RATE, return_tensors="np")["input_values"],
            "peer": lambda c=chunks: filterbanks(c, sampling_rate=RATE, return_tensors="np")["input_values"],
        }
        assert len({run().shape for run in runs.values()}) == 1, "the filterbanks differ in shape"
        times = compare(runs, rounds)
        report.add("filterbanks", case, f"ASTFeatureExtractor ({backend})", times["peer"] / times["ours"], SOUND_GOAL)
        runs = {
            "ours": lambda s=sound: ours(speech=s, sampling_rate=RATE, return_tensors="np")["input_features"],
            "peer": lambda c=chunks: log_mels(c, sampling_rate=RATE, return_tensors="np")["input_features"],
        }
        values = [run() for run in runs.values()]
        # The original's chunks lie one sample further apart than they are long.
        assert len(chunks) > 1 or np.array_equal(*values), "the log-mels differ"
        runs["bare"] = bare_log_mels(log_mels, seconds)
        times = compare(runs, rounds)
        report.add("log-mels", case, "WhisperFeatureExtractor", times["peer"] / times["ours"], SOUND_GOAL)
        report.add("  bare operations", case, "WhisperFeatureExtractor", times["peer"] / times["bare"])


def bare_log_mels(extractor: WhisperFeatureExtractor, seconds: float) -> Callable[[], None]:
    """The operations of which a log-mel consists, on blocks of frames that lie ready, with results in the same places each time:
    window, transform, real and imaginary parts side by side, moduli, squares, filters, logarithms, scaling.

    With others the peer's bits would not come out, and taking the moduli of complex numbers is slower. Nothing is padded, cut out
    or put together.
    """
    num_frames = min(round(seconds * RATE), CHUNK_SECONDS * RATE) // extractor.hop_length
    blocks = torch.randn(num_frames, extractor.n_fft).split(BLOCK)
    window, filters = torch.hann_window(extractor.n_fft), torch.from_numpy(extractor.mel_filters).float()
    windowed, parts = torch.empty(BLOCK, extractor.n_fft), torch.empty(2, BLOCK, len(filters))

    def run() -> None:
        for block in blocks:
            real, imaginary = parts[:, : len(block)]
            spectrum = torch.fft.rfft(torch.mul(block, window, out=windowed[: len(block)]))
            np.copyto(real.numpy(), spectrum.real.numpy())
            np.copyto(imaginary.numpy(), spectrum.imag.numpy())
            torch.hypot(real, imaginary, out=real).square_()
            torch.mm(real, filters).clamp_(min=1e-10).log10_().clamp_(min=-8.0).mul_(0.25).add_(1.0)

    return run


def write_video(file: Path, codec: str, seconds: int, width: int = 640, height: int = 360, fps: int = FPS) -> None:
    """A picture that moves a little from frame to frame."""
    generator = np.random.default_rng(0)
    wide = np.asarray(_picture(generator, width + seconds * fps, height))
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 1_000_000
        for index in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, index : index + width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decode_everything(file: Path, num_frames: int, threads: str) -> list[Image.Image]:
    """Every frame decoded, the chosen ones kept."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        frames = list(container.decode(stream))
    step = len(frames) // num_frames
    return [frames[i * step].to_image() for i in range(num_frames)]


def video_rows(report: Report, folder: Path, codecs: list[str], seconds: int, rounds: int) -> None:
    for codec in codecs:
        file = folder / f"{codec}.mp4"
        try:
            write_video(file, codec, seconds)
        except av.FFmpegError:
            print(f"  no encoder for {codec} here")
            continue
        runs = {
            "ours": lambda f=file: load_video(f, NUM_FRAMES),
            "all frames decoded": lambda f=file: decode_everything(f, NUM_FRAMES, "SLICE"),
            "all frames decoded, threaded": lambda f=file: decode_everything(f, NUM_FRAMES, "AUTO"),
            "Transformers' load_video (PyAV)": lambda f=file: transformers_load_video(
                str(f), num_frames=NUM_FRAMES, backend="pyav"
            ),
        }
        for ours, theirs in zip(runs["ours"](), runs["all frames decoded"]()):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)), "other frames were chosen"
        times = compare(runs, rounds)
        case = f"{NUM_FRAMES} frames of {seconds} s, 640x360, {codec}"
        for name, value in times.items():
            if name != "ours":
                report.add("video frames", case, name, value / times["ours"], VIDEO_GOAL)
        decoded = read_frames(file, NUM_FRAMES, codec)[1]
        report.add("  frames of the file", case, "frames that had to be decoded", seconds * FPS / decoded)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--seconds", type=float, nargs="+", help="lengths of the sounds")
    parser.add_argument("--video-seconds", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="one small image: whether it runs, not how fast")
    args = parser.parse_args(argv)
    report = Report("preprocessing", "How fast are images, sounds and videos prepared?", args)
    sizes = [(640, 480), (1920, 1080)] + ([(336, 336), (4000, 3000)] if args.full else [])
    sizes = [(320, 240)] if args.tiny else sizes
    image_rows(report, sizes, [1, 8] if args.full else [1], args.rounds)
    sound_rows(report, args.seconds or ([1, 5, 30, 120] if args.full else [5, 30]), args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        codecs = ["mpeg4", "libx264", "libvpx-vp9"] if args.full else ["mpeg4", "libx264"]
        video_rows(report, Path(folder), codecs, args.video_seconds, max(1, args.rounds // 2))
    return report.finish()


if __name__ == "__main__":
    main()
