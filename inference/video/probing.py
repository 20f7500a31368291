"""What a video file holds: its frames in presentation order, their times, and their upright size.

The container is read packet by packet without decoding, because its own frame count may be
missing (Matroska), may count frames that an edit list hides, or may be a promise that a file cut
short does not keep. Every backend decodes against this one index, so all number frames alike.
"""

import logging
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ...core.errors import VideoError

logger = logging.getLogger(__name__)

# FFmpeg opens a text file as the screen of a terminal and a picture as a video of one frame.
_NOT_VIDEO_FORMATS = ("tty", "image2")
_NOT_VIDEO_SUFFIX = "_pipe"

# MPEG streams are searched by rough position: decord and torchcodec miss the frame they seek
# (found with decord 0.6.0 and torchcodec 0.17.0).
NO_FRAME_INDEX = ("mpegts", "mpeg")

_NO_PTS = np.iinfo(np.int64).min


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """The packets of the video stream as they lie in the file, and the frames they show.

    Attributes
    ----------
    pts : int64 array (packets,)
        Presentation time of each packet in decoding order, in units of `time_base`.
    keyframes : bool array (packets,)
        Whether decoding can start at the packet.
    frames : int64 array (frames,)
        Distinct presentation times of the frames that are shown, ascending: the entry at `i`
        identifies frame `i`.
    time_base : Fraction
        Seconds of one unit.
    """

    pts: NDArray[np.int64]
    keyframes: NDArray[np.bool_]
    frames: NDArray[np.int64]
    time_base: Fraction

    def has_leading_pictures(self) -> bool:
        """Whether frames stored after a keyframe are shown before it, as in open groups."""
        start = np.maximum.accumulate(np.where(self.keyframes, np.arange(len(self.pts)), 0))
        # Those of the first keyframe have nothing before it to depend on.
        follows = (start > 0) & (self.pts != _NO_PTS)
        return bool((self.pts < self.pts[start])[follows].any())

    def positions(self, pts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last packet, in decoding order, of each presentation time (fields make two)."""
        order = np.argsort(self.pts, kind="stable")
        ordered = self.pts[order]
        first = order[np.searchsorted(ordered, pts, side="left")]
        last = order[np.searchsorted(ordered, pts, side="right") - 1]
        return first, last


@dataclass(frozen=True)
class VideoInfo:
    """A video file as it is shown.

    Attributes
    ----------
    path : Path
        The file.
    duration : float
        Seconds from the first frame to the end of the last.
    fps : float
        Average rate: `num_frames / duration`.
    num_frames : int
        Frames the file holds.
    width, height : int
        Pixels of an upright frame.
    rotation : int
        Quarter turn that makes a stored frame upright, in degrees counter-clockwise: 0, 90, 180
        or 270. Already applied to `width`, `height` and to every frame that is read.
    codec : str
        FFmpeg's name of the codec, such as h264, hevc or av1.
    container : str
        FFmpeg's name of the container, such as mov,mp4,m4a,3gp,3g2,mj2 or matroska,webm.
    missing : int
        Frames the container promises (for Matroska: those its duration implies) that the file
        does not hold, as when a download was cut short.
    timestamps : float64 array (num_frames,)
        Seconds at which each frame appears, from the first frame on.
    stream : int
        Place of the video stream in the container.
    index : PacketIndex
        Where the frames lie.
    """

    path: Path
    duration: float
    fps: float
    num_frames: int
    width: int
    height: int
    rotation: int
    codec: str
    container: str
    missing: int
    timestamps: NDArray[np.float64] = field(repr=False, compare=False)
    stream: int = field(repr=False)
    index: PacketIndex = field(repr=False, compare=False)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read what a video file holds. One frame is decoded, for its orientation and size.

    A file that ends before its container says is used as far as it goes, and a warning tells how
    much is missing. Of several video streams FFmpeg's best one is taken, usually the largest.

    Raises
    ------
    VideoError
        The file does not exist, is not a video, has no usable timestamps, or none of its frames
        decodes.
    """
    path = Path(path)
    with open_container(path) as container:
        stream = video_stream(container, path)
        if stream.time_base is None:
            raise VideoError(f"{path}: the video stream has no time base. {_REMUX}")
        packets, picture = _scan(container, stream)
        shown = [packet for packet in packets if packet.shown]
        if not packets:
            raise VideoError(f"{path}: the video stream holds no frames. {_OTHER_FILE}")
        if not shown:
            raise VideoError(f"{path}: the frames carry no timestamps. {_REMUX}")
        if picture is None:
            raise VideoError(
                f"{path}: none of its {len(shown)} frames decodes "
                f"(codec {stream.codec_context.name}). {_OTHER_FILE}"
            )
        index = PacketIndex(
            pts=np.array([packet.pts for packet in packets], dtype=np.int64),
            keyframes=np.array([packet.keyframe for packet in packets], dtype=np.bool_),
            frames=np.unique(np.array([packet.pts for packet in shown], dtype=np.int64)),
            time_base=stream.time_base,
        )
        # The two fields of an interlaced frame may share a time, but no more packets than those.
        if len(shown) > 2 * len(index.frames):
            raise VideoError(
                f"{path}: its {len(shown)} frames carry only {len(index.frames)} different "
                f"timestamps, so their order is unknown. {_OTHER_FILE}"
            )
        duration = _duration(index, shown, stream)
        fps = len(index.frames) / duration if duration > 0 else 0.0
        missing = _missing(container, stream, len(packets), duration, fps)
        rotation = round(picture.rotation / 90) % 4 * 90
        width, height = picture.width, picture.height
        if rotation % 180:
            width, height = height, width
        info = VideoInfo(
            path=path,
            duration=duration,
            fps=fps,
            num_frames=len(index.frames),
            width=width,
            height=height,
            rotation=rotation,
            codec=stream.codec_context.codec.canonical_name,
            container=container.format.name,
            missing=missing,
            timestamps=(index.frames - index.frames[0]) * float(index.time_base),
            stream=stream.index,
            index=index,
        )
        unordered = (
            container.format.name == "avi"
            and stream.codec_context.has_b_frames
            and bool((np.diff(index.pts[index.pts != _NO_PTS]) >= 0).all())
        )
    if unordered:
        logger.warning(
            "%s: AVI keeps no presentation times for a codec that reorders frames; a frame may "
            "be taken for a near neighbour. %s",
            path,
            _OTHER_FILE,
        )
    if missing:
        logger.warning(
            "%s: the video ends after %.2f s and %d frames, about %d frames before the container "
            "says; the file may be cut short. Only what it holds is used.",
            path,
            info.duration,
            info.num_frames,
            missing,
        )
    return info


def open_container(path: Path) -> av.container.InputContainer:
    """Open a file for reading, or say why that cannot be done."""
    if not path.exists():
        raise VideoError(f"{path}: no such file. Check the path.")
    if not path.is_file():
        raise VideoError(f"{path}: expected a video file, found a directory or device.")
    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}): expected a container such as mp4, "
            f"mkv or webm, complete with its header (an mp4 cut short may have lost it). "
            f"{_OTHER_FILE}"
        ) from error


