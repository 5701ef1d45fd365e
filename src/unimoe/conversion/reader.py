"""Checkpoint files as mappings from names to lazy tensors: shapes and dtypes at once, bytes when asked for.

Nothing is memory-mapped and nothing is kept: reading a tensor costs its own size, whatever the size of its file. `.bin` and
`.pt` files are unpickled with `weights_only=True` alone, so code inside them never runs.
"""

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .errors import ConversionError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a checkpoint folder calls its weights, the preferred first.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD_PATTERNS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# Small enough for a processor's cache, large enough for the disk.
BLOCK_BYTES = 2 << 20
DAMAGED = "truncated or corrupt; download it again"


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """A tensor in a file, not yet read.

    Args:
        file, name: Where it lies and what it is called there.
        shape, dtype: Known without reading.
        offset: Its first byte in the file.
        stride: In elements; None for a contiguous tensor.
        crc32: Checksum of exactly the bytes that `read` reads, where the format has one.
        loaded: The tensor itself, from files that cannot be read in parts (saved by torch before 1.6).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    stride: tuple[int, ...] | None = None
    crc32: int | None = None
    loaded: torch.Tensor | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def sources(self) -> list["SourceTensor"]:
        return [self]

    @property
    def is_contiguous(self) -> bool:
        return self.stride is None and self.loaded is None and 0 not in self.shape

    def read(self) -> torch.Tensor:
        """The tensor, with the memory of its own alone.

        Raises:
            ConversionError: The file ends too early, or its checksum says that it is damaged.
        """
        if self.loaded is not None:
            return self.loaded
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        stride = self.stride or _contiguous(self.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, stride))
        flat = torch.empty(span, dtype=self.dtype)
        for _ in self._fill([flat]):
            pass
        return flat.as_strided(self.shape, stride)

    def row_blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A contiguous tensor, some rows at a time: the first row's number, and the rows, in memory that the next block reuses.

        Raises:
            ConversionError: As `read`; a checksum can only be verified behind the last block.
        """
        rows = self.shape[0] if self.shape else 1
        row_shape = self.shape[1:]
        row_bytes = max(math.prod(row_shape) * self.dtype.itemsize, 1)
        step = min(max(block_bytes // row_bytes, 1), rows)
        buffer = torch.empty(step, *row_shape, dtype=self.dtype)
        start = 0
        # To the end of `_fill`, where the checksum is verified.
        for block in self._fill(buffer[: min(step, rows - first)] for first in range(0, rows, step)):
            yield start, block
            start += len(block)

    def _fill(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hands out every block after it was filled with the next bytes of the tensor."""
        crc32 = 0
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            for block in blocks:
                buffer = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise ConversionError(f"{self.file}: the file ends inside tensor {self.name!r}: {DAMAGED}")
                    done += count
                if self.crc32 is not None:
                    crc32 = zlib.crc32(buffer, crc32)
                yield block
        if self.crc32 is not None and crc32 != self.crc32:
            raise ConversionError(f"{self.file}: tensor {self.name!r} fails its checksum: {DAMAGED}")

    def write(self, out: torch.Tensor) -> None:
        """Copies the tensor into `out`, of the same shape, cast to its dtype."""
        if self.is_contiguous and out.is_contiguous() and out.dtype == self.dtype:
            for _ in self._fill([out]):
                pass
        elif self.is_contiguous and self.shape:
            for start, block in self.row_blocks():
                out[start : start + len(block)].copy_(block)
        else:
            out.copy_(self.read())


def read_weights(folder: Path, hint: str = "") -> dict[str, SourceTensor]:
    """The weights of a Hugging Face checkpoint folder: one file or shards, `.safetensors` before `.bin`.

    Raises:
        ConversionError: No weights there, a shard of the index is missing, a name occurs twice, or a file is damaged. `hint`
            says where the missing files come from.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return read_files(_shards(index, hint))
    for pattern in SHARD_PATTERNS:
        if shards := sorted(folder.glob(pattern)):
            return read_files(shards)
    wanted = ", ".join(f"{name} (or its shards)" for name in WEIGHT_FILES)
    raise ConversionError(f"{folder}: no weights there; it must hold one of {wanted}{hint}")


def _shards(index: Path, hint: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: no 'weight_map' in it: {DAMAGED}")
    if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise ConversionError(
            f"{index}: 'weight_map' has {weight_map[wrong[0]]!r} as the file of {wrong[0]}: {DAMAGED}"
        )
    shards = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ConversionError(f"{index.parent}: {', '.join(missing)} missing, which {index.name} lists{hint}")
    return shards


def read_files(files: Iterable[Path]) -> dict[str, SourceTensor]:
    """Several files as one mapping. Raises ConversionError where two of them have a tensor of the same name."""
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name in tensors:
                raise ConversionError(
                    f"tensor {name!r} is in both {tensors[name].file} and {file}; remove one of them"
                )
            tensors[name] = tensor
    return tensors


def read_file(file: Path) -> dict[str, SourceTensor]:
    """All tensors of one `.safetensors`, `.bin` or `.pt` file that holds a flat dict of tensors.

    Raises:
        ConversionError: The file is missing, damaged, holds pickled code, or something else than tensors.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content = read_pickle(file)
    if not isinstance(content, Mapping) or not all(isinstance(value, SourceTensor) for value in content.values()):
        raise ConversionError(f"{file}: not a dict of tensors, as the weights of a checkpoint are")
    return dict(content)


def read_pickle(file: Path) -> Any:
    """Whatever a `.bin` or `.pt` file holds, with a [`SourceTensor`] in the place of every tensor.

    Raises:
        ConversionError: As `read_file`.
    """
    _require_file(file)
    with open(file, "rb") as raw:
        is_zip = raw.read(2) == b"PK"
    try:
        if is_zip:
            checksums = _zip_checksums(file)
            with FakeTensorMode():
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            # torch wrote no zip archives before version 1.6; such a file can only be read as a whole.
            checksums = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class) ([\w.]*\.\w+)", str(error))
        if code or _is_plain_pickle(file):
            name = f" ({code[1]})" if code else ""
            raise ConversionError(
                f"{file}: refused, because it holds pickled code{name} beside or instead of tensors; nothing of it was run. "
                "Take the file from its original source, or use a .safetensors version"
            ) from None
        raise ConversionError(f"{file}: {_what_else(file) or DAMAGED}") from None
    except OSError as error:
        raise ConversionError(
            f"{file}: {_what_else(file) or f'cannot be read ({error.strerror or DAMAGED})'}"
        ) from None
    except (RuntimeError, EOFError, LookupError, AttributeError, ValueError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, ConversionError):
            raise
        # Nothing of torch's own text, which recommends to load such files without the safeguard against code.
        raise ConversionError(f"{file}: {_what_else(file) or DAMAGED}") from None
    return _replace_tensors(content, file, "", checksums)


def _is_plain_pickle(file: Path) -> bool:
    """Whether a file is a pickle of protocol 3 or later, which torch.save never writes."""
    with open(file, "rb") as raw:
        start = raw.read(2)
    return start[:1] == b"\x80" and start[1:] in (b"\x03", b"\x04", b"\x05")


def _what_else(file: Path) -> str | None:
    """What a file is that downloads often leave in the place of weights."""
    with open(file, "rb") as raw:
        raw_start = raw.read(512)
    start = raw_start[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` or download the file"
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, not the file itself; download it again, with access to the repository"
    if raw_start[257:262] == b"ustar":
        return "a tar archive, as the first versions of torch wrote, which cannot be read safely; save it in a newer format"
    return None


def _zip_checksums(file: Path) -> dict[int, tuple[int, int]]:
    """Of every record in a zip archive: {first byte: (size, CRC-32)}."""
    records = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ConversionError(f"{file}: a compressed archive, not a file that torch.save has written")
            raw.seek(record.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            start = record.header_offset + 30 + name_length + extra_length
            records[start] = (record.file_size, record.CRC)
    return records


def _replace_tensors(value: Any, file: Path, name: str, checksums: dict[int, tuple[int, int]]) -> Any:
    if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_quantized):
        kind = f"quantised ({value.dtype})" if value.is_quantized else f"sparse ({value.layout})"
        raise ConversionError(f"{file}: tensor {name!r} is {kind}; only plain tensors can be converted")
    if isinstance(value, FakeTensor):
        storage = value.untyped_storage()
        start = storage._checkpoint_offset
        size, crc32 = checksums.get(start, (None, None))
        shape, stride = tuple(value.shape), tuple(value.stride())
        contiguous = stride == _contiguous(shape) or value.is_contiguous()
        whole = contiguous and value.storage_offset() == 0 and size == value.numel() * value.itemsize
        return SourceTensor(
            file,
            name,
            shape,
            value.dtype,
            offset=start + value.storage_offset() * value.itemsize,
            stride=None if contiguous else stride,
            crc32=crc32 if whole else None,
        )
    if isinstance(value, torch.Tensor):
        return SourceTensor(file, name, tuple(value.shape), value.dtype, loaded=value)
    if isinstance(value, Mapping):
        return {key: _replace_tensors(item, file, str(key), checksums) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_tensors(item, file, f"{name}.{i}", checksums) for i, item in enumerate(value)]
    return value


def _read_safetensors(file: Path) -> dict[str, SourceTensor]:
    _require_file(file)
    total = file.stat().st_size
    try:
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if not 2 <= length <= total - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = SourceTensor(
                file, name, tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]], offset=8 + length + begin
            )
            if end - begin != tensor.nbytes or not 0 <= begin <= end <= total - 8 - length:
                raise ValueError(f"tensor {name!r} does not lie inside the file")
            tensors[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file}: {_what_else(file) or f'{DAMAGED} ({error})'}") from None
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError where the file is missing or holds something else."""
    _require_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConversionError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{file}: a JSON object is needed, found a {type(content).__name__}")
    return content


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise ConversionError(f"{file}: {'not a file' if file.exists() else 'no such file'}")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
