"""From a text with placeholders to rows of token ids.

The originals (Uni-MoE, MoE-LLaVA, CuMo) never tokenise a prompt as a whole: they split it at the placeholders,
tokenise each chunk on its own and put the chunks together again with one sentinel per medium. A SentencePiece
tokenizer adds its prefix space to every chunk, so the ids differ from those of the whole text. This file is the only
place that tokenises.
"""

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

# What `mm_token_type_ids` says of a token; text is 0.
MM_TOKEN_TYPES = {"image": 1, "video": 2, "audio": 3, "speech": 3}


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: a placeholder of a kind of medium, or plain text (`kind` None)."""

    kind: str | None
    text: str
    start: int


@dataclass(frozen=True)
class Segment:
    """A tokenised piece; `ids` is empty for a placeholder. `spans` are the tokens' characters in the whole prompt."""

    kind: str | None
    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation as a model is trained on it.

    Args:
        row: `input_ids`, `attention_mask`, `mm_token_type_ids` and `assistant_masks` (1: a token of an answer).
        media: for each item, in order, the tower that takes it and where its tokens begin and end in the row.
        features: the model's inputs beside the row, as `UniMoEProcessor.__call__` returns them.
    """

    row: dict[str, list[int]]
    media: list[tuple[str, int, int]]
    features: dict[str, Any]


def check_texts(text: Any) -> list[str]:
    """One text or several as a list. Raises TypeError for anything else, ValueError for an empty one."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"text= is a string or a list of strings, not {type(text).__name__}.")
    if not texts:
        raise ValueError("text= is an empty list.")
    for i, one in enumerate(texts):
        if not one.strip():
            raise ValueError(
                f"text[{i}] is empty; give a prompt." if len(texts) > 1 else "text= is empty; give a prompt."
            )
    return list(texts)


def split_prompt(text: str, placeholders: dict[str, str]) -> list[Piece]:
    """Split `text` at its placeholders (`{kind: token}`); the pieces joined are the text again, none is empty."""
    kinds = {token: kind for kind, token in placeholders.items()}
    pieces, end = [], 0
    for match in re.finditer("|".join(map(re.escape, kinds)), text):
        if match.start() > end:
            pieces.append(Piece(None, text[end : match.start()], end))
        pieces.append(Piece(kinds[match[0]], match[0], match.start()))
        end = match.end()
    if end < len(text):
        pieces.append(Piece(None, text[end:], end))
    return pieces


def tokenize_pieces(tokenizer: Any, pieces: list[Piece], add_special_tokens: bool = True) -> list[Segment]:
    """Tokenise every chunk of text on its own.

    Only the first chunk gets the tokenizer's special tokens (BOS), also when it is empty because the prompt begins
    with a placeholder; any other empty chunk adds nothing.
    """
    if not pieces or pieces[0].kind is not None:
        pieces = [Piece(None, "", 0), *pieces]
    segments = []
    for i, piece in enumerate(pieces):
        if piece.kind is None:
            ids, spans = _tokenize_chunk(tokenizer, piece, add_special_tokens and i == 0)
        else:
            ids, spans = [], []
        segments.append(Segment(piece.kind, ids, spans))
    return segments


def expand_segments(
    segments: list[Segment],
    lengths: list[int],
    token_ids: list[int],
    answer_spans: list[tuple[int, int]] | None = None,
) -> dict[str, list[int]]:
    """One row of `input_ids`, with the i-th placeholder as `lengths[i]` times `token_ids[i]`, and its companions.

    Returns `input_ids`, `attention_mask`, `mm_token_type_ids` and, where `answer_spans` (stretches of characters of
    the prompt) are given, `assistant_masks`: 1 for every token that overlaps one of them.
    """
    media = iter(zip(lengths, token_ids))
    ids, types, answers = [], [], []
    for segment in segments:
        if segment.kind is None:
            ids += segment.ids
            types += [0] * len(segment.ids)
            answers += [
                int(any(start < answer_end and end > answer_start for answer_start, answer_end in answer_spans or ()))
                for start, end in segment.spans
            ]
        else:
            length, token_id = next(media)
            ids += [token_id] * length
            types += [MM_TOKEN_TYPES[segment.kind]] * length
            answers += [0] * length
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "mm_token_type_ids": types}
    if answer_spans is not None:
        row["assistant_masks"] = answers
    return row


