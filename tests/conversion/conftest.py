"""Converted checkpoints, each made once a session."""

import pytest
import torch
from uni_moe_sets import BY_NAME, arguments, is_there, read_tensors

from unimoe.cli import main


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function from a variant's name to the folder that `unimoe convert` has made of it, in float32."""
    folders = {}

    def convert(name: str):
        variant = BY_NAME[name]
        if not is_there(variant):
            pytest.skip(f"{variant.checkpoint} is in none of the golden sets here")
        if name not in folders:
            output = tmp_path_factory.mktemp("converted") / name
            args = ["convert", "uni-moe", *arguments(variant), "--output", str(output), "--dtype", "float32"]
            assert main(args) == 0
            folders[name] = output
        return folders[name]

    return convert


@pytest.fixture(scope="session")
def loaded(converted):
    """A function from a variant's name to its model, processor and recorded tensors."""
    parts = {}

    def load(name: str):
        if name not in parts:
            from transformers import AutoModelForMultimodalLM, AutoProcessor

            folder = converted(name)
            model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=False).eval()
            assert model.dtype == torch.float32
            parts[name] = (model, AutoProcessor.from_pretrained(folder), read_tensors(BY_NAME[name]))
        return parts[name]

    return load
