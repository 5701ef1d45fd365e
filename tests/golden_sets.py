"""Where recorded outputs of the original systems lie: a full copy beside the project, else the small subset in it."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBSET = ROOT / "tests" / "fixtures" / "golden"
# GOLDEN_SETS points the tests at another folder of sets.
CHOSEN = os.environ.get("GOLDEN_SETS")
FOLDERS = [Path(CHOSEN).resolve()] if CHOSEN else [ROOT.parent / "shared" / "golden", SUBSET]


def find_set(name: str) -> Path | None:
    """The `public` folder of a set, None where no copy of it exists."""
    return next((folder / name / "public" for folder in FOLDERS if (folder / name / "public").is_dir()), None)


def left_out(error: BaseException) -> str | None:
    """What a test missed, if it is something that the subset was made without (`left_out.json`)."""
    if next(folder for folder in FOLDERS if folder.is_dir()) != SUBSET:
        return None
    names = json.loads((SUBSET / "left_out.json").read_text())
    if isinstance(error, KeyError):
        return error.args[0] if error.args[0] in names else None
    # Names of cases are plain words; those of tensors and files cannot stand in a message by chance.
    words = str(error)
    return next((name for name in names if ("." in name or "/" in name) and name in words), None)