def media_spans(segments: list[Segment], lengths: list[int]) -> list[tuple[int, int]]:
    """Where the tokens of each medium begin and end in the row that `expand_segments` makes."""
    spans, start, media = [], 0, iter(lengths)
    for segment in segments:
        length = len(segment.ids) if segment.kind is None else next(media)
        if segment.kind is not None:
            spans.append((start, start + length))
        start += length
    return spans


def truncate_row(row: dict[str, list[int]], limit: int, name: str) -> dict[str, list[int]]:
    """The first `limit` tokens of a row. Raises ValueError where that cuts away part of a medium."""
    if any(row["mm_token_type_ids"][limit:]):
        raise ValueError(
            f"{name}: truncation to {limit} tokens would cut away a medium; shorten the text or pass fewer media."
        )
    return {key: values[:limit] for key, values in row.items()}


def pad_rows(
    rows: list[dict[str, list[int]]],
    padding: str,
    pad_token_id: int | None,
    side: str,
    max_length: int | None = None,
    multiple_of: int | None = None,
) -> dict[str, list[list[int]]]:
    """Rows to columns, padded on `side` ("left" or "right") to the longest row or to `max_length`.

    `padding` is "longest", "max_length" or "do_not_pad"; `input_ids` are padded with `pad_token_id`, everything else
    with 0. Raises ValueError for "max_length" without a `max_length`, and for padding without a pad token.
    """
    if padding == "max_length" and max_length is None:
        raise ValueError("padding='max_length' needs max_length=, for the processor has none of its own.")
    longest = max(len(row["input_ids"]) for row in rows)
    width = {"longest": longest, "max_length": max(longest, max_length or 0), "do_not_pad": 0}[padding]
    if padding != "do_not_pad" and multiple_of:
        width = -(-width // multiple_of) * multiple_of
    columns: dict[str, list[list[int]]] = {name: [] for name in rows[0]}
    for row in rows:
        missing = max(0, width - len(row["input_ids"]))
        if missing and pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token, so texts of different lengths cannot be padded; set one."
            )
        for name, values in row.items():
            pad = [pad_token_id if name == "input_ids" else 0] * missing
            columns[name].append(pad + values if side == "left" else values + pad)
    return columns


def _tokenize_chunk(tokenizer: Any, piece: Piece, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    if getattr(tokenizer, "init_kwargs", {}).get("legacy") is not False:
        return _encode(tokenizer, piece.text, piece.start, special)
    # The slow Llama tokenizer of the originals, where its `legacy` is off, tokenises what follows a special token with the
    # prefix space like everything else, and then takes the space away from the first token, which thereby may become
    # an unknown one. Without the prefix from the start, other tokens could come out.
    names = sorted(filter(None, set(tokenizer.all_special_tokens)), key=len, reverse=True)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for part in re.split(f"({'|'.join(map(re.escape, names))})", piece.text) if names else [piece.text]:
        new_ids, new_spans = _encode(tokenizer, part, piece.start + start, special and start == 0 and not ids)
        # SentencePiece's own sign for a space is one to that tokenizer, too.
        if start and part not in names and not part.startswith((" ", "\u2581")):
            new_ids, new_spans = _without_prefix_space(tokenizer, new_ids, new_spans)
        ids, spans, start = ids + new_ids, spans + new_spans, start + len(part)
    return ids, spans


def _without_prefix_space(
    tokenizer: Any, ids: list[int], spans: list[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    token = tokenizer.convert_ids_to_tokens(ids[0]) if ids else ""
    if not token.startswith("\u2581"):
        return ids, spans
    if len(token) == 1:
        return ids[1:], spans[1:]
    return [tokenizer.convert_tokens_to_ids(token[1:]), *ids[1:]], spans


def _encode(tokenizer: Any, text: str, start: int, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    # SentencePiece puts a prefix space before every text; the Metaspace of `tokenizers` leaves it out where the text
    # itself begins with a space. One more space makes up for that.
    shift = int(text.startswith(" ") and _adds_prefix_space(tokenizer))
    with_spans = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        " " * shift + text,
        add_special_tokens=special,
        return_attention_mask=False,
        return_offsets_mapping=with_spans,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    if not with_spans:
        return ids, [(0, 0)] * len(ids)
    spans = [(start + max(0, begin - shift), start + max(0, end - shift)) for begin, end in encoded["offset_mapping"]]
    return ids, spans


def _adds_prefix_space(tokenizer: Any) -> bool:
    pre_tokenizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    return isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme != "never"
