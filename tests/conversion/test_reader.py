"""Files as lazy tensors: what is read is what was saved, and bad files are refused without running anything."""

import os
import pickle
import tarfile

import pytest
import torch
from safetensors.torch import save_file

from unimoe.conversion.errors import ConversionError
from unimoe.conversion.reader import read_file, read_files, read_json, read_pickle, read_weights


class Code:
    """Unpickles to a call; `marker` would then exist."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    matrix = torch.randn(6, 5)
    return {
        "plain": matrix,
        "transposed": matrix.t(),
        "rows": matrix[2:4],
        "column": matrix[:, 3],
        "parameter": torch.nn.Parameter(matrix.clone()),
        "bfloat16": matrix.bfloat16(),
        "float16": matrix.half(),
        "integers": torch.arange(7),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_give_the_saved_tensors(tmp_path, tensors, zipped):
    file = tmp_path / "weights.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    lazy = read_file(file)
    assert list(lazy) == list(tensors)
    for name, expected in tensors.items():
        assert (lazy[name].shape, lazy[name].dtype, lazy[name].name) == (tuple(expected.shape), expected.dtype, name)
        assert torch.equal(lazy[name].read(), expected)
        out = torch.empty(expected.shape)
        lazy[name].write(out)
        assert torch.equal(out, expected.float())


def test_safetensors_give_the_saved_tensors(tmp_path, tensors):
    saved = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(saved, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    lazy = read_file(tmp_path / "weights.safetensors")
    assert lazy.keys() == saved.keys()
    assert all(torch.equal(lazy[name].read(), saved[name]) for name in saved)


def test_planning_reads_no_weights(tmp_path, monkeypatch):
    """Shapes and dtypes come from 20 MB without 20 MB being read."""
    torch.save({"big": torch.zeros(5_000_000)}, tmp_path / "weights.bin")
    save_file({"big": torch.zeros(5_000_000)}, tmp_path / "weights.safetensors")
    for name in ("weights.bin", "weights.safetensors"):
        before = _bytes_read()
        assert read_file(tmp_path / name)["big"].shape == (5_000_000,)
        assert _bytes_read() - before < 1_000_000


def _bytes_read():
    with open("/proc/self/io") as io:
        return int(next(line for line in io if line.startswith("rchar")).split()[1])


def test_nested_content_keeps_its_form(tmp_path):
    torch.save({"cfg": {"layers": 2, "act": "gelu"}, "model": {"w": torch.ones(2)}}, tmp_path / "beats.pt")
    content = read_pickle(tmp_path / "beats.pt")
    assert content["cfg"] == {"layers": 2, "act": "gelu"}
    assert torch.equal(content["model"]["w"].read(), torch.ones(2))
    with pytest.raises(ConversionError, match="not a dict of tensors"):
        read_file(tmp_path / "beats.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Code(marker)}, tmp_path / "evil.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match=r"evil\.bin: refused, because it holds pickled code \(\w+\.mkdir\)"):
        read_file(tmp_path / "evil.bin")
    assert not marker.exists()


def test_code_in_a_plain_pickle_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"x": Code(marker)}))
    with pytest.raises(ConversionError, match="pickled code"):
        read_file(tmp_path / "evil.bin")
    assert not marker.exists()


def _damage(raw: bytes, how: str) -> bytes:
    if how == "truncated":
        return raw[: len(raw) // 2]
    if how == "empty":
        return b""
    return bytes(range(256)) * 20


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("kind", ["zip.bin", "legacy.bin", "plain.safetensors"])
def test_damaged_files_are_named(tmp_path, kind, how):
    file = tmp_path / kind
    weights = {"a": torch.arange(3000.0), "b": torch.ones(5)}
    if kind.endswith("safetensors"):
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "zip.bin")
    file.write_bytes(_damage(file.read_bytes(), how))
    with pytest.raises(ConversionError, match="truncated or corrupt") as error:
        read_file(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_bit_in_a_bin_file_is_found(tmp_path):
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.arange(3000.0)}, file)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    tensor = read_file(file)["a"]
    for read in (tensor.read, lambda: list(tensor.row_blocks(1000)), lambda: tensor.write(torch.empty(3000).half())):
        with pytest.raises(ConversionError, match="'a' fails its checksum"):
            read()


def test_blocks_of_rows(tmp_path):
    matrix = torch.arange(70.0).view(10, 7)
    torch.save({"a": matrix}, tmp_path / "weights.bin")
    blocks = [(start, rows.clone()) for start, rows in read_file(tmp_path / "weights.bin")["a"].row_blocks(3 * 7 * 4)]
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), matrix)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_what_downloads_leave_instead(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_file(tmp_path / name)


def _tar(file):
    """As the first versions of torch wrote: an archive of three members."""
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "tensors"):
            archive.addfile(tarfile.TarInfo(name))


@pytest.mark.parametrize("content", ["tar", "zeros"])
def test_nothing_recommends_to_run_what_is_in_a_file(tmp_path, content):
    """torch refuses a tar archive with the advice to load it without the safeguard."""
    file = tmp_path / "weights.bin"
    if content == "tar":
        _tar(file)
    else:
        file.write_bytes(bytes(2048))
    with pytest.raises(
        ConversionError, match="a tar archive" if content == "tar" else "truncated or corrupt"
    ) as error:
        read_file(file)
    assert "weights_only" not in str(error.value) and "torch.load" not in str(error.value)


@pytest.mark.parametrize(
    "make, kind",
    [
        (torch.Tensor.to_sparse, r"sparse \(torch.sparse_coo\)"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), r"quantised|truncated or corrupt"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_are_refused(tmp_path, make, kind, is_zip):
    tensor = make(torch.eye(3))
    torch.save({"plain": torch.ones(2), "odd": tensor}, tmp_path / "w.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConversionError, match=rf"w\.bin: (tensor 'odd' is )?({kind})"):
        read_file(tmp_path / "w.bin")


def test_an_index_with_something_else_than_names_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(ConversionError, match=r"index\.json: 'weight_map' has 5 as the file of a"):
        read_weights(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"absent\.bin: no such file"):
        read_file(tmp_path / "absent.bin")
    with pytest.raises(ConversionError, match="not a file"):
        read_file(tmp_path)


def test_weights_of_a_folder(tmp_path):
    """An index decides which shards are read; without one the shards' names do; safetensors come first."""
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"c": torch.ones(2)}, tmp_path / "training_args.bin")
    assert read_weights(tmp_path).keys() == {"a", "b"}
    index = '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00003-of-00003.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ConversionError, match="pytorch_model-00003-of-00003.bin missing, .*; ask there"):
        read_weights(tmp_path, "; ask there")
    save_file({"d": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path).keys() == {"d"}
    with pytest.raises(ConversionError, match="no weights there"):
        read_weights(tmp_path / "elsewhere")


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("one.bin", "two.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ConversionError, match="'a' is in both"):
        read_files([tmp_path / "one.bin", tmp_path / "two.bin"])


@pytest.mark.parametrize("content", ["{", "[1]", "", "[" * 100_000])
def test_json_must_be_an_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConversionError, match="config.json"):
        read_json(tmp_path / "config.json")
