"""How long does converting a checkpoint take, against copying its bytes, and how much memory?

The checkpoint is made by `scripts/measure_conversion.py`: random weights under the names of the Uni-MoE audio release. The
short form makes it narrower and shallower; `--full` has the official width.
"""

import importlib.util
import shutil
import statistics
import tempfile
from pathlib import Path
from types import ModuleType

from .common import Report, arguments

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "measure_conversion.py"
# Sizes of the short form: constants of the script.
NARROW = {"HIDDEN": 1024, "INTERMEDIATE": 2816, "VISION_LAYERS": 4, "SOUND_LAYERS": 2}
TINY = {
    "HIDDEN": 64,
    "INTERMEDIATE": 96,
    "VOCABULARY": 100,
    "VISION": 64,
    "VISION_FFN": 64,
    "VISION_LAYERS": 1,
    "SOUND_LAYERS": 2,
}
# The interpreter and its libraries take more than this checkpoint.
SMALL_BYTES = 4e9


def generator(sizes: dict[str, int]) -> ModuleType:
    """The script as a module of its own, with other sizes."""
    spec = importlib.util.spec_from_file_location("release_generator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in sizes.items():
        setattr(module, name, value)
    module.BEATS_SETTINGS["encoder_layers"] = module.SOUND_LAYERS
    return module


def rows(report: Report, script: ModuleType, num_layers: int, dtype: str, folder: Path, rounds: int) -> None:
    release = folder / "release"
    options = script.write_release(release, num_layers)
    size = sum(path.stat().st_size for path in release.rglob("*") if path.is_file())
    copies, conversions, peaks = [], [], []
    for _ in range(rounds):
        copies.append(script.copy(release, folder / "copy"))
        shutil.rmtree(folder / "copy")
        peak, seconds, _ = script.convert(options, folder / "converted", dtype)
        shutil.rmtree(folder / "converted")
        conversions.append(seconds)
        peaks.append(peak)
    case = f"{size / 1e9:.2f} GB, {num_layers} layers of width {script.HIDDEN}, to {dtype}"
    report.add("conversion", case, "a plain copy", statistics.median(copies) / statistics.median(conversions))
    if size > SMALL_BYTES:
        peak = statistics.median(peaks)
        report.add("memory of conversion", case, "the checkpoint's bytes", peak / size, lower_is_better=True)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--folder", type=Path, help="where to write; --full needs 15 GB there")
    parser.add_argument("--tiny", action="store_true", help="a tiny checkpoint: whether it runs, not how fast")
    args = parser.parse_args(argv)
    report = Report("conversion", "How fast is a checkpoint converted?", args)
    forms = [(TINY if args.tiny else NARROW, 2)] + ([(NARROW, 4), ({}, 4)] if args.full else [])
    for sizes, num_layers in forms:
        for dtype in ("float16", "float32") if args.full else ("float16",):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                rows(report, generator(sizes), num_layers, dtype, Path(folder), args.rounds)
    return report.finish()


if __name__ == "__main__":
    main()
