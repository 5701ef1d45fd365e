"""Which item belongs to which placeholder: the forms in which a caller may hand over media, made one."""

import os
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from .conversation import MediaBlock
from .media_source import is_animated_webp

# The processor's argument for each kind of medium.
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}
SOUNDS = ("audio", "speech")

_FRAME_FILE = re.compile(r"\.(jpe?g|png|bmp|webp|tiff?)(\?[^/]*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Slot:
    """One medium of one text: its kind, what the caller gave for it, and what to call it in an error."""

    kind: str
    item: Any
    name: str


def assign_items(
    kinds_of_texts: list[list[str]], arguments: dict[str, Any], placeholders: dict[str, str], sounds_alike: bool
) -> list[list[Slot]]:
    """Give every placeholder its item.

    Args:
        kinds_of_texts: for each text the kinds of its placeholders, in order.
        arguments: what the caller passed for each kind: nothing, one item, a flat list (used up in order over the
            texts) or one list per text.
        placeholders: the literal placeholder of each kind, for errors.
        sounds_alike: the model has one sound tower, which takes "audio" and "speech" alike: where only one of the two
            arguments is given, it serves the placeholders of both.

    Raises:
        ValueError: when the counts do not match; names the argument, the text and both counts.
    """
    given = [kind for kind in SOUNDS if count_items(arguments.get(kind))]
    if sounds_alike and len(given) == 1:
        kinds_of_texts = [[given[0] if kind in SOUNDS else kind for kind in kinds] for kinds in kinds_of_texts]
        placeholders = {**placeholders, given[0]: " or ".join(placeholders[kind] for kind in SOUNDS)}
    queues = {}
    for kind in ARGUMENTS:
        counts = [kinds.count(kind) for kinds in kinds_of_texts]
        queues[kind] = iter(_items_of_kind(kind, arguments.get(kind), counts, placeholders[kind]))
    return [[next(queues[kind]) for kind in kinds] for kinds in kinds_of_texts]


class PerText(list):
    """The items of one text; a type of its own, because an item may itself be a list (of frames)."""


def flat_items(kind: str, value: Any) -> list[Slot]:
    """All items of an argument in order, for a call without a text."""
    lists = _normalise(kind, value)
    items = [item for entry in lists for item in entry] if _is_nested(lists) else lists
    return [Slot(kind, item, f"{ARGUMENTS[kind]}[{i}]") for i, item in enumerate(items)]


def gather_items(
    found: dict[str, list[list[MediaBlock]]], passed: dict[str, Any], sounds_alike: bool
) -> dict[str, Any]:
    """The items of each kind for chats.

    Args:
        found: the blocks of each kind, one list per chat.
        passed: the items that came beside the chats, for blocks that give none.
        sounds_alike: the model has one sound tower, so items passed as "audio" also serve blocks of "speech".

    Raises:
        ValueError: for a kind of which both the chats and the caller give items, and for a block without any.
    """
    return {kind: _items_of_chats(kind, found[kind], passed, sounds_alike) for kind in ARGUMENTS}


def _items_of_chats(kind: str, found: list[list[MediaBlock]], passed: dict[str, Any], sounds_alike: bool) -> Any:
    blocks = [block for blocks in found for block in blocks]
    empty = [block for block in blocks if block.item is None]
    gives_some = len(empty) < len(blocks)
    if gives_some and passed[kind] is not None:
        raise ValueError(
            f"{ARGUMENTS[kind]}= was passed, but the messages give {kind} items too; use one of the two ways."
        )
    serving = SOUNDS if sounds_alike and kind in SOUNDS else (kind,)
    if empty and (gives_some or not any(count_items(passed[other]) for other in serving)):
        raise ValueError(_no_item(kind, empty[0]))
    return [PerText(block.item for block in blocks) for blocks in found] if gives_some else passed[kind]


def _no_item(kind: str, block: MediaBlock) -> str:
    *others, last = map(repr, block.keys)
    keys = f"{', '.join(others)} or {last}" if others else last
    has = f", only {', '.join(map(repr, block.unused))}" if block.unused else ""
    return f"{block.where}: this {kind} block gives no item{has}; add it under {keys}."


def _items_of_kind(kind: str, value: Any, counts: list[int], placeholder: str) -> list[Slot]:
    argument = ARGUMENTS[kind]
    items = _normalise(kind, value)
    if not _is_nested(items):
        if len(items) != sum(counts):
            where = "the text has" if len(counts) == 1 else f"the {len(counts)} texts have ({_join(counts)})"
            raise ValueError(
                _mismatch(argument, f"{where} {_plural(sum(counts), placeholder)}", len(items), placeholder)
            )
        return [Slot(kind, item, f"{argument}[{i}]" if len(items) > 1 else argument) for i, item in enumerate(items)]
    if len(items) != len(counts):
        raise ValueError(
            f"{argument}=: got lists for {len(items)} texts, but there {_plural(len(counts), 'text')}; "
            "pass one list per text, or one flat list for all."
        )
    slots = []
    for i, (entry, count) in enumerate(zip(items, counts)):
        if len(entry) != count:
            raise ValueError(
                _mismatch(argument, f"text[{i}] has {_plural(count, placeholder)}", len(entry), placeholder)
            )
        slots += [Slot(kind, item, f"{argument}[{i}][{j}]") for j, item in enumerate(entry)]
    return slots


def _mismatch(argument: str, has: str, num_items: int, placeholder: str) -> str:
    example = placeholder.split()[0]
    words = f"{example[:1]} {example[1:-1]} {example[-1:]}"
    return (
        f"{argument}=: {has}, but {_plural(num_items, 'item')} passed. Each {placeholder} takes exactly one item; "
        f"a text that only mentions the tag has to write it differently, for instance {words!r}."
    )


def _normalise(kind: str, value: Any) -> list:
    """The argument as a flat list of items, or as a list of lists (one per text; see `_is_nested`)."""
    if value is None:
        return []
    if isinstance(value, list) and _is_nested(value):
        return value
    if _is_array(value) and value.ndim == {"image": 4, "video": 5}.get(kind):
        return list(value)
    if not _is_list(kind, value):
        return [value]
    entries = list(value)
    nested = any(entry is None or _is_list(kind, entry) for entry in entries)
    return [PerText([] if entry is None else _as_list(kind, entry)) for entry in entries] if nested else entries


def _is_nested(items: list) -> bool:
    return any(isinstance(item, PerText) for item in items)


def _as_list(kind: str, entry: Any) -> list:
    return list(entry) if _is_list(kind, entry) else [entry]


def _is_list(kind: str, value: Any) -> bool:
    """Is this a list of items? One video may be a list of frames, one sound a pair (array, sampling rate)."""
    if not isinstance(value, (list, tuple)):
        return False
    if kind == "video":
        return not is_frames(value)
    return not (kind in SOUNDS and isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real))


