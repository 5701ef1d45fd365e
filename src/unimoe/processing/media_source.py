"""Where a media item's bytes come from: path, URL, bytes, base64 or data URI; and whether a file is cut short."""

import base64
import binascii
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

URL_TIMEOUT_SECONDS = 20.0

# What files begin with, to tell base64 text from a path that does not exist.
_SIGNATURES = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM|II\*\0|MM\0\*|fLaC|ID3|OggS|FORM|\.snd|caff|FLV|#!AMR|\x1aE\xdf\xa3"
    rb"|....ftyp|....moov|\0\0\x01[\xb3\xba]|0&\xb2u|\xff[\xe0-\xff]",
    re.DOTALL,
)


class MediaError(ValueError):
    """An image, video or sound that cannot be used; the message names the item, what is wrong and what would work."""


class Url(str):
    """An http(s) address, told apart from a path."""


def label(name: str, source: Any) -> str:
    """`images[2] ('cat.png')` for a path or an address, else the name alone."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return f"{name} ({text if len(text) <= 200 else text[:100] + '...' + text[-50:]!r})"
    return name


def is_source(item: Any) -> bool:
    """Whether the item stands for a file's content rather than being an image or waveform itself."""
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview))


def find_source(item: Any, name: str, folder: bool = False) -> Path | Url | bytes:
    """Where the content is, without opening or fetching it.

    Args:
        item: path, `file://` or http(s) address, bytes, base64 text or data URI.
        name: what to call the item in errors.
        folder: whether a folder may stand for the item.

    Raises:
        MediaError: a missing or empty file, a folder where a file is wanted, text that is none of the above.
    """
    if isinstance(item, (bytes, bytearray, memoryview)):
        if not len(item):
            raise MediaError(f"{name}: the bytes are empty; pass a whole file's content.")
        return bytes(item)
    text = os.fspath(item)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if isinstance(item, str):
        if re.match(r"https?://", text, re.IGNORECASE):
            return Url(text)
        if text[:5].lower() == "data:":
            return _data_uri_bytes(text, name)
        if text[:7].lower() == "file://":
            text = urllib.request.url2pathname(urllib.parse.urlparse(text).path)
    path = Path(text)
    if text and _exists(path):
        _check_path(path, name, folder)
        return path
    content = _base64_bytes(text) if isinstance(item, str) else None
    if content is not None and _SIGNATURES.match(content):
        return content
    kinds = "file or folder" if folder else "file"
    raise MediaError(
        f"{label(name, text)}: no such {kinds}, and not a URL, data URI or base64 of a media file; check the path."
    )


def is_animated_webp(item: str | os.PathLike) -> bool:
    """Whether a path or data URI leads to an animated WebP. Nothing is fetched; what cannot be read is none."""
    try:
        source = find_source(item, "")
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(21)
        else:
            head = source[:21]
    except (MediaError, OSError):
        return False
    # An extended file whose second flag is set. An address is a text.
    return (
        isinstance(head, bytes)
        and head[:4] == b"RIFF"
        and head[8:16] == b"WEBPVP8X"
        and bool(head[20:] and head[20] & 2)
    )


