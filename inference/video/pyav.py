"""Decoding with PyAV: seek to the keyframe before a wanted frame, decode no further than needed.

PyAV 15 and later: `VideoFrame.rotation` gives the display matrix, and the colour matrix and range
of each frame are passed on explicitly, because PyAV 15 ignores them by default.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from .probing import PacketIndex, VideoInfo, open_container, video_stream

logger = logging.getLogger(__name__)

# Packets that are cheaper to decode than a seek and a refill of the decoder's threads.
_SEEK_WORTH = 16
# Frames that a decoder may deliver out of order at most (H.264 and HEVC hold 16 pictures).
_REORDER = 16
_MAX_THREADS = 8


def decode(
    info: VideoInfo, indices: NDArray[np.int64], chunk: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield (indices (n,), upright RGB (n, height, width, 3) uint8), n <= chunk, ascending.

    Frames that do not decode are left out.
    """
    reformatter = VideoReformatter()
    numbers: list[int] = []
    images = torch.empty(0)
    for index, frame in _wanted_frames(info, indices):
        if not numbers:
            images = torch.empty((chunk, info.height, info.width, 3), dtype=torch.uint8)
        np.copyto(images[len(numbers)].numpy(), _upright(frame, info, reformatter))
        numbers.append(index)
        if len(numbers) == chunk:
            yield np.array(numbers, dtype=np.int64), images
            numbers = []
    if numbers:
        yield np.array(numbers, dtype=np.int64), images[: len(numbers)]


@dataclass(frozen=True)
class Segment:
    """A run of packets that is decoded at one go for the wanted frames in it."""

    start: int
    stop: int
    indices: Sequence[int]


def plan(index: PacketIndex, indices: NDArray[np.int64]) -> list[Segment]:
    """Split a request into runs of packets, each from a keyframe to its last wanted frame.

    A frame needs the last keyframe that comes before it both in the file and on screen: one that
    is shown later does not help the leading pictures stored after it.
    """
    keys = np.flatnonzero(index.keyframes)
    first, last = index.positions(index.frames[indices])
    runs: list[tuple[int, int, list[int]]] = []
    for number, begin, end in zip(indices.tolist(), first.tolist(), last.tolist(), strict=True):
        rank = int(np.searchsorted(keys, begin, side="right")) - 1
        while rank > 0 and index.pts[keys[rank]] > index.frames[number]:
            rank -= 1
        start = int(keys[rank]) if rank >= 0 else 0
        if runs and start <= runs[-1][1] + _SEEK_WORTH:
            opened, stop, numbers = runs[-1]
            numbers.append(number)
            runs[-1] = opened, max(stop, end), numbers
        else:
            runs.append((start, end, [number]))
    return [Segment(*run) for run in runs]


def _wanted_frames(info: VideoInfo, indices: NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame]]:
    reader = _Reader(info)
    try:
        for segment in plan(info.index, indices):
            delivered = -1
            try:
                for index, frame in _in_order(reader.decode(segment), segment.indices):
                    delivered = index
                    yield index, frame
            except av.FFmpegError as error:
                # A threaded decoder loses good frames along with the damaged one.
                logger.debug("%s: damaged (%s), decoding on in one thread", info.path, error)
                reader.tolerate_damage()
                rest = tuple(number for number in segment.indices if number > delivered)
                yield from _in_order(reader.decode(segment), rest)
    finally:
        reader.close()


