"""`make demo`: asks the embedded checkpoint about the files beside it, and fails if an answer is wrong."""

import json
import sys
import time
from pathlib import Path
from typing import Any

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"
# No right answer is longer, and a model that does not stop shall not keep the user waiting.
LONGEST_ANSWER = 16


def read_questions(folder: Path = DEMO_FOLDER) -> list[dict[str, Any]]:
    """The questions of `questions.json`: each with its `files` (type and name, in order), `question` and `answer`."""
    return json.loads((folder / "questions.json").read_text(encoding="utf-8"))


def conversation(entry: dict[str, Any], folder: Path = DEMO_FOLDER) -> list[dict[str, Any]]:
    """The chat that asks one of them."""
    content = [{"type": file["type"], "path": str(folder / file["name"])} for file in entry["files"]]
    if entry["question"]:
        content.append({"type": "text", "text": entry["question"]})
    return [{"role": "user", "content": content}]


def _row(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (38, 34, 22, 22, 9))).rstrip()


def main() -> int:
    """Prints each question, the answer, the right answer and the time. Returns 0 if all are right, else 1."""
    started = time.perf_counter()
    from transformers import pipeline
    from transformers.utils import logging

    import unimoe

    logging.disable_progress_bar()
    pipe = pipeline("any-to-text", model=unimoe.tiny_checkpoint())
    pipe.model.eval()
    print(f"checkpoint: {pipe.model.num_parameters():,} parameters, ready in {time.perf_counter() - started:.1f} s\n")
    questions = read_questions()
    print(_row("files", "question", "answer", "right answer", "time"))
    answers = []
    for entry in questions:
        asked = time.perf_counter()
        result = pipe(conversation(entry), max_new_tokens=LONGEST_ANSWER, return_full_text=False)
        answer = result[0]["generated_text"].strip()
        seconds = time.perf_counter() - asked
        files = " + ".join(file["name"] for file in entry["files"])
        mark = "" if answer == entry["answer"] else "  <- WRONG"
        print(_row(files, entry["question"] or "(spoken)", answer, entry["answer"], f"{seconds:.2f} s") + mark)
        answers.append(answer)
    asked = time.perf_counter()
    results = pipe(
        [conversation(entry) for entry in questions],
        max_new_tokens=LONGEST_ANSWER,
        return_full_text=False,
        batch_size=len(questions),
    )
    batched = [result[0]["generated_text"].strip() for result in results]
    print(f"\nall {len(questions)} as one batch: {time.perf_counter() - asked:.2f} s, ", end="")
    print("the same answers" if batched == answers else f"OTHER ANSWERS: {batched}")
    right = sum(answer == entry["answer"] for answer, entry in zip(answers, questions))
    print(f"{right} of {len(questions)} right, {time.perf_counter() - started:.1f} s in all")
    return 0 if right == len(questions) and batched == answers else 1


if __name__ == "__main__":
    sys.exit(main())
