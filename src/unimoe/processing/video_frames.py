"""Evenly spaced frames of a video file, read by seeking instead of decoding everything."""

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import dropwhile, islice
from pathlib import Path
from typing import NamedTuple

import av
from av.video.frame import PictureType
from PIL import Image

from .media_source import MediaError, check_complete, label, one_line

# FFmpeg also opens play lists, which may name other files and addresses; only self-contained formats are let in.
SAFE_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,mpegts,mpeg,flv,asf,nut,"
    "wav,w64,flac,mp3,aac,ac3,eac3,aiff,au,caf,amr,ape,wv,tta,dts"
)
# Formats that are read from the beginning: GIF, where a seek only rewinds, and those of the next line.
UNSEEKABLE_FORMATS = ("gif", "mpeg")
# In an MPEG program stream a frame need not have a time of its own, and what is filled in depends on where reading began. So
# its frames, which are equally long, are numbered.
FORMATS_WITHOUT_TIMES = ("mpeg",)
# Formats without an index, where a seek leads to any packet (of a key frame or not) by the time at which it is decoded.
FORMATS_SOUGHT_BY_DECODING_TIME = ("mpegts", "mpeg")
# No frame is decoded this long before it is shown.
MOST_SECONDS_BETWEEN_DECODING_AND_SHOWING = 3600
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


class _Stop(NamedTuple):
    """A time of which the frame is wanted, and the way there."""

    # The frame is the last one that does not begin after this.
    limit: Fraction
    # Where to seek to, and the time of the key frame behind it from which to decode.
    target: int
    keyframe: int
    # The frame's own time where it is known.
    wanted: int | None = None


