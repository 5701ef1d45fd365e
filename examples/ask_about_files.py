"""Asks the embedded checkpoint about files: python examples/ask_about_files.py picture.png "what colour is it?"."""

import sys
from pathlib import Path

from transformers import pipeline

import unimoe

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mpg", ".mpeg", ".gif"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff"),
}
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}

if len(sys.argv) < 2:
    sys.exit(__doc__)
*files, question = sys.argv[1:]
content = []
for file in files:
    suffix = Path(file).suffix.lower()
    if suffix not in KINDS:
        known = "; ".join(f"{kind}: {' '.join(suffixes)}" for kind, suffixes in SUFFIXES.items())
        sys.exit(f"{file}: the suffix {suffix!r} does not tell what it is; known are {known}.")
    content.append({"type": KINDS[suffix], "path": file})
content.append({"type": "text", "text": question})
pipe = pipeline("any-to-text", model=unimoe.tiny_checkpoint())
answer = pipe([{"role": "user", "content": content}], return_full_text=False)
print(answer[0]["generated_text"])
