"""Writes a planned checkpoint as safetensors shards, with a few matrices in memory at a time, into a folder that appears
finished or not at all.
"""

import contextlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from .errors import ConversionError
from .expressions import Expression, stream
from .plan import format_bytes

INDEX_NAME = "model.safetensors.index.json"
METADATA = {"format": "pt"}
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
MAX_PENDING = 8
# Beside the weights: configuration, tokenizer, code.
SMALL_FILES_BYTES = 64 * 1000**2


@contextlib.contextmanager
def new_folder(output: Path, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its place when the block ends without an error. Links are followed.

    A process that is killed leaves `<output>.incomplete`, which loads as nothing and is removed by the next run.

    Args:
        output: Where the checkpoint shall be.
        num_bytes: How much will be written, for a look at the free space.
        overwrite: Replace a checkpoint that is there.

    Raises:
        ConversionError: `output` is taken, the place cannot be written to, or the disk has too little room, at the start or
            while writing. Nothing is left behind.
    """
    check_output(output, overwrite)
    place, partial, old = _places(output)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise ConversionError(
            f"{output}: cannot write there ({error.strerror or error}); choose another --output"
        ) from None
    try:
        free = shutil.disk_usage(place.parent).free
        if free < num_bytes + SMALL_FILES_BYTES:
            raise ConversionError(
                f"{output}: {format_bytes(num_bytes + SMALL_FILES_BYTES)} are needed, {format_bytes(free)} are free on that "
                "disk; make room or choose another --output"
            )
        yield partial
        _replace(place, partial, old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        where = error.filename or output
        raise ConversionError(
            f"{where}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ConversionError where `output` may not be written to or replaced."""
    if output.is_symlink() and not output.exists():
        raise ConversionError(
            f"{output}: a link to a place that does not exist; remove it, or choose another --output"
        )
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise ConversionError(
                f"{output}: exists already; pass --overwrite to replace it, or choose another --output"
            )
        if not (output / "config.json").is_file():
            raise ConversionError(f"{output}: not a checkpoint folder, so --overwrite does not replace it")
    elif output.exists() and not output.is_dir():
        raise ConversionError(f"{output}: a file, not a folder; choose another --output")


def check_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raises ConversionError where writing to `output` would replace any of `inputs`, which are folders and files.

    Links are followed, and so are the links in a folder, such as those of the Hub's cache: neither a link nor what it leads to
    may be replaced.
    """
    replaced = set(_places(output))
    for path in inputs:
        for file in (path, *(path.iterdir() if path.is_dir() else ())):
            target = Path(os.path.realpath(file))
            link = Path(os.path.realpath(file.parent), file.name) if file.is_symlink() else target
            if replaced & {link, *link.parents, target, *target.parents}:
                raise ConversionError(
                    f"{output}: writing there would replace {file}, which is to be read; choose another --output"
                )


def _places(output: Path) -> tuple[Path, Path, Path]:
    """Where the folder really goes, where it grows until it is whole, and where the one that it replaces waits until then."""
    place = Path(os.path.realpath(output))
    return place, place.with_name(place.name + ".incomplete"), place.with_name(place.name + ".replaced")


def _replace(place: Path, partial: Path, old: Path) -> None:
    # Two renames, since a folder cannot be renamed onto one that is not empty; the old one goes last.
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "200 MB". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip().upper())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not a size; write it like '5GB' or '500MB'")
    return int(float(match[1]) * 1000 ** ("B", "KB", "MB", "GB", "TB").index(match[2]))


def write_weights(
    targets: Mapping[str, Expression],
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int = 5 * 1000**3,
    progress: bool = True,
) -> int:
    """Writes all tensors, cast to `dtype`, as `model.safetensors` or its shards, with an index in either case.

    Args:
        targets: Tensors by their names.
        max_shard_size: In bytes; a larger tensor gets a shard of its own.
        progress: Whether to show a bar on standard error.

    Returns:
        Bytes of all tensors.

    Raises:
        ConversionError: A source is damaged. OSError: writing fails.
    """
    blanks = {name: torch.empty(target.shape, dtype=dtype, device="meta") for name, target in targets.items()}
    split = split_torch_state_dict_into_shards(
        blanks, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    total = sum(blank.nbytes for blank in blanks.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="converting", disable=not progress)
    # The blocks are too small for several threads to be of use.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with bar, contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        for filename, names in split.filename_to_tensors.items():
            _write_shard({name: targets[name] for name in names}, folder / filename, dtype, bar)
    weight_map = {name: filename for filename, names in split.filename_to_tensors.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_shard(targets: Mapping[str, Expression], file: Path, dtype: torch.dtype, bar: tqdm) -> None:
    """One safetensors file: the length of the header (8 bytes), the header as JSON, the tensors' bytes."""
    header: dict[str, dict] = {"__metadata__": METADATA}
    end = 0
    for name, target in targets.items():
        begin, end = end, end + torch.Size(target.shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(target.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # One thread reads and computes, the other writes, a few small blocks behind.
    with open(file, "wb", buffering=0) as out, ThreadPoolExecutor(max_workers=1) as writer:
        pending = deque([writer.submit(_write_all, out, len(text).to_bytes(8, "little") + text)])
        for target in targets.values():
            for block in stream(target, dtype):
                if len(pending) >= MAX_PENDING:
                    pending.popleft().result()
                pending.append(writer.submit(_write_all, out, memoryview(block.reshape(-1).view(torch.uint8).numpy())))
                bar.update(block.nbytes)
        while pending:
            pending.popleft().result()
        # The rename that follows must not come to the disk before the data.
        os.fsync(out.fileno())


def _write_all(out, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