def video_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    """Choose the stream to decode, or say that the file is a picture, text or sound."""
    kind = container.format.name
    if kind in _NOT_VIDEO_FORMATS or kind.endswith(_NOT_VIDEO_SUFFIX):
        raise VideoError(f"{path}: not a video but a picture or text file. {_OTHER_FILE}")
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise VideoError(f"{path}: holds no video stream, only {kind} sound or data. {_OTHER_FILE}")
    context: Any = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: this build of PyAV has no decoder for its codec. {_OTHER_FILE}")
    return stream


_OTHER_FILE = "Pass another file, or convert it: ffmpeg -i INPUT -c:v libx264 OUTPUT.mp4"
_REMUX = "Rewrite the container: ffmpeg -i INPUT -c copy OUTPUT.mp4"


@dataclass(frozen=True)
class _Packet:
    pts: int
    duration: int
    keyframe: bool
    shown: bool


def _scan(
    container: av.container.InputContainer, stream: VideoStream
) -> tuple[list[_Packet], VideoFrame | None]:
    """List every packet of the stream and decode until the first frame comes out."""
    # One thread: a threaded decoder would swallow a packet per thread before its first frame.
    stream.thread_type = "SLICE"
    stream.thread_count = 1
    packets: list[_Packet] = []
    picture: VideoFrame | None = None
    try:
        for packet in container.demux(stream):
            if picture is None:
                picture = _first_frame(packet)
            if packet.size == 0:
                continue
            pts = _NO_PTS if packet.pts is None else packet.pts
            shown = packet.pts is not None and not packet.is_discard
            packets.append(_Packet(pts, packet.duration or 0, packet.is_keyframe, shown))
    except av.FFmpegError as error:
        logger.warning("%s: reading stopped at a damaged place (%s)", container.name, error)
    return packets, picture


def _first_frame(packet: Any) -> VideoFrame | None:
    try:
        frames = packet.decode()
    except av.FFmpegError:
        return None
    return frames[0] if frames else None


def _duration(index: PacketIndex, shown: list[_Packet], stream: VideoStream) -> float:
    last = max(shown, key=lambda packet: packet.pts)
    length = float(last.duration)
    if length <= 0 and len(index.frames) > 1:
        length = float(np.median(np.diff(index.frames)))
    seconds = (int(index.frames[-1]) - int(index.frames[0]) + length) * float(index.time_base)
    if seconds <= 0 and stream.average_rate:
        return float(1 / stream.average_rate)
    return seconds


def _missing(
    container: av.container.InputContainer,
    stream: VideoStream,
    packets: int,
    duration: float,
    fps: float,
) -> int:
    """Frames the container promises beyond what was found; 0 when it promises nothing more."""
    assert stream.time_base is not None
    if stream.duration is not None:
        # The count alone proves nothing: an edit list hides frames of a complete file.
        short = float(stream.duration * stream.time_base) - duration
        if short * fps < 2:
            return 0
        return max(stream.frames - packets, 0) if stream.frames else round(short * fps)
    if container.duration is None:
        return 0
    # The container's duration covers sound too, which often runs a little longer.
    short = container.duration / av.time_base - duration
    return round(short * fps) if short > 1 else 0
