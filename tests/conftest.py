"""Where the golden data of the original systems lies, and settings that every test shares."""

import os
from pathlib import Path

# Set before the first import of Transformers: no test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_FOLDERS = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "fixtures" / "golden")


@pytest.fixture(scope="session")
def golden():
    """A function from a set's name ("unimoe_audio") to its folder; skips the test where no copy of the set exists."""

    def find(name: str) -> Path:
        for folder in GOLDEN_FOLDERS:
            if (folder / name / "public").is_dir():
                return folder / name / "public"
        pytest.skip(f"golden set {name} is in none of: {', '.join(map(str, GOLDEN_FOLDERS))}")

    return find
