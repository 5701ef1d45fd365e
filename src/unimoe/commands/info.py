"""`unimoe info`: what a checkpoint folder holds, told from its configuration alone."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("info", help="print the architecture of a checkpoint folder")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that lies in the folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not (Path(args.folder) / "config.json").is_file():
        raise ValueError(f"{args.folder}: no config.json there; give a checkpoint folder")
    from transformers import AutoConfig

    import unimoe  # noqa: F401  (registers the configuration)

    from ..architecture import describe

    config = AutoConfig.from_pretrained(args.folder, trust_remote_code=args.trust_remote_code or None)
    if config.model_type != "unimoe":
        raise ValueError(f"{args.folder}: a {config.model_type!r} checkpoint, not a UniMoE one; convert it first")
    print(describe(config))
    return 0
