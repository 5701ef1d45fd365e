"""Runs a planned conversion: weights and small files into a new folder, and from there to the Hub if asked for."""

import os
from pathlib import Path

import torch

from .family import Conversion
from .folder import build_processor, write_small_files
from .hub import create_repository, upload
from .plan import files_of, format_bytes
from .tokenizer import NO_TOKENIZER, load_tokenizer
from .writer import check_inputs, check_output, new_folder, write_weights

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def convert(
    conversion: Conversion,
    output: Path,
    dtype: str = "float16",
    max_shard_size: int = 5 * 1000**3,
    remote_code: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    progress: bool = True,
) -> str:
    """Writes a checkpoint folder.

    Args:
        conversion: From one of the families' readers.
        output: The folder, which must not exist unless `overwrite`.
        dtype: Of the stored weights: "float16", "bfloat16" or "float32".
        max_shard_size: Of a file of weights, in bytes.
        remote_code: Whether the folder shall load without this package.
        overwrite: Replace a checkpoint that is there.
        dry_run: Only tell what would be done.
        push_to_hub: A repository to upload the finished folder to.
        progress: Whether to show a bar on standard error.

    Returns:
        A text for people: the plan in a dry run, else what was written.

    Raises:
        ConversionError: An input is bad, or the output cannot be written; nothing is left behind then.
    """
    output = Path(os.path.expanduser(output)).absolute()
    stored = DTYPES[dtype]
    num_bytes = conversion.plan.num_bytes(stored)
    check_inputs(output, [*conversion.inputs.values(), *files_of(conversion.plan)])
    tokenizer = load_tokenizer(conversion)
    processor = build_processor(conversion, tokenizer) if tokenizer is not None else None
    if processor is None:
        conversion.notes.append(NO_TOKENIZER)
    if dry_run:
        notes = [f"note: {note}" for note in conversion.notes]
        return "\n".join([f"{conversion.title} -> {output}", conversion.plan.describe(stored), *notes])
    check_output(output, overwrite)
    address = create_repository(push_to_hub) if push_to_hub is not None else None
    with new_folder(output, num_bytes, overwrite) as folder:
        write_small_files(conversion, processor, folder, stored, remote_code, push_to_hub or output.name)
        write_weights(conversion.plan.targets, folder, stored, max_shard_size, progress)
    lines = [f"{conversion.title}: {format_bytes(num_bytes)} of {dtype} weights in {output}"]
    lines += [f"note: {note}" for note in conversion.notes]
    if push_to_hub is not None:
        upload(output, push_to_hub)
        lines.append(f"uploaded to {address}")
    return "\n".join(lines)
