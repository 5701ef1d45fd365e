"""Training data files: LLaVA-style or chat-message JSON and JSONL, checked as a whole before any training starts."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..processing.conversation import read_conversation
from ..processing.media import check_media
from ..processing.media_inputs import ARGUMENTS, SOUNDS, is_frames

# Roles of LLaVA-style turns, as the public data sets of the three systems have them.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys under which a LLaVA-style record may have its media. "voice" serves whichever sounds the text asks for.
MEDIA_KEYS = {
    "image": "image",
    "images": "image",
    "video": "video",
    "videos": "video",
    "audio": "audio",
    "audios": "audio",
    "speech": "speech",
    "voice": "voice",
}
# How many bad records are described in an error; the others are only listed.
MAX_REASONS = 20
# Longer strings are base64 data, never paths.
MAX_PATH = 1000
# What `json` raises, also for numbers of too many digits and for lists of too great a depth.
_UNREADABLE = (ValueError, RecursionError)


class DataError(ValueError):
    """Data that cannot be trained on; the message names each bad record by its index."""


@dataclass(frozen=True)
class Record:
    """One conversation, checked.

    Args:
        name: file and index, for messages.
        messages: for the chat template; a text may hold literal placeholders, a block of a medium only its type.
        media: for each kind the items in the order of their placeholders.
        length: of all turns, in words, or the record's own number of tokens where it has one.
    """

    name: str
    messages: list[dict[str, Any]]
    media: dict[str, list[Any]]
    length: int


def read_records(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    processor: Any,
    media_root: str | os.PathLike | None = None,
    check_files: bool = True,
) -> list[Record]:
    """All records of one file or several, in order.

    Args:
        files: `.json` (a list of records) or `.jsonl` (one a line). A record has `conversations` of
            `{"from": "human" | "gpt", "value": ...}` with literal placeholders and its media under `image`, `video`,
            `audio`, `speech` or `voice`, one or a list; or `messages` in the form of `processor.apply_chat_template`.
        processor: a `UniMoEProcessor`, which knows the placeholders and what the model takes.
        media_root: folder that relative paths start from; None for the folder of each data file.
        check_files: False skips the look at every file (on slow network storage).

    Raises:
        DataError: a file without records, or one with records that cannot be used, all of which it names by index.
        OSError: a file cannot be read.
    """
    paths = [Path(files)] if isinstance(files, (str, os.PathLike)) else [Path(file) for file in files]
    if not paths:
        raise DataError("no data file is given")
    takes_system = takes_system_turn(processor)
    records: list[Record] = []
    for path in paths:
        bad: list[tuple[int, str]] = []
        root = Path(media_root) if media_root is not None else path.parent
        raw = _load(path)
        for index, entry in enumerate(raw):
            try:
                if isinstance(entry, Exception):
                    raise ValueError(f"not valid JSON ({entry})")
                record = _read(entry, f"{path.name}[{index}]", processor, root, check_files)
                if record.messages[0]["role"] == "system" and not takes_system:
                    raise ValueError("begins with a system turn, which this model's chat template does not know")
                records.append(record)
            except (ValueError, TypeError) as error:
                bad.append((index, " ".join(str(error).split())))
        if bad:
            raise DataError(_describe(path, bad, len(raw)))
    return records


def mix_type(media: dict[str, list[Any]], towers: Iterable[str]) -> int:
    """The mix of modalities as the original systems number it: 4 video + 2 sound + 1 image.

    A model with two sound towers runs other work for speech than for audio, so there speech counts 8.
    """
    bits = {"image": 1, "audio": 2, "video": 4, "speech": 8 if set(SOUNDS) <= set(towers) else 2}
    return sum({bits[kind] for kind, items in media.items() if items})


def _load(path: Path) -> list[Any]:
    """The raw records; a line that is no JSON stands there as the error that it gave."""
    try:
        # A byte order mark, which some editors write, is left out.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if path.suffix.lower() == ".jsonl":
        raw: Any = []
        # Not `splitlines`: texts may hold other characters that end a line.
        for line in filter(str.strip, text.split("\n")):
            try:
                raw.append(json.loads(line))
            except _UNREADABLE as error:
                raw.append(error)
    else:
        try:
            raw = json.loads(text)
        except _UNREADABLE as error:
            raise DataError(f"{path}: not valid JSON ({error}); a file with one record a line is a .jsonl") from None
    if not isinstance(raw, list):
        raise DataError(f"{path}: expected a list of records, found {type(raw).__name__}")
    if not raw:
        raise DataError(f"{path}: the file has no records")
    return raw


def _describe(path: Path, bad: list[tuple[int, str]], total: int) -> str:
    reasons = "; ".join(f"[{index}] {reason}" for index, reason in bad[:MAX_REASONS])
    rest = ", ".join(str(index) for index, _ in bad[MAX_REASONS:])
    return f"{path}: {len(bad)} of {total} records cannot be used: {reasons}" + (f"; and {rest}" if rest else "")


def _read(entry: Any, name: str, processor: Any, root: Path, check_files: bool) -> Record:
    if not isinstance(entry, dict) or not ("conversations" in entry or "messages" in entry):
        raise ValueError("a record is an object with 'conversations' or 'messages'")
    if "conversations" in entry:
        messages, media = _read_llava(entry, processor, root)
    else:
        messages, media = _read_chat(entry["messages"], processor, root)
    _check_roles(messages)
    for kind, items in media.items():
        taken = kind in processor.towers or (kind in SOUNDS and set(SOUNDS) & set(processor.towers))
        if items and not taken:
            raise ValueError(f"holds {kind}, but the model takes {', '.join(('text', *processor.towers))}")
        for i, item in enumerate(items):
            if check_files:
                check_media(item, kind, f"{kind} {i + 1}" if len(items) > 1 else kind)
    _check_characters(messages)
    words = sum(len(_text(message).split()) for message in messages)
    return Record(name, messages, media, _given_length(entry) or words)


def _given_length(entry: dict[str, Any]) -> int | None:
    """The number of tokens that a record has with it."""
    info = entry.get("multi_info") or {}
    if not isinstance(info, dict):
        raise ValueError(f"'multi_info' must be an object, found {info!r:.40}")
    length = entry.get("tokens") or info.get("tokens")
    if length is not None and not (type(length) is int and length > 0):
        raise ValueError(f"'tokens' must be a whole number above 0, found {length!r:.40}")
    return length


def takes_system_turn(processor: Any) -> bool:
    """Whether the chat template has a place for a system turn."""
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    try:
        processor.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False
    return True


def _read_llava(entry: dict[str, Any], processor: Any, root: Path) -> tuple[list[dict], dict[str, list[Any]]]:
    turns = entry["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' must be a list of turns, and not be empty")
    messages = []
    for i, turn in enumerate(turns):
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(
                f"turn {i} must be {{'from': 'human' or 'gpt', 'value': text}}, found from={role!r}, value={text!r:.40}"
            )
        messages.append({"role": ROLES[role], "content": text})
    # As the originals do: a conversation starts with its first question.
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    tokens = {token: kind for kind, token in processor.placeholders.items()}
    text = " ".join(message["content"] for message in messages)
    kinds = [tokens[found] for found in re.findall("|".join(map(re.escape, tokens)), text)]
    return messages, _match_media(_given_media(entry, root), kinds, processor)


def _given_media(entry: dict[str, Any], root: Path) -> dict[str, list[Any]]:
    given: dict[str, list[Any]] = {}
    for key, kind in MEDIA_KEYS.items():
        value = entry.get(key)
        if value is None or value == "" or value == []:
            continue
        value = _resolve(value, root)
        # The released data list the frames of one video, everything else lists items.
        single = not isinstance(value, list) or (kind == "video" and is_frames(value))
        given.setdefault(kind, []).extend([value] if single else value)
    return given


def _match_media(given: dict[str, list[Any]], kinds: list[str], processor: Any) -> dict[str, list[Any]]:
    """The items of each kind, those under "voice" handed to the placeholders of sounds in reading order.

    So are those of a model with one sound tower, which takes both kinds alike, if they stand under one key.
    """
    media = {kind: list(given.get(kind, [])) for kind in ARGUMENTS}
    voices, key = list(given.get("voice", [])), "voice"
    sounds = [kind for kind in SOUNDS if media[kind]]
    if voices and sounds:
        raise ValueError("gives sounds under 'voice' and under 'audio' or 'speech'; keep one of them")
    if len(sounds) == 1 and len(set(SOUNDS) & set(processor.towers)) == 1:
        key = sounds[0]
        voices, media[key] = media[key], []
    if voices:
        asked = [kind for kind in kinds if kind in SOUNDS]
        if len(asked) != len(voices):
            raise ValueError(f"{len(voices)} items under {key!r} for {len(asked)} <audio> and <speech> in the text")
        for kind, item in zip(asked, voices):
            media[kind].append(item)
    for kind, items in media.items():
        if len(items) != kinds.count(kind):
            token = processor.placeholders[kind]
            raise ValueError(f"{len(items)} items under {kind!r} for {kinds.count(kind)} {token} in the text")
    return {kind: items for kind, items in media.items() if items}


def _read_chat(messages: Any, processor: Any, root: Path) -> tuple[list[dict], dict[str, list[Any]]]:
    messages = [_with_paths(message, root) for message in messages] if isinstance(messages, list) else messages
    messages, items = read_conversation(messages, processor.placeholders, "messages")
    for kind, found in items.items():
        if any(item is None for item in found):
            raise ValueError(
                f"a block of type {kind!r} gives no item; add it under {kind!r}, 'path', 'url' or 'base64'"
            )
    return messages, {kind: found for kind, found in items.items() if found}


def _with_paths(message: Any, root: Path) -> Any:
    """A message with the relative paths of its blocks made absolute."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    blocks = []
    for block in message["content"]:
        if isinstance(block, dict):
            keys = [key for key in ("path", "url", str(block.get("type"))) if key in block and key != "text"]
            block = {**block, **{key: _resolve(block[key], root) for key in keys}}
        blocks.append(block)
    return {**message, "content": blocks}


def _resolve(item: Any, root: Path) -> Any:
    if isinstance(item, list):
        return [_resolve(one, root) for one in item]
    if isinstance(item, dict) and "url" in item:
        return {**item, "url": _resolve(item["url"], root)}
    if not isinstance(item, str) or "://" in item or item.startswith("data:") or len(item) > MAX_PATH:
        return item
    return root / os.path.expanduser(item)


def _check_roles(messages: list[dict[str, Any]]) -> None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("has no question")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise ValueError(
                f"turn {i} has the role {message['role']!r} where {expected!r} is due; turns must alternate"
            )
        if expected == "assistant" and not _text(message).strip():
            raise ValueError(f"turn {i} is an empty answer")
    if len(turns) % 2:
        raise ValueError("ends with a question, so its last answer is missing")


def _check_characters(messages: list[dict[str, Any]]) -> None:
    for i, message in enumerate(messages):
        try:
            _text(message).encode()
        except UnicodeEncodeError as error:
            # JSON can tell one, as in texts that were cut inside an emoji; tokenizers cannot take it.
            half = error.object[error.start]
            raise ValueError(f"the text of message {i} holds {half!r}, half a character; remove it") from None


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(block.get("text", "") for block in content)
