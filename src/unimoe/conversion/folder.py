"""The small files of a converted folder: configuration, generation settings, processor with tokenizer, code, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import modeling_unimoe, processing
from ..architecture import describe
from ..processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from ..processing.processing_unimoe import UniMoEProcessor
from .errors import ConversionError
from .family import Conversion
from .model_card import model_card
from .reader import read_json
from .settings import naming

ARCHITECTURE = "UniMoEForConditionalGeneration"
IMAGE_PROCESSORS = {"clip_vision_model": CLIPImageProcessorPil, "siglip_vision_model": SiglipImageProcessorPil}


def build_processor(conversion: Conversion, tokenizer: PreTrainedTokenizerBase) -> UniMoEProcessor:
    """The processor whose token counts are those of the model. Raises ConversionError where a part cannot be loaded."""
    config = conversion.config
    image_processor = None
    if config.vision_config is not None:
        file = conversion.image_processor_folder / "preprocessor_config.json"
        read_json(file)
        with naming(file):
            image_processor = IMAGE_PROCESSORS[config.vision_config.model_type].from_pretrained(file.parent)
            size = dict((image_processor.crop_size if image_processor.do_center_crop else image_processor.size) or {})
        if [size.get(side) for side in ("height", "width")] != [config.vision_config.image_size] * 2:
            raise ConversionError(
                f"{file}: makes images of the size {size or None}, the tower takes {config.vision_config.image_size}; the files "
                "do not belong together"
            )
    has_sound = config.audio_config is not None or config.speech_config is not None
    return UniMoEProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        feature_extractor=UniMoEFeatureExtractor(**(conversion.feature_extractor or {})) if has_sound else None,
        num_image_tokens=config.num_image_tokens,
        num_video_tokens=config.num_image_tokens,
        num_audio_tokens=config.num_audio_tokens,
        num_speech_tokens=config.num_speech_tokens,
        image_aspect_ratio=conversion.image_aspect_ratio,
        max_length=conversion.max_length or config.text_config.max_position_embeddings,
        chat_template=conversion.chat_template,
    )


def write_small_files(
    conversion: Conversion,
    processor: UniMoEProcessor | None,
    folder: Path,
    dtype: torch.dtype,
    remote_code: bool,
    model_name: str,
) -> None:
    """Writes everything but the weights into `folder`."""
    config = conversion.config
    config.architectures = [ARCHITECTURE]
    config.dtype = dtype
    config.save_pretrained(folder)
    text = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id if processor is not None else text.pad_token_id,
        **conversion.generation,
    ).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    # `save_pretrained` copies some of the code by itself; what the folder gets is decided here alone.
    for file in folder.glob("*.py"):
        file.unlink()
    if remote_code:
        copy_code(folder)
    else:
        remove_code_references(folder)
    card = model_card(conversion, describe(config), model_name, str(dtype).removeprefix("torch."), remote_code)
    (folder / "README.md").write_text(card, encoding="utf-8")


def copy_code(folder: Path) -> None:
    """The modules that the folder needs to load without this package, side by side."""
    for package in (modeling_unimoe, processing):
        for file in Path(package.__file__).parent.glob("*.py"):
            if file.name != "__init__.py":
                shutil.copyfile(file, folder / file.name)


def remove_code_references(folder: Path) -> None:
    """Takes out of the JSON files what says that code lies beside them."""
    for file in folder.glob("*.json"):
        # It never says so, and its tokens may be called anything.
        if file.name == "tokenizer.json":
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        cleaned = _without_code_references(content)
        if cleaned != content:
            file.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")


def _without_code_references(content: Any) -> Any:
    """At every depth, since a processor's file holds those of its parts."""
    if not isinstance(content, dict):
        return content
    kept = {name: value for name, value in content.items() if name not in ("auto_map", "custom_pipelines")}
    return {name: _without_code_references(value) for name, value in kept.items()}
