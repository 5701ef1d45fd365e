"""Scripts that replace files in the project leave them alone where their command line is wrong."""

import sys

import pytest

import unimoe.demo
from scripts import golden_subset
from scripts.tiny import demo_media


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nowhere"]])
def test_golden_subset_keeps_what_it_cannot_make_anew(tmp_path, monkeypatch, arguments):
    kept = tmp_path / "golden" / "cases.json"
    kept.parent.mkdir()
    kept.touch()
    monkeypatch.setattr(golden_subset, "TARGET", kept.parent)
    monkeypatch.setattr(sys, "argv", ["golden_subset.py", *arguments])
    with pytest.raises(SystemExit):
        golden_subset.main()
    assert kept.exists()


def test_help_of_demo_media_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(unimoe.demo, "DEMO_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo_media.py", "--help"])
    with pytest.raises(SystemExit):
        demo_media.main()
    assert not list(tmp_path.iterdir())
