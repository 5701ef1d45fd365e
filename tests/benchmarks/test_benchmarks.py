"""Every benchmark runs at a tiny size and writes its rows; how fast is not asked here."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "router": ["--rounds", "1", "--tokens", "2", "--num-experts", "4"],
    "sparse_block": [
        "--rounds",
        "1",
        "--hidden-size",
        "64",
        "--intermediate-size",
        "128",
        "--num-experts",
        "4",
        "--tokens",
        "9",
    ],
    "products": ["--rounds", "1", "--hidden-size", "64", "--intermediate-size", "128", "--tokens", "1", "4"],
    "generation": ["--tiny", "--rounds", "1", "--tokens", "4", "--original-tokens", "3"],
    "decode_step": ["--tiny", "--rounds", "1", "--tokens", "4"],
    "scaling": ["--tiny", "--rounds", "1"],
    "loading": ["--tiny", "--rounds", "1"],
    "conversion": ["--tiny", "--rounds", "1"],
    "memory": ["--tiny"],
    "preprocessing": ["--tiny", "--rounds", "1", "--seconds", "0.5", "--video-seconds", "2"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


@pytest.fixture(autouse=True)
def one_process(importable, monkeypatch):
    """A process a measure takes longer than all the rest; here their tasks run in this one, with made-up peaks."""
    memory = importlib.import_module("benchmarks.memory")
    peaks = itertools.count(1)

    def measure(*task):
        memory.child(*task)
        return {"loading": next(peaks) * 10**9, "generating": next(peaks) * 10**9}

    monkeypatch.setattr(memory, "measure", measure)


@pytest.mark.parametrize("name", TINY)
def test_rows_are_written(name, tmp_path):
    file = tmp_path / "results" / f"{name}.json"
    rows = importlib.import_module(f"benchmarks.{name}").main([*TINY[name], "--json", str(file)])
    document = json.loads(file.read_text())
    assert document["rows"] == rows and rows
    assert document["benchmark"] == name and document["machine"]["torch"]
    for row in rows:
        assert row["ratio"] > 0 and {"what", "case", "against", "lower_is_better"} <= set(row)


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.__main__").main(["nonsense"])
    assert "no benchmark named nonsense" in capsys.readouterr().err
