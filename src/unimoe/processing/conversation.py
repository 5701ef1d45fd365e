"""Messages in the forms that people write them, made one: what the template renders and what has to be loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .media_source import is_source

MEDIA = ("image", "video", "audio", "speech")
_SOUNDS = ("audio", "speech")
_SOURCES = ("path", "url", "base64")
# What a block may hold beside its item.
_BESIDE_ITEMS = ("type", "sampling_rate")


class MediaBlock(NamedTuple):
    """A medium of a conversation; `item` is None where the block gives none."""

    item: Any
    # For an error: where the block stands, the keys under which it may give its item, and those that it has instead.
    where: str
    keys: tuple[str, ...]
    unused: tuple[str, ...]


def is_batch(conversation: Any) -> bool:
    """Is this a list of conversations, not one? Raises TypeError or ValueError for what is neither."""
    if hasattr(conversation, "messages"):
        return False
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(
            "a conversation is a list of messages like {'role': 'user', 'content': ...}, "
            f"not {type(conversation).__name__}."
        )
    if not conversation:
        raise ValueError("the conversation is empty; it needs at least one message.")
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def read_conversation(
    conversation: Any, placeholders: dict[str, str], name: str = "conversation"
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """As `read_blocks`, but with nothing of the media except their items: for each kind these in order, None for a block
    without any, whose item comes otherwise."""
    messages, blocks = read_blocks(conversation, placeholders, name)
    return messages, {kind: [block.item for block in of_kind] for kind, of_kind in blocks.items()}


def read_blocks(
    conversation: Any, placeholders: dict[str, str], name: str = "conversation"
) -> tuple[list[dict[str, Any]], dict[str, list[MediaBlock]]]:
    """Check one conversation and take its media out.

    Args:
        conversation: messages with a `role` and a `content`: a string or a list of blocks. A block is
            `{"type": "text", "text": ...}` or a medium: `{"type": "image", "image" | "url" | "path" | "base64": ...}`,
            with `video`, `audio` and `speech` alike, sounds with an optional "sampling_rate", which counts for arrays
            (files tell their own). The blocks `image_url`, `video_url`, `audio_url` and `input_audio` of chat servers
            are read too.
        placeholders: `{kind: literal placeholder}`. None of them may stand in a text, because there it would take the
            place of a medium.
        name: what to call the conversation in an error.

    Returns:
        The messages for the template, where a medium is only `{"type": kind}`, and for each kind the blocks in order.

    Raises:
        ValueError: a malformed conversation, message or block, or a text that holds a placeholder; says where.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"{name}: expected a list with at least one message, got {conversation!r:.80}.")
    messages: list[dict[str, Any]] = []
    blocks: dict[str, list[MediaBlock]] = {kind: [] for kind in MEDIA}
    for i, message in enumerate(conversation):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise ValueError(f"{where}: a message is a dict with a 'role' and a 'content', got {message!r:.80}.")
        content = message["content"]
        if isinstance(content, str):
            _refuse_placeholders(content, placeholders, where)
        elif isinstance(content, (list, tuple)):
            content = [
                _read_block(block, blocks, placeholders, f"{where}['content'][{j}]") for j, block in enumerate(content)
            ]
        else:
            raise ValueError(f"{where}: 'content' is a string or a list of blocks, not {type(content).__name__}.")
        messages.append({**message, "content": content})
    return messages, blocks


def _read_block(
    block: Any, blocks: dict[str, list[MediaBlock]], placeholders: dict[str, str], where: str
) -> dict[str, Any]:
    if isinstance(block, str):
        block = {"type": "text", "text": block}
    if not isinstance(block, dict) or "type" not in block:
        raise ValueError(f"{where}: a block is a dict with a 'type', got {block!r:.80}.")
    kind = block["type"]
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"{where}: a block of type 'text' needs a string under 'text'.")
        _refuse_placeholders(block["text"], placeholders, where)
        return dict(block)
    given, keys = block, (kind, *_SOURCES)
    if kind in ("image_url", "video_url", "audio_url", "input_audio"):
        keys = (kind,)
    if kind in ("image_url", "video_url", "audio_url"):
        source = block.get(kind)
        kind, block = kind.removesuffix("_url"), {"url": source.get("url") if isinstance(source, dict) else source}
    elif kind == "input_audio":
        source = block.get(kind)
        kind, block = "audio", {"base64": source.get("data") if isinstance(source, dict) else source}
    if kind not in MEDIA:
        raise ValueError(f"{where}: type {kind!r} is unknown; use 'text', {', '.join(map(repr, MEDIA))}.")
    item = _read_item(kind, block, where)
    unused = tuple(key for key in given if key not in (*keys, *_BESIDE_ITEMS))
    blocks[kind].append(MediaBlock(item, where, keys, unused))
    return {"type": kind}


def _read_item(kind: str, block: dict[str, Any], where: str) -> Any:
    keys = [key for key in (kind, *_SOURCES) if block.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"{where}: gives its {kind} more than once ({', '.join(map(repr, keys))}); keep one.")
    if not keys:
        return None
    item = block[keys[0]]
    # A plain file name must not be taken for anything else, so the error for a missing file says so.
    # (The path of an empty string would be the current directory.)
    if keys[0] == "path" and isinstance(item, str) and item and "://" not in item:
        item = Path(os.path.expanduser(item))
    # Files tell their own rate, and so do a dict and a pair.
    needs_rate = kind in _SOUNDS and not is_source(item) and not isinstance(item, (Mapping, tuple))
    if needs_rate and block.get("sampling_rate") is not None:
        return {"array": item, "sampling_rate": block["sampling_rate"]}
    return item


def _refuse_placeholders(text: str, placeholders: dict[str, str], where: str) -> None:
    for kind, token in placeholders.items():
        if token in text:
            raise ValueError(
                f"{where}: the text holds the placeholder {token} itself. Give the {kind} as a block of its own, "
                f"{{'type': '{kind}', ...}}; to mention the tag, write it differently, for instance "
                f"'{token[:1]} {token[1:-1]} {token[-1:]}'."
            )
