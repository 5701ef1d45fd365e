"""The tokenizer of a conversion: read from whichever files a folder has, with the placeholders' tokens added."""

import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .errors import ConversionError
from .family import Conversion
from .reader import read_json
from .sentencepiece_tokenizer import load_llama_tokenizer
from .tiktoken_tokenizer import FORMATS, find_table, load_tiktoken_tokenizer

NO_TOKENIZER = (
    "No tokenizer was found, so the folder has no processor: the model loads and runs on ids and features. To add one, convert "
    "again with --tokenizer, the folder of the decoder's own."
)
PLACEHOLDERS = ("image", "video", "audio", "speech")
# What Transformers reads of a tokenizer without code of its own.
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
OTHER_FILES = ("merges.txt", "chat_template.jinja")


def load_tokenizer(conversion: Conversion) -> PreTrainedTokenizerBase | None:
    """The original's tokenizer with the four placeholders as special tokens, whose ids go into the configuration.

    Returns:
        None where the folder has no tokenizer files and was not given for them.

    Raises:
        ConversionError: A file is damaged, or the folder that was given as the tokenizer's holds none.
    """
    folder = conversion.tokenizer_folder
    if folder is None:
        return None
    tokenizer = _load(folder, conversion.config.text_config)
    if tokenizer is None:
        if conversion.tokenizer_required:
            raise ConversionError(_nothing_in(folder))
        return None
    num_tokens, num_rows = len(tokenizer), conversion.config.text_config.vocab_size
    if num_tokens > num_rows:
        conversion.notes.append(
            f"The tokenizer in {folder.name} has {num_tokens} tokens, the model's embedding {num_rows} rows: it cannot read the "
            f"tokens from {num_rows} on. If texts fail with an index error, this is another model's tokenizer."
        )
    # Embeddings often have more rows than the tokenizer has tokens. Those get names, so that the placeholders' ids lie beyond
    # the vocabulary, where they take no score away from it.
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(num_tokens, num_rows)], special_tokens=True)
    tokenizer.add_tokens([f"<{name}>" for name in PLACEHOLDERS], special_tokens=True)
    for name in PLACEHOLDERS:
        setattr(conversion.config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<{name}>"))
    return tokenizer


def _load(folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    try:
        if (folder / "tokenizer.model").is_file():
            return load_llama_tokenizer(folder, text_config.vocab_size)
        if (table := find_table(folder)) is not None:
            return load_tiktoken_tokenizer(table)
        if (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file():
            return _load_fast(folder, text_config)
    except ConversionError:
        raise
    except Exception as error:  # the Rust library raises nothing more special
        detail = " ".join(str(error).split())
        raise ConversionError(
            f"{folder}: its tokenizer cannot be read ({detail}); download its files again, or give another with --tokenizer"
        ) from None
    return None


def _nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder, given as --tokenizer"
    wanted = ", ".join(("tokenizer.model", "tokenizer.json", "vocab.json with merges.txt", *FORMATS))
    return f"{folder}: no tokenizer there, given as --tokenizer; it must hold one of {wanted}"


def _load_fast(folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that Transformers reads by itself.

    It reads copies: beside the originals lies a `config.json` of a type that it does not know, which it would warn about.
    """
    contents = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in contents and "vocab.json" not in contents:
        raise ConversionError(
            f"{folder}: merges.txt without vocab.json; download the missing file from the same place"
        )
    # Without a class of its own, a tokenizer is that of its decoder.
    has_class = bool(contents.get("tokenizer_config.json", {}).get("tokenizer_class"))
    with tempfile.TemporaryDirectory() as copies:
        for name in (*contents, *OTHER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copies, name))
        config = PreTrainedConfig() if has_class else text_config
        try:
            tokenizer = AutoTokenizer.from_pretrained(copies, config=config, trust_remote_code=False)
        except Exception as error:
            # The text should not name the copies.
            raise ValueError(str(error).replace(copies, str(folder))) from None
    tokenizer.name_or_path = str(folder)
    return tokenizer
