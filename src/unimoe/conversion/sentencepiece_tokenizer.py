"""A fast tokenizer from a Llama `tokenizer.model` that gives the ids of the slow tokenizer which the originals used.

That tokenizer (Transformers 4.31, `LlamaTokenizer` with `use_fast=False`) splits a text at special tokens and gives each
stretch to SentencePiece, which puts a space before it. With `legacy: false` the stretches after a special token lose that
space again, unless they begin with one of their own. An absent `legacy` means true.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .added_tokens import read_added_tokens
from .errors import ConversionError
from .settings import read_settings

SPACE = "▁"
# Kinds of pieces in a SentencePiece model.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BPE_MODEL = 2


def load_llama_tokenizer(folder: Path, num_rows: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with `tokenizer.model` and, usually, `tokenizer_config.json`.

    Beside the ids it takes over added and special tokens, the context length and the side of padding. Where no padding token
    is set, it is the unknown token, as the originals set it themselves.

    Args:
        num_rows: Of the embedding; below it, ids may be left out between added tokens.

    Raises:
        ConversionError: The model file is damaged, or not a BPE model as those of the Llama family; or the other files are
            damaged, or contradict it or one another.
    """
    file = folder / "tokenizer.model"
    model = sentencepiece_model.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
        pieces = [piece.piece for piece in model.pieces]
    except Exception as error:  # protobuf raises an exception of its own
        raise ConversionError(f"{file}: not a SentencePiece model, or a damaged one ({error})") from None
    if not pieces or model.trainer_spec.model_type != BPE_MODEL or model.normalizer_spec.precompiled_charsmap:
        raise ConversionError(
            f"{file}: a BPE model without normalisation is needed, as Llama's is; this is another one"
        )
    config, special_map = (
        read_settings(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    special = {
        name: _content(config.get(name)) or _content(special_map.get(name)) or default
        for name, default in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}.items()
    }
    special["pad_token"] = special["pad_token"] or special["unk_token"]
    more = config.get("additional_special_tokens") or special_map.get("additional_special_tokens") or []
    more = [_content(token) for token in more]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise ConversionError(f"{file}: a piece occurs twice, so the file is damaged; download it again")
    added = read_added_tokens(folder, config, vocabulary, [*special.values(), *more], num_rows)

    legacy = config.get("legacy") is not False
    return PreTrainedTokenizerFast(
        tokenizer_object=_build(model, vocabulary, special, added, legacy, config),
        **special,
        extra_special_tokens=more,
        model_max_length=config.get("model_max_length") or 2048,
        padding_side=config.get("padding_side") or "right",
        clean_up_tokenization_spaces=False,
        legacy=legacy,
    )


def _build(
    model: Any,
    vocabulary: dict[str, int],
    special: dict[str, str],
    added: dict[int, AddedToken],
    legacy: bool,
    config: dict[str, Any],
) -> Tokenizer:
    unknown = [special["unk_token"], *(piece.piece for piece in model.pieces if piece.type == UNKNOWN)]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(model.pieces, vocabulary),
            # It must be a piece of the model; a token that is added for it is never chosen.
            unk_token=next((piece for piece in unknown if piece in vocabulary), None),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    has_prefix = model.normalizer_spec.add_dummy_prefix
    if has_prefix and legacy:
        steps.insert(0, normalizers.Prepend(SPACE))
    elif has_prefix:
        # Metaspace takes a leading space for the prefix itself, so that one is doubled first. The sequence around it
        # shows that nothing else need make up for this.
        steps = [normalizers.Replace(SPACE, " "), normalizers.Replace(Regex(r"\A "), "  "), *steps]
        metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([metaspace])
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if has_prefix else []),
        ]
    )
    controls = {i: piece.piece for i, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL)}
    controls = {i: AddedToken(piece, special=True, normalized=False) for i, piece in controls.items()}
    # In the order of their ids, for those outside of the model are numbered as they come.
    tokenizer.add_tokens([token for _, token in sorted({**controls, **added}.items())])
    user_defined = [
        piece.piece for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED and i not in added
    ]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    first = [special["bos_token"]] if config.get("add_bos_token", True) else []
    last = [special["eos_token"]] if config.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*first, *last)],
    )
    return tokenizer


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the highest score; as a list of merges, the best first."""
    merges = []
    for piece in pieces:
        if piece.type != NORMAL:
            continue
        for i in range(1, len(piece.piece)):
            left, right = piece.piece[:i], piece.piece[i:]
            if left in vocabulary and right in vocabulary:
                merges.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _content(token: Any) -> str | None:
    """A special token as older and newer configurations write it: a string or a dict."""
    return token.get("content") if isinstance(token, dict) else token