def is_frames(value: Any) -> bool:
    """Is this one video given as its frames: a list of images, of arrays of up to 3 axes, or of image files?

    A GIF or an animated WebP is no frame but a video of its own. A WebP behind a URL, into which nobody looks before it is
    fetched, is taken for a frame.
    """
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_frame, value))


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, os.PathLike)):
        text = os.fspath(item)
        if not isinstance(text, str) or text.startswith("data:image/gif"):
            return False
        found = text.startswith("data:image/") or _FRAME_FILE.search(text[-300:])
        # Only what calls itself a WebP is looked into.
        return bool(found) and not ("webp" in (text[:15] + text[-300:]).lower() and is_animated_webp(item))
    return isinstance(item, Image.Image) or (_is_array(item) and item.ndim <= 3)


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def count_items(value: Any) -> int:
    """How many things an argument holds at any depth; 0 for None and for lists of nothing."""
    if isinstance(value, (list, tuple)):
        return sum(map(count_items, value))
    return int(value is not None)


def _plural(count: int, noun: str) -> str:
    if noun == "item":
        return "1 item was" if count == 1 else f"{count} items were"
    if noun == "text":
        return "is 1 text" if count == 1 else f"are {count} texts"
    return f"{count} {noun}"


def _join(counts: list[int]) -> str:
    return " + ".join(map(str, counts)) if len(counts) <= 8 else f"{len(counts)} counts"
