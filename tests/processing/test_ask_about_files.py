"""The example that asks about files."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import unimoe

EXAMPLE = Path(__file__).parents[2] / "examples" / "ask_about_files.py"
DEMO = Path(unimoe.__file__).parent / "assets" / "demo"


def ask(*arguments):
    return subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_files_of_usual_suffixes(tmp_path):
    Image.open(DEMO / "picture.png").convert("RGB").save(tmp_path / "photo.JPEG")
    result = ask(tmp_path / "photo.JPEG", DEMO / "siren.wav", "what colour is it?")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


@pytest.mark.parametrize("name", ["notes.txt", "photo"])
def test_other_suffixes_are_refused(name):
    result = ask(name, "what colour is it?")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{name}: the suffix ") and ".jpeg" in result.stderr and ".m4a" in result.stderr
    assert "Traceback" not in result.stderr
