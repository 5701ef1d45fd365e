"""Evenly spaced frames of a video file, read by seeking instead of decoding everything."""

import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
from PIL import Image

from .media_source import MediaError, check_complete, label, one_line

# FFmpeg also opens play lists, which may name other files and addresses; only self-contained formats are let in.
SAFE_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,mpegts,mpeg,flv,asf,nut,"
    "wav,w64,flac,mp3,aac,ac3,eac3,aiff,au,caf,amr,ape,wv,tta,dts"
)
# Formats without an index, where a seek only rewinds.
UNSEEKABLE_FORMATS = ("gif",)
# Codecs whose frames say whether any other frame is built on them. (H.265's say so only within a temporal layer.)
CODECS_WITH_MARKED_REFERENCES = ("h264",)


def open_container(source: Path | bytes, name: str) -> av.container.InputContainer:
    """Opens a sound or video file for demuxing.

    Raises:
        MediaError: the file is cut short or is no sound or video file.
    """
    check_complete(source, name)
    # An absolute path, so that a file called "concat:..." is not taken for a protocol.
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
    try:
        return av.open(file, options={"format_whitelist": SAFE_FORMATS})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{label(name, source)}: not a readable sound or video file ({one_line(error)}); "
            "pass a whole file in a usual format, such as mp4, webm, gif, avi, wav, flac or mp3."
        ) from None


def read_frames(source: Path | bytes, num_frames: int, name: str) -> tuple[list[Image.Image], int]:
    """The frames shown at the times i * (total // num_frames) / fps, as the original system chooses them.

    total is int(duration * fps). A file with fewer than `num_frames` frames gives all it has.

    Returns:
        The frames as RGB images, upright, and how many frames had to be decoded to get them.

    Raises:
        MediaError: no video stream, a damaged or cut file, no frame that can be decoded.
    """
    with open_container(source, name) as container:
        if not container.streams.video:
            raise MediaError(
                f"{label(name, source)}: the file has no video stream; pass a video, or pass it as sound."
            )
        reader = _FrameReader(container)
        try:
            frames = reader.read(num_frames)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{label(name, source)}: the video is damaged or truncated ({one_line(error)}); pass a whole file."
            ) from None
    if not frames:
        raise MediaError(f"{label(name, source)}: no frame can be decoded; pass a whole, playable video file.")
    return frames, reader.num_decoded


