"""Shards as Transformers reads them, little memory, and a folder that is whole or not there."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from unimoe.conversion import writer
from unimoe.conversion.errors import ConversionError
from unimoe.conversion.reader import SourceTensor, read_weights
from unimoe.conversion.writer import new_folder, parse_size, write_weights


def source(name, value):
    return SourceTensor(Path("weights.bin"), name, tuple(value.shape), value.dtype, loaded=value)


@pytest.fixture
def values():
    torch.manual_seed(0)
    return {f"layer.{i}": torch.randn(10, 25) for i in range(6)} | {"scalar": torch.tensor(2.0)}


@pytest.fixture
def targets(values):
    return {name: source(name, value) for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size, shards", [(10**9, 1), (2500, 3)])
def test_shards_hold_the_tensors(tmp_path, targets, values, dtype, size, shards):
    size = size * dtype.itemsize // 4 if shards > 1 else size
    total = write_weights(targets, tmp_path, dtype, size, progress=False)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    assert (files[0].name == "model.safetensors") == (shards == 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total == sum(value.numel() for value in values.values()) * dtype.itemsize
    assert index["weight_map"].keys() == values.keys()
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert tensor.dtype == dtype and torch.equal(tensor, values[name].to(dtype))
    assert read_weights(tmp_path).keys() == values.keys()


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("10B", 10)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5 pounds"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_the_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "made" / "model"
    with new_folder(output, 10) as folder:
        (folder / "config.json").write_text("{}")
        assert not output.exists()
    assert (output / "config.json").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "model", 10) as folder:
        (folder / "config.json").write_text("{}")
        raise KeyError("unforeseen")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    for name in ("model.incomplete", "model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("old")
    with new_folder(tmp_path / "model", 10) as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwriting(tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    with new_folder(output, 10) as folder:
        (folder / "config.json").write_text("1")
    with pytest.raises(ConversionError, match="exists already; pass --overwrite"), new_folder(output, 10):
        pass
    with new_folder(output, 10, overwrite=True) as folder:
        (folder / "config.json").write_text("2")
        assert (output / "config.json").read_text() == "1"
    assert (output / "config.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwrite_spares_what_is_no_checkpoint(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ConversionError, match="not a checkpoint folder"),
        new_folder(tmp_path / "home", 10, overwrite=True),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConversionError, match="a file, not a folder"),
        new_folder(tmp_path / "file", 10, overwrite=True),
    ):
        pass
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("output", ["/proc/unimoe/model", "FILE/model"])
def test_a_place_that_cannot_be_written_to(tmp_path, output):
    (tmp_path / "file").write_text("")
    output = Path(output.replace("FILE", str(tmp_path / "file")))
    with pytest.raises(ConversionError, match=r"model: cannot write there \(.+\); choose another --output"):
        with new_folder(output, 10):
            pass


def test_too_little_room_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConversionError, match=r"2\.06 GB are needed, 1\.00 kB are free"):
        with new_folder(tmp_path / "model", 2 * 10**9):
            raise AssertionError("must not be reached")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path, targets):
    """A limit on the size of files stands in for the full disk: the system call fails alike, half way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(
            ConversionError, match=r"model: writing failed \(File too large\); nothing was left behind"
        ):
            with new_folder(tmp_path / "model", 10) as folder:
                write_weights(targets, folder, torch.float32, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_no_space_left_is_named(tmp_path, targets, monkeypatch):
    def full(out, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "_write_all", full)
    with pytest.raises(ConversionError, match="No space left on device"), new_folder(tmp_path / "model", 10) as folder:
        write_weights(targets, folder, torch.float32, progress=False)
    assert not list(tmp_path.iterdir())


STREAMING = """
import resource, sys, torch
from pathlib import Path
from unimoe.conversion.expressions import Stack
from unimoe.conversion.reader import read_file
from unimoe.conversion.writer import write_weights
folder = Path(sys.argv[1])
tensors = list(read_file(folder / "weights.bin").values())
targets = {f"t.{i}": Stack(tensors[i : i + 2]) for i in range(0, len(tensors), 2)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_weights(targets, folder, torch.float16, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_one_tensor(tmp_path):
    """400 MB through a process that grows by about one of the 20 MB targets."""
    torch.save({f"w.{i}": torch.zeros(5_000_000, dtype=torch.float32) for i in range(20)}, tmp_path / "weights.bin")
    run = subprocess.run([sys.executable, "-c", STREAMING, tmp_path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100_000_000


SLOW = """
import sys, time
from unimoe.conversion import writer
from unimoe.cli import main
write = writer._write_all
def slowly(out, data):
    write(out, data)
    time.sleep(0.05)
writer._write_all = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("moment", ["small files", "weights"])
def test_kill_and_rerun(tmp_path, moment):
    """kill -9 while writing leaves nothing that loads; the same command then runs clean."""
    from uni_moe_sets import BY_NAME, arguments, is_there

    variant = BY_NAME["unimoe_speech-cases_e2"]
    if not is_there(variant):
        pytest.skip("the set is not there")
    output, partial = tmp_path / "model", tmp_path / "model.incomplete"
    command = ["convert", "uni-moe", *arguments(variant), "--output", str(output), "--max-shard-size", "300KB"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stdout=subprocess.DEVNULL)
    wanted = "config.json" if moment == "small files" else "model-00002-of-*.safetensors"
    while not list(partial.glob(wanted)):
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and partial.exists()
    with pytest.raises(Exception):  # noqa: B017 (which error depends on how far it had come)
        from unimoe import UniMoEForConditionalGeneration

        UniMoEForConditionalGeneration.from_pretrained(partial)
    rerun = subprocess.run([sys.executable, "-m", "unimoe", *command], capture_output=True, text=True)
    assert rerun.returncode == 0, rerun.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    UniMoEForConditionalGeneration.from_pretrained(output)
