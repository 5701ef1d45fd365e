"""Small files and models that the training tests share."""

import gc
import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from unimoe import UniMoEForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1] / "processing"))
from tiny_processor import RATE, image, sound, tiny_config_for, tiny_processor  # noqa: E402
from training_records import RECORDS  # noqa: E402


@pytest.fixture(autouse=True)
def no_decoders_left():
    """Transformers' video reader leaves its decoders to the garbage collector, which in a forked process, such as a data
    loader's, would wait for ever for their threads: they have stayed in the process of the tests."""
    gc.collect()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory):
    """image0.png ... image3.png, audio.wav, speech.wav, frame0.png, frame1.png, frame2.png."""
    folder = tmp_path_factory.mktemp("media")
    for i in range(4):
        image(i).save(folder / f"image{i}.png")
    for i in range(3):
        image(10 + i).save(folder / f"frame{i}.png")
    soundfile.write(folder / "audio.wav", sound(seed=1), RATE)
    soundfile.write(folder / "speech.wav", sound(seed=2), RATE)
    return folder


@pytest.fixture
def data_file(media_folder, tmp_path):
    """A function that writes records to a JSON file whose media lie in `media_folder`; returns the file."""

    def write(records=None, name="data.json") -> Path:
        path = tmp_path / name
        lines = [json.dumps(record) for record in (RECORDS if records is None else records)]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
        for file in media_folder.iterdir():
            if not (tmp_path / file.name).exists():
                (tmp_path / file.name).symlink_to(file)
        return path

    return write


@pytest.fixture(scope="session")
def make_model(processor):
    """A function that makes a random model for `processor`, always the same; arguments replace those of its config."""

    def make(**overrides) -> UniMoEForConditionalGeneration:
        torch.manual_seed(0)
        config = tiny_config_for(processor)
        for name, value in overrides.items():
            setattr(config, name, value)
        return UniMoEForConditionalGeneration(config)

    return make


@pytest.fixture(scope="session")
def model_folder(make_model, processor, tmp_path_factory):
    """A function that saves such a model with its processor; each of the same name is saved once."""
    saved = {}

    def save(name: str, **overrides) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp("models") / name
            make_model(**overrides).save_pretrained(saved[name])
            processor.save_pretrained(saved[name])
        return saved[name]

    return save