class _FrameReader:
    """Picks frames out of the first video stream of an open container. Times are in the stream's own ticks."""

    def __init__(self, container: av.container.InputContainer):
        self.container = container
        self.stream = container.streams.video[0]
        self.beginning = self.stream.start_time or 0
        self.num_decoded = 0
        # Frames shown before this time are decoded only where others are built on them; None: all are decoded.
        self.wanted: int | None = None

    def read(self, num_frames: int) -> list[Image.Image]:
        fps = self.stream.average_rate or self.stream.guessed_rate
        seekable = self.container.format.name not in UNSEEKABLE_FORMATS
        total = int(self._duration() * float(fps)) if seekable and fps and self.stream.time_base else 0
        if total < num_frames:
            # Hardly any frames, or no duration: count them.
            return self._read_all(num_frames)
        ticks_per_frame = 1 / (fps * self.stream.time_base)
        return self._read_by_seeking(total, num_frames, ticks_per_frame) or self._read_all(num_frames)

    def _duration(self) -> float:
        """In seconds; 0 where the file does not tell.

        That of the whole file, its sound included, to a hundredth: the original reads what FFmpeg prints.
        """
        return round((self.container.duration or 0) / av.time_base, 2)

    def _read_by_seeking(self, total: int, num_frames: int, ticks_per_frame: Fraction) -> list[Image.Image]:
        """Nothing where the file cannot be read this way."""
        try:
            first = self._time_after_seek(self.beginning)
            if first is None:
                return []
            limits = _limits(first, ticks_per_frame, total, num_frames)
            keyframes = [self._keyframe_before(limit) for limit in limits]
            if None in keyframes:
                return []
            wanted = [self._time_shown(limit, target) for limit, (target, _) in zip(limits, keyframes)]
        except av.FFmpegError:
            return []
        return self._pick(limits, keyframes, ticks_per_frame, wanted)

    def _time_shown(self, limit: Fraction, target: int) -> int | None:
        """Time of the frame that is on at `limit`, by the packets behind `target`; None where frames cannot be left out."""
        if self.stream.codec_context.name not in CODECS_WITH_MARKED_REFERENCES:
            return None
        self.container.seek(target, stream=self.stream)
        shown = None
        for packet in self.container.demux(self.stream):
            if not packet.size:
                break
            if packet.pts is None or packet.dts is None:
                return None
            # No frame is shown before it is decoded.
            if packet.dts > limit:
                break
            if packet.pts <= limit and (shown is None or packet.pts > shown):
                shown = packet.pts
        return shown

    def _time_after_seek(self, target: int) -> int | None:
        """Time of the first packet that a seek leads to."""
        self.container.seek(target, stream=self.stream)
        return next((packet.pts for packet in self.container.demux(self.stream) if packet.size), None)

    def _keyframe_before(self, limit: Fraction) -> tuple[int, int] | None:
        """Where to seek to in order to show what is on at `limit`, and the time of the key frame found there."""
        back = 0
        while True:
            target = max(int(limit) - back, self.beginning)
            time = self._time_after_seek(target)
            if time is None:
                return None
            if time <= limit:
                return target, time
            # Formats indexed by decoding time may land behind what is shown.
            if target == self.beginning:
                return None
            back = 2 * back or int(1 / self.stream.time_base)

    def _read_all(self, num_frames: int) -> list[Image.Image]:
        """One pass through the packets to count them, one through the frames."""
        self.container.seek(self.beginning, stream=self.stream)
        times = [packet.pts for packet in self.container.demux(self.stream) if packet.size]
        total = len(times)
        if total <= num_frames:
            self.container.seek(self.beginning, stream=self.stream)
            return [_upright(frame) for frame in islice(self._decode(), num_frames)]
        timed = None not in times
        times = sorted(times) if timed else range(total)
        # The mean rate: GIF frames last unequally long.
        ticks_per_frame = Fraction(times[-1] - times[0], total - 1)
        limits = _limits(times[0], ticks_per_frame, total, num_frames)
        keyframes = [(self.beginning, times[0])] * num_frames
        return self._pick(limits, keyframes, ticks_per_frame, [None] * num_frames, timed)

    def _pick(
        self,
        limits: list[Fraction],
        keyframes: list[tuple[int, int]],
        ticks_per_frame: Fraction,
        wanted: list[int | None],
        timed: bool = True,
    ) -> list[Image.Image]:
        """For every limit, in rising order, the last frame that does not begin after it; nothing if one is missing.

        `wanted` are the times of those frames where they are known.
        `shown` is that frame; `ahead` is one decoded beyond it.
        """
        images: list[Image.Image] = []
        frames: Iterator[av.VideoFrame] = iter(())
        shown = ahead = None
        for limit, (target, keyframe), self.wanted in zip(limits, keyframes, wanted):
            # Seek only where it skips something.
            if shown is None or keyframe > (ahead or shown).pts:
                self.container.seek(target, stream=self.stream)
                frames, shown, ahead = self._decode(timed), None, None
            while ahead is None or ahead.pts <= limit:
                if ahead is not None:
                    shown, ahead = ahead, None
                # A frame whose own time is wanted needs no look at the next one.
                if shown is not None and limit - shown.pts < ticks_per_frame / 2:
                    break
                ahead = next(frames, None)
                if ahead is None:
                    break
            if shown is None:
                return []
            images.append(_upright(shown))
        return images

    def _decode(self, timed: bool = True) -> Iterator[av.VideoFrame]:
        index = 0
        for packet in self.container.demux(self.stream):
            skips = self.wanted is not None and packet.pts is not None and packet.pts < self.wanted
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            for frame in packet.decode():
                self.num_decoded += 1
                if not timed:
                    frame.pts = index
                index += 1
                if frame.pts is not None:
                    yield frame


def _limits(start: int, ticks_per_frame: Fraction, total: int, num_frames: int) -> list[Fraction]:
    # A quarter of a frame of slack: containers round time stamps, to a millisecond in WebM.
    return [start + (i * (total // num_frames) + Fraction(1, 4)) * ticks_per_frame for i in range(num_frames)]


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    # The display matrix that phones write; the angle is counter-clockwise, like Pillow's.
    rotation = getattr(frame, "rotation", 0) % 360
    return image.rotate(rotation, expand=True) if rotation else image
