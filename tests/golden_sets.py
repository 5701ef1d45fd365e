"""Where recorded outputs of the original systems lie: a full copy beside the project, else the small subset in it."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBSET = ROOT / "tests" / "fixtures" / "golden"
# GOLDEN_SETS points the tests at another folder of sets.
FOLDERS = [Path(os.environ["GOLDEN_SETS"])] if "GOLDEN_SETS" in os.environ else [ROOT.parent / "shared/golden", SUBSET]


def find_set(name: str) -> Path | None:
    """The `public` folder of a set, None where no copy of it exists."""
    return next((folder / name / "public" for folder in FOLDERS if (folder / name / "public").is_dir()), None)


def left_out(error: BaseException) -> str | None:
    """What a test missed, if it is something that the subset was made without (`left_out.json`)."""
    if FOLDERS[0] != SUBSET and FOLDERS[0].is_dir():
        return None
    words = str(error)
    return next((name for name in json.loads((SUBSET / "left_out.json").read_text()) if name in words), None)
