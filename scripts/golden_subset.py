"""Makes tests/fixtures/golden, the part of the golden sets that a plain clone tests against, from the full sets.

`python scripts/golden_subset.py path/to/golden`. What is left out is listed in `left_out.json`, by which the tests know it.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

TARGET = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "golden"
# Per set: files to leave out, and the cases (first part of a tensor's name) to keep of each file of cases.
LEAVE_OUT = {
    "unimoe_audio": r"long_31s\.wav|Uni-MoE-audio-base/mm_.*",
    "unimoe_speech": r"cases_v1\.5.*|.*-interval/.*|.*-v1\.5/.*|long\.wav|.*base/mm_.*",
}
KEEP_CASES = {
    "unimoe_audio": r"text|image|video|audio|audio_resampled|component_.*|merged|_.*",
    "unimoe_speech": r"text|image_gray|speech_short|moe_block|sample_.|clip_preprocess.*|merged|tower|tokenizer.*|_.*",
}
LEAVE_OUT_TENSORS = r".*official336_uint8"


def copy_set(source: Path, name: str, left_out: list[str]) -> None:
    target = TARGET / name / "public"
    public = source / name / "public"
    for file in sorted(path for path in public.rglob("*") if path.is_file()):
        relative = file.relative_to(public).as_posix()
        if any(re.fullmatch(LEAVE_OUT[name], part) for part in (relative, file.name, relative.split("/", 1)[-1])):
            left_out.append(relative)
            continue
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.name.startswith("cases") and file.suffix == ".safetensors":
            copy_cases(file, copy, KEEP_CASES[name], left_out)
        elif file.name.startswith("cases") and file.suffix == ".json":
            copy_facts(file, copy, KEEP_CASES[name], left_out)
        else:
            shutil.copyfile(file, copy)
    folders = (path.relative_to(public).as_posix() for path in public.rglob("*") if path.is_dir())
    left_out += [folder for folder in folders if not (target / folder).is_dir()]


def copy_cases(file: Path, copy: Path, keep: str, left_out: list[str]) -> None:
    kept = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            if re.fullmatch(keep, name.split(".")[0]) and not re.fullmatch(LEAVE_OUT_TENSORS, name):
                kept[name] = tensors.get_tensor(name)
            else:
                left_out.append(name)
    save_file(kept, copy)


def copy_facts(file: Path, copy: Path, keep: str, left_out: list[str]) -> None:
    """Takes the cases out that are left out; facts about the whole set stay."""
    content = json.loads(file.read_text())
    cases = content.get("cases", content)
    for name, facts in list(cases.items()):
        is_case = isinstance(facts, dict) and {"input_ids", "samples", "seq_len_spliced"} & facts.keys()
        if is_case and not re.fullmatch(keep, name):
            del cases[name]
            left_out.append(name)
    copy.write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="GOLDEN", type=Path, help="folder of the full sets")
    source = parser.parse_args().source
    missing = [name for name in LEAVE_OUT if not (source / name / "public").is_dir()]
    if missing:
        # Asked before the old subset is deleted.
        parser.error(f"{source}: no {missing[0]}/public there")
    shutil.rmtree(TARGET, ignore_errors=True)
    left_out: list[str] = []
    for name in LEAVE_OUT:
        copy_set(source, name, left_out)
    (TARGET / "left_out.json").write_text(json.dumps(sorted(set(left_out)), indent=0))
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
