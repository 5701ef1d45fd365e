"""A processor for the random model of `tiny_models`, and small media."""

from typing import Any

import numpy as np
from PIL import Image
from tiny_models import tiny_config, tiny_text_config
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from unimoe.modeling_unimoe.configuration_unimoe import UniMoEConfig
from unimoe.processing.feature_extraction_unimoe import UniMoEFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoEProcessor

# Placeholder tokens of one item (of one chunk, for sounds) of `tiny_models.tiny_config`.
NUM_TOKENS = {"image": 4, "video": 4, "audio": 3, "speech": 5}
SPEECH_CHUNK = 40 * 160
AUDIO_CHUNK = 400 + 63 * 160
RATE = 16000


def tiny_tokenizer() -> LlamaTokenizer:
    """One token a character, a few words, bytes for the rest; adds a prefix space and BOS, pads with <unk>."""
    words = ["▁the", "▁what", "▁is", "USER", "ASSISTANT"]
    merges = []
    for word in words:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    pieces = [left + right for left, right in merges]
    single = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *single, *pieces])
    vocab = {token: i for i, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), pad_token="<unk>", add_bos_token=True)


def tiny_processor(kinds: tuple[str, ...] = tuple(NUM_TOKENS), **kwargs: Any) -> UniMoEProcessor:
    """A processor for a model that takes `kinds`."""
    sees, hears = {"image", "video"} & set(kinds), {"audio", "speech"} & set(kinds)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    feature_extractor = UniMoEFeatureExtractor(
        audio_chunk_samples=AUDIO_CHUNK, speech_chunk_samples=SPEECH_CHUNK, speech_chunk_stride=SPEECH_CHUNK
    )
    return UniMoEProcessor(
        image_processor=image_processor if sees else None,
        tokenizer=tiny_tokenizer(),
        feature_extractor=feature_extractor if hears else None,
        **{f"num_{kind}_tokens": NUM_TOKENS[kind] for kind in kinds},
        **kwargs,
    )


def tiny_config_for(processor: UniMoEProcessor) -> UniMoEConfig:
    """The configuration of a random model that takes what `processor` prepares."""
    ids = {f"{kind}_token_id": getattr(processor, f"{kind}_token_id") for kind in NUM_TOKENS}
    return tiny_config(text_config=tiny_text_config(vocab_size=len(processor.tokenizer)), **ids)


def image(seed: int = 0, width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def frames(count: int, seed: int = 0) -> list[Image.Image]:
    return [image(seed + i) for i in range(count)]


def sound(samples: int = 4000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def media(text: str) -> dict[str, Any]:
    """An item for each placeholder of a text, as arguments of the processor."""
    items = {"images": image(), "videos": frames(2), "audio": (sound(), RATE), "speech": (sound(), RATE)}
    counts = {name: text.count(f"<{name.removesuffix('s')}>") for name in items}
    return {name: [items[name]] * count for name, count in counts.items() if count}


def ids_of(processor: UniMoEProcessor, text: str, **kwargs: Any) -> list[int]:
    return processor(text, **media(text), **kwargs)["input_ids"][0]
