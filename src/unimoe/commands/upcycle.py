"""`unimoe upcycle`: a dense checkpoint folder to a sparse one."""

import argparse
from pathlib import Path

PARTS = ("text", "vision", "connector")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "upcycle",
        help="make a dense checkpoint sparse: experts as copies of its FFNs, or from several checkpoints",
        description="Every expert is an exact copy of its layer's FFN under a new router, so the sparse model first answers as "
        "the dense one. With --expert, given once an expert, the decoder's experts are the FFNs of those checkpoints instead.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="dense checkpoint folder")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the new folder")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["text"], help="what becomes sparse (default: text)"
    )
    parser.add_argument("--layers", default="even", help="of the decoder: all, even, odd, first_half or second_half, or numbers "
                        "with commas between (default: even)")  # fmt: skip
    parser.add_argument("--vision-layers", default="all", help="the same of the vision encoder (default: all)")
    parser.add_argument(
        "--num-experts", metavar="N", type=int, help="experts per sparse layer (default: 4, or one for each --expert)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=2, help="experts per token (default: 2)")
    parser.add_argument(
        "--expert", metavar="DIR", type=Path, action="append", default=[], help="checkpoint of an expert"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new routers (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is in the output folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Upcycles. Raises ValueError or OSError, with a message for the user, for whatever cannot be done."""
    from transformers import AutoProcessor

    from ..conversion.folder import copy_code
    from ..conversion.writer import check_inputs, check_output
    from ..modeling_unimoe.modeling_unimoe import UniMoEForConditionalGeneration
    from ..upcycling import upcycle

    if not (args.folder / "config.json").is_file():
        raise ValueError(f"{args.folder}: no config.json there; give a checkpoint folder")
    check_inputs(args.output, [args.folder, *args.expert])
    check_output(args.output, args.overwrite)
    _check_experts(args)
    counts = {"num_experts": 4 if args.num_experts is None else args.num_experts, "top_k": args.top_k}
    settings = {"text": {"layers": _layers(args.layers), **counts}, "connector": counts}
    settings["vision"] = {"layers": _layers(args.vision_layers), **counts}
    if args.expert:
        from ..training.upcycling import assemble_experts

        model = assemble_experts(
            args.folder, args.expert, layers=settings.pop("text")["layers"], top_k=args.top_k, seed=args.seed
        )
    else:
        model = UniMoEForConditionalGeneration.from_pretrained(args.folder, dtype="auto")
    chosen = {name: settings[name] for name in args.parts if name in settings}
    if chosen:
        upcycle(model, **chosen, seed=args.seed)
    model.save_pretrained(args.output)
    if (args.folder / "processor_config.json").is_file():
        AutoProcessor.from_pretrained(args.folder, trust_remote_code=False).save_pretrained(args.output)
    if any(args.folder.glob("*.py")):
        copy_code(args.output)
    print(f"sparse now: {', '.join(args.parts)}; in {args.output}")
    return 0


def _check_experts(args: argparse.Namespace) -> None:
    if not args.expert:
        return
    if "text" not in args.parts:
        raise ValueError("--expert gives experts of the decoder, so --parts must hold text")
    # With other parts beside the decoder, --num-experts counts theirs.
    if set(args.parts) == {"text"} and args.num_experts not in (None, len(args.expert)):
        raise ValueError(
            f"--num-experts {args.num_experts}: --expert is given {len(args.expert)} times, once for each expert; leave "
            "--num-experts out, or give as many --expert"
        )


def _layers(text: str) -> str | list[int]:
    numbers = text.split(",")
    return [int(number) for number in numbers] if all(number.strip().isdigit() for number in numbers) else text