class _FrameReader:
    """Picks frames out of the first video stream of an open container. Times are in the stream's own ticks."""

    def __init__(self, container: av.container.InputContainer):
        self.container = container
        self.stream = container.streams.video[0]
        self.beginning = self.stream.start_time or 0
        self.by_decoding_time = container.format.name in FORMATS_SOUGHT_BY_DECODING_TIME
        if self.by_decoding_time and self.stream.time_base:
            # The first frame's own time would lead behind its packet, which is decoded earlier.
            self.beginning -= int(MOST_SECONDS_BETWEEN_DECODING_AND_SHOWING / self.stream.time_base)
        self.num_decoded = 0
        # Frames shown before this time are decoded only where others are built on them; None: all are decoded.
        self.wanted: int | None = None

    def read(self, num_frames: int) -> list[Image.Image]:
        fps = self.stream.average_rate or self.stream.guessed_rate
        total = int(self._duration() * float(fps)) if fps and self.stream.time_base else 0
        images: list[Image.Image] = []
        if total >= num_frames and self.container.format.name not in UNSEEKABLE_FORMATS:
            images = self._read_by_seeking(total, num_frames, 1 / (fps * self.stream.time_base))
        # Hardly any frames, no duration, or no way to seek: count them.
        return images or self._read_all(num_frames, total if self.by_decoding_time else 0)

    def _duration(self) -> float:
        """In seconds; 0 where the file does not tell.

        That of the whole file, its sound included, to a hundredth: the original reads what FFmpeg prints.
        """
        return round((self.container.duration or 0) / av.time_base, 2)

    def _read_by_seeking(self, total: int, num_frames: int, ticks_per_frame: Fraction) -> list[Image.Image]:
        """Nothing where the file cannot be read this way."""
        try:
            first = self._first_keyframe()
            if first is None:
                return []
            stops = [self._way_to(limit) for limit in _limits(first, ticks_per_frame, total, num_frames)]
            if None in stops:
                return []
            stops = [stop._replace(wanted=self._time_shown(stop)) for stop in stops]
        except av.FFmpegError:
            return []
        return self._pick(stops, ticks_per_frame)

    def _first_keyframe(self) -> int | None:
        """Its time. A recording may begin between two key frames; what comes before the first cannot be decoded."""
        self.container.seek(self.beginning, stream=self.stream)
        packets = self.container.demux(self.stream)
        return next((packet.pts for packet in packets if packet.size and packet.is_keyframe), None)

    def _way_to(self, limit: Fraction) -> _Stop | None:
        """How to show what is on at `limit`; None where no key frame is found before it."""
        back = 0
        while True:
            target = max(int(limit) - back, self.beginning)
            keyframe = self._keyframe_behind(target, limit)
            if keyframe is not None:
                return _Stop(limit, target, keyframe)
            # Formats indexed by decoding time may land behind what is shown.
            if target == self.beginning:
                return None
            back = 2 * back or int(1 / self.stream.time_base)

    def _keyframe_behind(self, target: int, limit: Fraction) -> int | None:
        """Time of the last key frame shown by `limit`, among the packets that a seek to `target` leads to."""
        self.container.seek(target, stream=self.stream)
        found = None
        for packet in self.container.demux(self.stream):
            if packet.size and packet.is_keyframe and packet.pts is not None and packet.pts <= limit:
                found = packet.pts if found is None else max(found, packet.pts)
            # No frame is shown before it is decoded, and a seek to the limit itself leads to the last key frame there is.
            if packet.dts is None or packet.dts > limit or (found is not None and target == int(limit)):
                break
        return found

    def _time_shown(self, stop: _Stop) -> int | None:
        """Time of the frame that is on at a stop, by the packets on the way; None where frames cannot be left out."""
        if self.stream.codec_context.name not in CODECS_WITH_MARKED_REFERENCES:
            return None
        self.container.seek(stop.target, stream=self.stream)
        shown = None
        for packet in self.container.demux(self.stream):
            if not packet.size:
                break
            if packet.pts is None or packet.dts is None:
                return None
            # No frame is shown before it is decoded.
            if packet.dts > stop.limit:
                break
            if packet.pts <= stop.limit and (shown is None or packet.pts > shown):
                shown = packet.pts
        return shown

    def _read_all(self, num_frames: int, known_total: int) -> list[Image.Image]:
        """One pass through the packets to count them, one through the frames.

        `known_total` is the number of frames by the duration, 0 where it is not to be used.
        """
        self.container.seek(self.beginning, stream=self.stream)
        packets = [(packet.pts, packet.is_keyframe) for packet in self.container.demux(self.stream) if packet.size]
        # A recording may begin between two key frames.
        skipped = next((index for index, (_, is_keyframe) in enumerate(packets) if is_keyframe), 0)
        times = [time for time, _ in packets[skipped:]]
        timed = None not in times and self.container.format.name not in FORMATS_WITHOUT_TIMES
        # What is shown before the first key frame is built on frames that are not there.
        times = sorted(time for time in times if time >= times[0]) if timed else range(len(times))
        total = len(times)
        if total <= num_frames:
            return [_upright(frame) for frame in islice(self._decode_all(skipped, timed=False), num_frames)]
        # The mean rate: GIF frames last unequally long.
        ticks_per_frame = Fraction(times[-1] - times[0], total - 1)
        # Rounded to a hundredth of a second, as the original has it, a duration may make one frame less. Further off, it is
        # that of the sound, or guessed from the last time in the file, behind which frames without a time may follow.
        total = known_total if abs(known_total - total) == 1 else total
        return self._pick_in_order(
            _limits(times[0], ticks_per_frame, total, num_frames), ticks_per_frame, skipped, timed
        )

    def _pick_in_order(
        self, limits: list[Fraction], ticks_per_frame: Fraction, skipped: int, timed: bool
    ) -> list[Image.Image]:
        """For every limit, in rising order, the last frame that does not begin after it, without any seek between."""
        frames = self._decode_all(skipped, timed)
        shown, ahead = None, next(frames, None)
        images = []
        for limit in limits:
            shown, ahead = _advance(frames, shown, ahead, limit, ticks_per_frame)
            # The first frames may be missing, where others that were cut off are needed for them.
            frame = shown or ahead
            if frame is None:
                return []
            images.append(_upright(frame))
        return images

    def _pick(self, stops: list[_Stop], ticks_per_frame: Fraction) -> list[Image.Image]:
        """For every stop, in rising order, the last frame that does not begin after it; nothing if one is missing.

        `shown` is that frame; `ahead` is one decoded beyond it.
        """
        images: list[Image.Image] = []
        frames: Iterator[av.VideoFrame] = iter(())
        shown = ahead = None
        for stop in stops:
            self.wanted = stop.wanted
            # Seek only where it skips something.
            if shown is None or stop.keyframe > (ahead or shown).pts:
                frames = self._decode_from(stop)
                shown, ahead = None, next(frames, None)
                # Packets are also marked where a picture is renewed bit by bit, which takes some frames to be whole.
                if ahead is None or ahead.pict_type == PictureType.P:
                    return []
            shown, ahead = _advance(frames, shown, ahead, stop.limit, ticks_per_frame)
            if shown is None:
                return []
            images.append(_upright(shown))
        return images

    def _decode_from(self, stop: _Stop) -> Iterator[av.VideoFrame]:
        """The frames from a stop's key frame on."""
        self.container.seek(stop.target, stream=self.stream)
        packets = self.container.demux(self.stream)
        return self._decode(dropwhile(lambda packet: packet.pts != stop.keyframe or not packet.is_keyframe, packets))

    def _decode_all(self, skipped: int, timed: bool) -> Iterator[av.VideoFrame]:
        """The frames of the whole stream behind its first `skipped` packets."""
        self.container.seek(self.beginning, stream=self.stream)
        self.wanted = None
        return self._decode(islice(self.container.demux(self.stream), skipped, None), timed)

    def _decode(self, packets: Iterable[av.Packet], timed: bool = True) -> Iterator[av.VideoFrame]:
        """Frames without a time are left out; without `timed`, their numbers become their times."""
        index = 0
        for packet in packets:
            skips = self.wanted is not None and packet.pts is not None and packet.pts < self.wanted
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            for frame in packet.decode():
                self.num_decoded += 1
                if not timed:
                    frame.pts = index
                index += 1
                if frame.pts is not None:
                    yield frame


def _advance(
    frames: Iterator[av.VideoFrame],
    shown: av.VideoFrame | None,
    ahead: av.VideoFrame | None,
    limit: Fraction,
    ticks_per_frame: Fraction,
) -> tuple[av.VideoFrame | None, av.VideoFrame | None]:
    """The last frame that does not begin after `limit`, and the one behind it if that was decoded too."""
    while ahead is None or ahead.pts <= limit:
        if ahead is not None:
            shown, ahead = ahead, None
        # A frame whose own time is wanted needs no look at the next one.
        if shown is not None and limit - shown.pts < ticks_per_frame / 2:
            break
        ahead = next(frames, None)
        if ahead is None:
            break
    return shown, ahead


def _limits(start: int, ticks_per_frame: Fraction, total: int, num_frames: int) -> list[Fraction]:
    # A quarter of a frame of slack: containers round time stamps, to a millisecond in WebM.
    return [start + (i * (total // num_frames) + Fraction(1, 4)) * ticks_per_frame for i in range(num_frames)]


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    # The display matrix that phones write; the angle is counter-clockwise, like Pillow's.
    rotation = getattr(frame, "rotation", 0) % 360
    return image.rotate(rotation, expand=True) if rotation else image
