"""The page of the benchmarks' results: tables, goals and plots from rows as the benchmarks write them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK_ROWS = [
    {"what": "forward", "case": "float32, 4 experts, 1 tokens", "against": "dense FFN", "ratio": 0.98, "lower_is_better": True, "goal": 1.05, "met": True},
    {"what": "  least", "case": "float32, 4 experts, 1 tokens", "against": "dense FFN", "ratio": 0.9, "lower_is_better": True},
    {"what": "  products", "case": "float32, 4 experts, 1 tokens", "against": "dense FFN", "ratio": 0.49, "lower_is_better": True},
    {"what": "forward", "case": "float32, 4 experts, 1 tokens", "against": "best of Transformers (eager)", "ratio": 2.5, "lower_is_better": False, "goal": 1.0, "met": True},
    {"what": "forward", "case": "float32, 4 experts, 1 tokens", "against": "eager", "ratio": 2.5, "lower_is_better": False},
    {"what": "LoRA training", "case": "float32, 4 experts, 32 tokens", "against": "eager", "ratio": 0.8, "lower_is_better": False, "goal": 1.0, "met": False},
]  # fmt: skip
LOADING_ROWS = [
    {"what": "loading", "case": "warm", "against": "reading the bytes", "ratio": 0.5, "lower_is_better": False}
]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return importlib.import_module("benchmarks.report")


@pytest.fixture
def folder(tmp_path):
    for name, rows, notes in (("sparse_block", BLOCK_ROWS, ["a note"]), ("loading", LOADING_ROWS, [])):
        document = {"benchmark": name, "options": {"full": name == "loading"}, "notes": notes, "rows": rows}
        document["machine"] = {"processor": "made up", "gpu": None, "torch": "2"}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def test_page_is_filled_between_its_marks_and_only_there(report, folder):
    names = ("machine", "goals", "sparse_block", "loading")
    page = folder / "page.md"
    page.write_text("words\n" + "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in names) + "more")
    report.main([str(folder), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("words\n") and text.endswith("more") and "old" not in text
    assert "processor made up, torch 2" in text and "python -m benchmarks.loading --full`" in text
    assert "| 4 | 1 | **0.98** | 0.9 | 0.49 | **2.5** eager | 2.5 |" in text
    assert (
        "took the least time would be 2.72 times" in text and "fastest way that was found, would be 5.00 times" in text
    )
    assert "| sparse_block | forward | dense FFN | ≤ 1.05 | 0.98 | met |" in text
    assert "| LoRA training | float32, 4 experts, 32 tokens | eager | 0.8 (missed) |" in text
    assert "- a note" in text
    report.main([str(folder), "--page", str(page)])
    assert page.read_text() == text


def test_a_page_without_a_place_is_refused(report, folder):
    page = folder / "page.md"
    page.write_text("words")
    with pytest.raises(ValueError, match="<!-- machine -->"):
        report.main([str(folder), "--page", str(page)])
    with pytest.raises(FileNotFoundError, match="no JSON files"):
        report.main([str(folder / "elsewhere")])


def test_plots_compare_with_the_dense_ffn(report, folder):
    (file,) = report.plot(report.read(folder)["sparse_block"], folder)
    assert "eager" in file.read_text() and "4 experts" in file.read_text()


def test_the_page_of_this_project_has_the_numbers_of_its_files(report):
    page = ROOT / "docs" / "performance.md"
    documents = report.read(ROOT / "docs" / "performance")
    pieces = {name: report.results(document) for name, document in documents.items()}
    pieces |= {"machine": report.machines(documents), "goals": report.goals(documents)}
    assert report.fill(page.read_text(), pieces) == page.read_text()