def read_source(source: Path | Url | bytes, name: str) -> Path | bytes:
    """Fetches an address; a path or bytes stay what they are.

    Raises:
        MediaError: the address cannot be reached or gives nothing.
    """
    if not isinstance(source, Url):
        return source
    try:
        # Some hosts refuse the default agent of urllib.
        request = urllib.request.Request(source, headers={"User-Agent": "Mozilla/5.0 (compatible; unimoe)"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
            content = response.read()
    # Beside OSError (unreachable, refused, timed out, HTTP status) a bad address raises ValueError or HTTPException.
    except Exception as error:
        reason = getattr(error, "reason", None) or error
        status = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise MediaError(
            f"{label(name, source)}: the URL cannot be fetched ({status}{one_line(reason)}); "
            "check the address and the connection, or pass a local file."
        ) from None
    if not content:
        raise MediaError(f"{label(name, source)}: the URL gives an empty file; check the address.")
    return content


def check_complete(source: Path | bytes, name: str) -> None:
    """Refuses a file that ends before its own container says (wav, aiff, mp3, avi, webp, gif, MP4, WebM).

    Decoders play such files up to the cut without a word.

    Raises:
        MediaError: the file is cut short.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if _is_cut(file, size):
            raise MediaError(
                f"{label(name, source)}: the file is truncated, it ends before the end that its header or structure "
                "tells; pass the whole file."
            )


def one_line(error: Any) -> str:
    """An error's text, short and on one line."""
    text = getattr(error, "strerror", None) or error
    return " ".join(str(text).split())[:200] or type(error).__name__


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    # Base64 text is too long for a path, and may hold what no path can.
    except (OSError, ValueError):
        return False


def _check_path(path: Path, name: str, folder: bool) -> None:
    if path.is_dir():
        if not folder:
            raise MediaError(f"{label(name, path)}: this is a folder; pass a file.")
    elif path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{label(name, path)}: the file is empty (0 bytes); pass a whole file.")
    elif not path.is_file():
        raise MediaError(f"{label(name, path)}: this is not a regular file; pass a file.")
    elif not os.access(path, os.R_OK):
        raise MediaError(f"{label(name, path)}: no permission to read the file; pass a readable file.")


def _base64_bytes(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _data_uri_bytes(text: str, name: str) -> bytes:
    header, comma, body = text.partition(",")
    if header.lower().endswith(";base64"):
        content = _base64_bytes(urllib.parse.unquote(body))
    else:
        content = urllib.parse.unquote_to_bytes(body)
    if not comma or not content:
        raise MediaError(
            f"{name}: the data URI holds no readable content; it must look like data:image/png;base64,iVBOR..."
        )
    return content


def _is_cut(file: BinaryIO, size: int) -> bool:
    """Whether the file is shorter than it declares; False where it declares nothing, as streams do."""
    head = file.read(4096)
    if head[:4] in (b"RIFF", b"FORM"):
        declared = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        # Written to a pipe, the length stays 0 or the largest value; some writers count a few header bytes too many.
        return declared < 0x7FFF0000 and declared + 8 - size > 16
    if head[:4] == b"\x1aE\xdf\xa3":
        return _is_cut_matroska(head, size)
    if head[4:8] in (b"ftyp", b"moov", b"mdat"):
        return _is_cut_mp4(file, size)
    if head[:4] == b"GIF8":
        return _is_cut_gif(file)
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return _is_cut_mp3(file, size, head)
    return False


def _is_cut_mp4(file: BinaryIO, size: int) -> bool:
    position = 0
    while position + 8 <= size:
        file.seek(position)
        box = file.read(16)
        length, kind = int.from_bytes(box[:4], "big"), box[4:8]
        if length == 1:
            length = int.from_bytes(box[8:16], "big")
        # Length 0 goes up to the end. What is no usual box is left to the decoder.
        if length < 8 or kind not in (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"sidx"):
            return False
        position += length
    return position > size


def _is_cut_matroska(head: bytes, size: int) -> bool:
    def number(position: int) -> tuple[int | None, int]:
        """An EBML length and where its bytes end; None stands for an open end."""
        if position >= len(head) or not head[position]:
            return None, position + 1
        width = 9 - head[position].bit_length()
        value = int.from_bytes(head[position : position + width], "big") & ((1 << 7 * width) - 1)
        return (None if value == (1 << 7 * width) - 1 else value), position + width

    length, position = number(4)
    segment = position + (length or 0)
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return False
    length, position = number(segment + 4)
    return length is not None and position + length > size


def _is_cut_mp3(file: BinaryIO, size: int, head: bytes) -> bool:
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
    file.seek(start)
    frame = file.read(256)
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = int.from_bytes(frame[tag + 4 : tag + 8], "big")
    # Without the tag, or without the number of bytes in it, nothing tells the length.
    if tag < 0 or not flags & 2:
        return False
    position = tag + (12 if flags & 1 else 8)
    declared = int.from_bytes(frame[position : position + 4], "big")
    # Writers differ on whether the frame of the tag itself and trailing tags count.
    return start + declared - size > max(256, declared // 50)


def _is_cut_gif(file: BinaryIO) -> bool:
    """Walks from block to block to the trailer."""

    def skip_colours(flags: int) -> None:
        if flags & 0x80:
            file.seek(3 << (flags & 7) + 1, os.SEEK_CUR)

    file.seek(0)
    screen = file.read(13)
    if len(screen) < 13:
        return True
    skip_colours(screen[10])
    while (kind := file.read(1)) != b";":
        if kind == b",":
            image = file.read(9)
            if len(image) < 9:
                return True
            skip_colours(image[8])
            # The code size.
            file.seek(1, os.SEEK_CUR)
        elif kind == b"!":
            file.seek(1, os.SEEK_CUR)
        else:
            # Cut off, or no block at all, which is left to the decoder.
            return not kind
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], os.SEEK_CUR)
        if not length:
            return True
    return False
