"""Asks the embedded checkpoint about files: python examples/ask_about_files.py picture.png "what colour is it?"."""

import sys

from transformers import pipeline

import unimoe

KINDS = {".png": "image", ".jpg": "image", ".webp": "image", ".mp4": "video", ".webm": "video", ".wav": "audio"}

*files, question = sys.argv[1:]
content = [{"type": KINDS["." + file.rsplit(".", 1)[-1].lower()], "path": file} for file in files]
content.append({"type": "text", "text": question})
pipe = pipeline("any-to-text", model=unimoe.tiny_checkpoint())
answer = pipe([{"role": "user", "content": content}], return_full_text=False)
print(answer[0]["generated_text"])
