"""Tokens that a folder adds to its `tokenizer.model`, with the ids that its files give them.

They are listed in `added_tokens.json` (older) and under `added_tokens_decoder` in `tokenizer_config.json` (newer). Special tokens
that neither lists, nor the model has, get the next ids, as in Transformers.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .errors import ConversionError
from .reader import read_json
from .settings import COUNT, OBJECT, TOKEN

LIST_FILE = "added_tokens.json"
DECODER_FIELD = "added_tokens_decoder"


def read_added_tokens(
    folder: Path, config: dict[str, Any], pieces: dict[str, int], special: Iterable[str], num_rows: int
) -> dict[int, AddedToken]:
    """All tokens that are not cut into pieces: those which the files list, and the special ones; by their ids, in order.

    Args:
        folder: Where the files lie.
        config: The content of `tokenizer_config.json`.
        pieces: The ids of the model.
        special: The special tokens, in the order in which those without an id get theirs.
        num_rows: Of the embedding. Below it, ids that no file gives to a token are free.

    Raises:
        ConversionError: The files contradict one another or the model, or leave out ids.
    """
    special = list(dict.fromkeys(special))
    tokens: dict[int, AddedToken] = {}
    ids = dict(pieces)
    names = {index: piece for piece, index in pieces.items()}
    for file, index, token in _listed(folder, config, special):
        name, known = names.get(index, token.content), ids.get(token.content, index)
        if name != token.content or known != index:
            other = f"{name!r} has that id" if name != token.content else f"it has the id {known}"
            raise ConversionError(
                f"{file}: {token.content!r} has the id {index}, but by tokenizer.model or another file there {other}; take all "
                "files of the tokenizer from the same place"
            )
        ids[token.content], names[index], tokens[index] = index, token.content, token
    for content in special:
        index = ids.setdefault(content, max(ids.values(), default=-1) + 1)
        tokens.setdefault(index, AddedToken(content, special=True, normalized=False))
    last = max(tokens, default=-1)
    for index in range(len(pieces), last):
        if index not in tokens and index >= num_rows:
            raise ConversionError(
                f"{folder}: {tokens[last].content!r} has the id {last}, but no token the id {index}; the list of added tokens "
                f"({LIST_FILE} or {DECODER_FIELD}) is incomplete"
            )
        tokens.setdefault(index, AddedToken(f"<|unused_{index}|>", special=True, normalized=False))
    return dict(sorted(tokens.items()))


def _listed(folder: Path, config: dict[str, Any], special: list[str]) -> Iterator[tuple[Path, int, AddedToken]]:
    """File, id and token of every entry; the newer list comes last, since it says more."""
    file = folder / LIST_FILE
    entries = [(file, token, index, {}) for token, index in (read_json(file) if file.is_file() else {}).items()]
    file = folder / "tokenizer_config.json"
    for index, entry in (config.get(DECODER_FIELD) or {}).items():
        if not OBJECT.accepts(entry) or not TOKEN.accepts(entry) or not index.isdecimal():
            raise ConversionError(f"{file}: {DECODER_FIELD}.{index} is not a token with a number and a 'content'")
        entries.append((file, entry["content"], int(index), entry))
    for file, content, index, entry in entries:
        if not COUNT.accepts(index):
            raise ConversionError(f"{file}: {content!r} has the id {index!r}; {COUNT.words} is needed")
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        # The slow tokenizers look for these in the text as it is written, whatever `normalized` says.
        is_special = content in special or bool(entry.get("special"))
        yield file, index, AddedToken(content, special=is_special, normalized=False, **flags)
