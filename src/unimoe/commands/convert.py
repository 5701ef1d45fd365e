"""`unimoe convert`: original checkpoints to folders that Transformers loads."""

import argparse
import os
import sys
from pathlib import Path

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("convert", help="convert an original checkpoint to a folder for Transformers")
    families = parser.add_subparsers(dest="family", required=True)
    uni_moe = families.add_parser(
        "uni-moe",
        help="Uni-MoE v1: audio, speech (e2, v1.5) and eight-expert releases",
        description="Converts a Uni-MoE v1 release. Which one it is, is told by the files themselves. With --base and "
        "--checkpoint given twice, for an audio and a speech release whose decoders are equal, one model with both sound "
        "towers is made.",
    )
    for option, help in (
        ("--base", "folder of the base: decoder shards and tokenizer"),
        ("--checkpoint", "fine-tuned folder: adapter, gates, aligner"),
    ):
        uni_moe.add_argument(option, metavar="DIR", type=_path, required=True, action="append", help=help)
    _add_path(uni_moe, "--vision-tower", "DIR", "CLIP folder", required=True)
    _add_path(uni_moe, "--audio-tower", "FILE.pt", "BEATs file, for audio models")
    _add_path(uni_moe, "--speech-tower", "DIR", "Whisper folder, for speech models")
    _add_path(uni_moe, "--experts", "DIR", "folder of expert files, for the eight-expert model")
    uni_moe.add_argument(
        "--qformer-num-attention-heads",
        metavar="N",
        type=int,
        help="heads of the audio model's Q-Former, which no file tells (default: its width / 64)",
    )
    _add_common(uni_moe)
    uni_moe.set_defaults(run=run, plan=_plan_uni_moe)
    cumo = families.add_parser(
        "cumo",
        help="CuMo: Mistral and Mixtral, final and second-stage checkpoints",
        description="Converts a CuMo checkpoint. Which one it is, is told by its config.json.",
    )
    _add_path(cumo, "--checkpoint", "DIR", "checkpoint folder: all weights and the tokenizer", required=True)
    _add_path(cumo, "--vision-tower", "DIR", "CLIP folder, for its settings alone", required=True)
    _add_common(cumo, dtype="bfloat16")
    cumo.set_defaults(run=run, plan=_plan_cumo)
    moe_llava = families.add_parser(
        "moe-llava",
        help="MoE-LLaVA: StableLM, Qwen, Phi and OpenChat, of any of its three stages",
        description="Converts a MoE-LLaVA checkpoint. Which one it is, is told by its config.json and its files.",
    )
    _add_path(moe_llava, "--checkpoint", "DIR", "checkpoint folder of any stage", required=True)
    _add_path(moe_llava, "--vision-tower", "DIR", "CLIP or SigLIP folder", required=True)
    _add_path(moe_llava, "--base", "DIR", "the decoder's own folder, for a first-stage projector")
    _add_common(moe_llava)
    moe_llava.set_defaults(run=run, plan=_plan_moe_llava)


def _add_path(parser: argparse.ArgumentParser, option: str, metavar: str, help: str, required: bool = False) -> None:
    parser.add_argument(option, metavar=metavar, type=_path, required=required, help=help)


def _path(text: str) -> Path:
    """With a leading `~` replaced, which shells leave alone in `--option=~/folder`."""
    return Path(os.path.expanduser(text))


def _add_common(parser: argparse.ArgumentParser, dtype: str = "float16") -> None:
    _add_path(parser, "--output", "DIR", "the new folder", required=True)
    _add_path(
        parser,
        "--tokenizer",
        "DIR",
        "folder of the decoder's tokenizer, taken instead of the checkpoint's own; needed only where that has none",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype, help=f"of the stored weights (default: {dtype}, as the originals')"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, default="5GB", help="largest file of weights (default: 5GB)"
    )
    parser.add_argument("--no-remote-code", action="store_true", help="leave the code out of the folder")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished folder to this repository")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is in the output folder")


def _size(text: str) -> int:
    from ..conversion.writer import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Plans and converts. Raises ConversionError, with a message for the user, for whatever cannot be done."""
    from ..conversion.convert import convert

    conversion = args.plan(args)
    report = convert(
        conversion,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        remote_code=not args.no_remote_code,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        push_to_hub=args.push_to_hub,
        progress=sys.stderr.isatty(),
    )
    print(report)
    return 0


def _plan_uni_moe(args: argparse.Namespace):
    from ..conversion.errors import ConversionError
    from ..conversion.uni_moe import UniMoEPaths, plan_uni_moe
    from ..conversion.uni_moe_joined import plan_joined_uni_moe

    if len(args.base) != len(args.checkpoint) or len(args.base) > 2:
        raise ConversionError(
            f"--base is given {len(args.base)} times and --checkpoint {len(args.checkpoint)} times; give each once, or each "
            "twice to join an audio and a speech release"
        )
    releases = [
        UniMoEPaths(
            base=base,
            checkpoint=checkpoint,
            vision_tower=args.vision_tower,
            audio_tower=args.audio_tower,
            speech_tower=args.speech_tower,
            experts=args.experts,
            qformer_num_attention_heads=args.qformer_num_attention_heads,
            tokenizer=args.tokenizer,
        )
        for base, checkpoint in zip(args.base, args.checkpoint)
    ]
    return plan_joined_uni_moe(*releases) if len(releases) == 2 else plan_uni_moe(*releases)


def _plan_cumo(args: argparse.Namespace):
    from ..conversion.cumo import CuMoPaths, plan_cumo

    paths = CuMoPaths(checkpoint=args.checkpoint, vision_tower=args.vision_tower, tokenizer=args.tokenizer)
    return plan_cumo(paths)


def _plan_moe_llava(args: argparse.Namespace):
    from ..conversion.moe_llava import MoELLaVAPaths, plan_moe_llava

    paths = MoELLaVAPaths(
        checkpoint=args.checkpoint, vision_tower=args.vision_tower, base=args.base, tokenizer=args.tokenizer
    )
    return plan_moe_llava(paths)