def _in_order(
    frames: Iterator[tuple[int, VideoFrame]], expected: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Pass on the expected frames, ascending; one that others overtook too far is given up."""
    held: dict[int, VideoFrame] = {}
    place = 0
    for index, frame in frames:
        if place == len(expected) or index < expected[place]:
            continue
        held[index] = frame
        while place < len(expected) and (expected[place] in held or len(held) > _REORDER):
            number = expected[place]
            place += 1
            if number in held:
                yield number, held.pop(number)
    for number in expected[place:]:
        if number in held:
            yield number, held.pop(number)


class _Reader:
    """The open file: seeks to a packet and decodes runs of packets."""

    def __init__(self, info: VideoInfo) -> None:
        self.info = info
        self.tolerant = False
        self.fresh = True
        self._numbers = {pts: number for number, pts in enumerate(info.index.frames.tolist())}
        self._places: dict[int, int] = {}
        for place, pts in enumerate(info.index.pts.tolist()):
            self._places.setdefault(pts, place)
        self._open()

    def tolerate_damage(self) -> None:
        """From now on decode in one thread, where an error costs only the packet at fault."""
        self.close()
        self.tolerant = True
        self._open()

    def close(self) -> None:
        self.container.close()

    def decode(self, segment: Segment) -> Iterator[tuple[int, VideoFrame]]:
        """Frames of `segment` that are wanted, as the decoder delivers them.

        Raises FFmpegError at a damaged packet unless `tolerate_damage` was called.
        """
        wanted = set(segment.indices)
        for place, packet in self._packets(segment.start):
            if place > segment.stop:
                break
            if place >= segment.start:
                yield from self._received(packet, wanted)
        yield from self._received(None, wanted)

    def _received(
        self, packet: Packet | None, wanted: set[int]
    ) -> Iterator[tuple[int, VideoFrame]]:
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if not self.tolerant:
                raise
            logger.debug("%s: a packet does not decode (%s)", self.info.path, error)
            return
        for frame in frames:
            number = self._numbers.get(frame.pts) if frame.pts is not None else None
            if number is not None and number in wanted:
                yield number, frame

    def _packets(self, start: int) -> Iterator[tuple[int, Packet]]:
        """Packets with their places in decoding order, from `start` or shortly before it."""
        if not (self.fresh and start == 0):
            self.fresh = False
            keys = np.flatnonzero(self.info.index.keyframes[: start + 1])
            # Containers seek by decoding time or by rough position and may land too late: then
            # aim ever further ahead, at last at the beginning of the file.
            step = 1
            while step <= len(keys):
                target = int(self.info.index.pts[keys[-step]])
                found = self._seek(target, start)
                if found is not None:
                    yield from found
                    return
                step *= 2
            self.close()
            self._open()
        self.fresh = False
        yield from enumerate(_filled(self.container.demux(self.stream)))

    def _seek(self, target: int, start: int) -> Iterator[tuple[int, Packet]] | None:
        try:
            self.container.seek(target, stream=self.stream)
        except av.FFmpegError:
            return None
        packets = _filled(self.container.demux(self.stream))
        for packet in packets:
            place = self._places.get(packet.pts) if packet.pts is not None else None
            if place is not None:
                return _numbered(place, packet, packets) if place <= start else None
        return None

    def _open(self) -> None:
        self.container = open_container(self.info.path)
        self.stream = video_stream(self.container, self.info.path)
        self.stream.thread_type = "SLICE" if self.tolerant else "AUTO"
        self.stream.thread_count = 1 if self.tolerant else min(_MAX_THREADS, os.cpu_count() or 1)
        self.fresh = True


def _filled(packets: Iterator[Packet]) -> Iterator[Packet]:
    """Without the empty packet that marks the end: the reader drains the decoder itself."""
    return (packet for packet in packets if packet.size)


def _numbered(place: int, first: Packet, rest: Iterator[Packet]) -> Iterator[tuple[int, Packet]]:
    yield place, first
    yield from enumerate(rest, place + 1)


def _upright(
    frame: VideoFrame, info: VideoInfo, reformatter: VideoReformatter
) -> NDArray[np.uint8]:
    """Convert to RGB (height, width, 3) by the frame's own colour matrix and range, upright."""
    width, height = info.width, info.height
    if info.rotation % 180:
        width, height = height, width
    # Width and height are given because a stream may change its size on the way.
    picture = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=frame.colorspace,
        dst_colorspace=Colorspace.ITU601,
        src_color_range=frame.color_range,
        dst_color_range=ColorRange.JPEG,
    )
    plane = picture.planes[0]
    rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)[:height]
    return np.rot90(rows[:, : 3 * width].reshape(height, width, 3), info.rotation // 90)
