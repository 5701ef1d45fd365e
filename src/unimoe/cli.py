"""The console command `unimoe`. Exit status: 0 done, 1 refused with one line on standard error, 2 wrong usage."""

import argparse
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from .commands import convert, generate, info, train, upcycle

COMMANDS = (generate, convert, upcycle, train, info)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unimoe", description="Sparse mixture-of-experts multimodal LLMs.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("unimoe: interrupted", file=sys.stderr)
    except (ValueError, OSError, ImportError) as error:
        # The first line says what is wrong; Transformers appends paragraphs to some of its messages. A few errors have none.
        reason = str(error).strip() or type(error).__name__
        print(f"unimoe {args.command}: {reason.splitlines()[0]}", file=sys.stderr)
    except SafetensorError as error:
        # It names neither the file nor what to do.
        remedy = "copy or download the checkpoint again"
        print(
            f"unimoe {args.command}: a safetensors file is cut short or damaged ({error}); {remedy}", file=sys.stderr
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
