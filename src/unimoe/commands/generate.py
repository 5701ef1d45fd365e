"""`unimoe generate`: one question about the user's own files, answered on standard output."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MODALITIES = ("image", "audio", "speech", "video")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="answer a question about images, videos, sounds and speech",
        description="Answers one question. Media options may be repeated; items stand before the question in the order "
        "image, audio, speech, video.",
    )
    parser.add_argument("question", help="what to ask; may be empty if a spoken question is given")
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder or repository on the Hub (default: the embedded one)"
    )
    for modality in MODALITIES:
        parser.add_argument(
            f"--{modality}", metavar="FILE", action="append", default=[], help=f"{modality} path or URL"
        )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer, in tokens (default: 256)"
    )
    parser.add_argument("--stream", action="store_true", help="print the answer while it is being generated")
    parser.add_argument(
        "--show-experts", action="store_true", help="then print, to standard error, which experts the tokens went to"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies in the model's folder"
    )
    parser.add_argument("--device", help="device to run on, such as cpu or cuda:0 (default: chosen by Transformers)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the answer. Raises ValueError or OSError, with a message for the user, for whatever cannot be done."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.device is not None:
        check_device(args.device)
    from transformers import pipeline

    import unimoe

    model = args.model or unimoe.tiny_checkpoint()
    if not (Path(model) / "config.json").is_file() and Path(model).exists():
        raise ValueError(f"--model {model}: the folder has no config.json; it must be a checkpoint folder")
    content = [{"type": modality, modality: item} for modality in MODALITIES for item in getattr(args, modality)]
    if args.question:
        content.append({"type": "text", "text": args.question})
    if not content:
        raise ValueError("the question is empty and no file is given")
    pipe = pipeline("any-to-text", model=model, trust_remote_code=args.trust_remote_code or None, device=args.device)
    streamer = _answer_streamer(pipe.processor.tokenizer) if args.stream else None
    with unimoe.record_routing(pipe.model) if args.show_experts else nullcontext() as routing:
        answer = pipe(
            [{"role": "user", "content": content}],
            max_new_tokens=args.max_new_tokens,
            return_full_text=False,
            **({"generate_kwargs": {"streamer": streamer}} if streamer else {}),
        )
    if not args.stream:
        print(answer[0]["generated_text"].strip())
    sys.stdout.flush()
    if routing is not None:
        print(routing, file=sys.stderr)
    return 0


def _answer_streamer(tokenizer: Any) -> Any:
    """Prints an answer while it grows, without the blank that stands between it and the prompt."""
    from transformers import TextStreamer

    class AnswerStreamer(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(text)
            super().on_finalized_text(text, stream_end)

    return AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def check_device(name: str) -> None:
    """Raises ValueError, naming the devices that there are, where PyTorch cannot compute on the device `name` here."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = ["cpu"]
    if accelerator is not None:
        usable += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: PyTorch knows no such device; use {' or '.join(usable)}") from None
    # Without an index, an accelerator's current device is meant.
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in usable:
        raise ValueError(f"--device {name}: PyTorch finds no such device here; use {' or '.join(usable)}")
