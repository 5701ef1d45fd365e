"""How long does `from_pretrained` take, against reading the same bytes, and against Transformers' Llava-Mixtral?

Cold: the files are dropped from the page cache before every read. Warm: they stay in it.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import LlavaForConditionalGeneration

import unimoe

from .common import Report, arguments, compare
from .models import SMALL, Sizes, give_weights, peer_model, unimoe_model


def read_plainly(folder: Path) -> int:
    """All bytes of the weights into memory; returns how many."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        rest = memoryview(bytearray(file.stat().st_size))
        with open(file, "rb", buffering=0) as stream:
            while read := stream.readinto(rest):
                rest, total = rest[read:], total + read
    return total


def drop_from_cache(folders: list[Path]) -> Callable[[], None]:
    """A call that asks the system to forget the files; what is on the disk already can be forgotten."""

    def drop() -> None:
        for folder in folders:
            for file in folder.glob("*.safetensors"):
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    return drop


def rows(report: Report, sizes: Sizes, folder: Path, rounds: int) -> None:
    peer, ours = peer_model(sizes), unimoe_model(sizes)
    give_weights(peer, ours)
    folders = {name: folder / name for name in ("ours", "peer", "peer, an expert a tensor")}
    ours.save_pretrained(folders["ours"])
    peer.save_pretrained(folders["peer"], save_original_format=False)
    peer.save_pretrained(folders["peer, an expert a tensor"])
    gigabytes = sum(tensor.nbytes for tensor in ours.state_dict().values()) / 1e9
    del peer, ours
    runs: dict[str, Callable] = {
        "ours": lambda: unimoe.UniMoEForConditionalGeneration.from_pretrained(folders["ours"]),
        "reading the bytes": lambda: read_plainly(folders["ours"]),
        "Llava-Mixtral, stacked experts": lambda: LlavaForConditionalGeneration.from_pretrained(folders["peer"]),
        "Llava-Mixtral, an expert a tensor": lambda: LlavaForConditionalGeneration.from_pretrained(
            folders["peer, an expert a tensor"]
        ),
    }
    states = {"warm": None}
    if hasattr(os, "posix_fadvise"):
        states["cold"] = drop_from_cache(list(folders.values()))
    for state, before in states.items():
        times = compare(runs, rounds, before)
        for name, seconds in times.items():
            if name != "ours":
                case = f"{sizes}, {gigabytes:.2f} GB, {state} cache"
                report.add("loading", case, name, seconds / times["ours"])


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how fast")
    args = parser.parse_args(argv)
    report = Report("loading", "How fast is a model loaded?", args)
    all_sizes = [SMALL] if args.tiny else [Sizes(num_layers=2)]
    if args.full:
        all_sizes += [Sizes(), Sizes(hidden_size=2048, intermediate_size=5632, num_layers=6, vocab_size=32000)]
    for sizes in all_sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows(report, sizes, Path(folder), args.rounds)
    return report.finish()


if __name__ == "__main__":
    main()
