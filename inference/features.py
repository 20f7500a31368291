"""Encode: run frames through the vision tower a few at a time and keep features in host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture, Pixels
from ..core.errors import FlexSelectError
from ..core.layout import Layout, Prompt

logger = logging.getLogger(__name__)

#: Frames in the tower at a time. Enough to fill a GPU; halved where memory does not allow it.
FRAMES_PER_CHUNK = 32

#: Just below the 32 MiB up to which glibc lets its threshold grow.
_LARGEST_KEPT = 31 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Features:
    """What the tower saw: host tensors, one row a feature token, in prompt order.

    Attributes
    ----------
    model : ``(feature tokens, hidden)``.
    selector : ``(feature tokens, selector hidden)``, or None without a Lite selector.
    """

    model: Tensor
    selector: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt with the features of its clips: all a method needs.

    Attributes
    ----------
    prompt : the layout.
    features : see `Features`.
    times : for each video, float64 ``(frames,)`` in seconds.
    durations : seconds of each video, where known.
    """

    prompt: Prompt
    features: Features
    times: tuple[Tensor, ...]
    durations: tuple[float, ...] = ()


@torch.no_grad()
def encode(
    architecture: Architecture,
    chunks: Iterable[Pixels],
    selector: Any | None = None,
    frames_per_chunk: int = FRAMES_PER_CHUNK,
    progress: Progress | None = None,
    total: int = 0,
) -> Features:
    """Encode clips, or a stream of pieces of one, a few frames at a time.

    Device memory holds one chunk, however long the video. When even that does not fit, the chunk
    is halved and encoding goes on with the smaller one.

    Parameters
    ----------
    architecture : whose tower.
    chunks : pixels in prompt order; consumed one by one.
    selector : also encode for this Lite selector.
    frames_per_chunk : most frames in the tower at a time.
    progress : called with ("encode", frames done, ``total``).
    total : frames to come, for the progress display.
    """
    keep_freed_memory()
    ours, theirs = _HostCopies(), _HostCopies()
    done = 0
    for pixels in chunks:
        start = 0
        while start < pixels.clip.frames:
            stop = min(start + frames_per_chunk, pixels.clip.frames)
            try:
                model, extra = architecture.encode(pixels.frames(start, stop), selector)
            except torch.OutOfMemoryError as error:
                if stop - start == 1:
                    raise FlexSelectError(
                        "The device has too little free memory to encode a single frame. Lower the "
                        "resolution, load the model in bfloat16, or free the device."
                    ) from error
                failed = True
            else:
                failed = False
            if failed:
                # Only out here has the traceback let go of the chunk's activations.
                frames_per_chunk = (stop - start) // 2
                logger.warning(
                    "Out of device memory while encoding %d frames at a time; going on with %d.",
                    stop - start,
                    frames_per_chunk,
                )
                release_cache()
                continue
            ours.add(model)
            if extra is not None:
                theirs.add(extra)
            done += stop - start
            start = stop
            if progress is not None:
                progress("encode", done, total)
    parts, extras = ours.arrived(), theirs.arrived()
    if not parts:
        raise FlexSelectError("There was no frame to encode.")
    return Features(_joined(parts), _joined(extras) if extras else None)


def assemble(
    layout: Layout,
    rows: Tensor,
    features: Tensor,
    embed: Callable[[Tensor], Tensor],
    place: Tensor | None = None,
) -> Tensor:
    """Embed the tokens ``rows``: text by ``embed``, feature tokens from ``features``.

    Parameters
    ----------
    layout : of the whole prompt ``features`` belong to.
    rows : int64 ``(n,)``, token indices.
    features : host ``(feature tokens, hidden)``; only the rows needed go to the device.
    embed : text ids ``(n,)`` to ``(n, hidden)``.
    place : int64 ``(tokens,)``, the row of ``features`` that each feature token has; found from
        ``layout`` unless given, which saves time when one layout is assembled in many parts.

    Returns
    -------
    ``(n, hidden)``, on the device and in the dtype of ``embed``.
    """
    here = layout.feature[rows]
    if not bool(here.any()):
        return embed(layout.ids[rows])
    # Placeholder ids are never embedded; some families' lie outside the table.
    embeds = embed(layout.ids[rows].masked_fill(here, 0))
    if place is None:
        place = layout.feature.cumsum(0) - 1
    wanted = place[rows[here]]
    seen = features.index_select(0, wanted.to(features.device)).to(embeds.device, embeds.dtype)
    return embeds.index_copy(0, here.nonzero()[:, 0].to(embeds.device), seen)


class _HostCopies:
    """Tensors on their way to the host: the latest travels while the device works on the next.

    Page-locked memory, which a device can write to by itself, is held for one chunk only.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._travelling: tuple[Tensor, Callable[[], None]] | None = None

    def add(self, part: Tensor) -> None:
        """Send a tensor on its way, and take in the one before it."""
        if part.device.type != "cuda":
            self._parts.append(part.cpu())
            return
        sent = _send(part)
        self._take_in()
        self._travelling = sent

    def arrived(self) -> list[Tensor]:
        """Return all tensors, on the host, in the order they were added."""
        self._take_in()
        return self._parts

    def _take_in(self) -> None:
        if self._travelling is not None:
            locked, wait = self._travelling
            wait()
            self._parts.append(locked.clone())
            self._travelling = None


def _send(part: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Begin a copy to page-locked memory; return that, and what waits until the copy is whole."""
    locked = torch.empty_like(part, device="cpu", pin_memory=True)
    locked.copy_(part, non_blocking=True)
    copied = torch.cuda.current_stream(part.device).record_event()
    return locked, copied.synchronize


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate ``parts`` and empty the list on the way, so that nothing is held twice."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    stop = len(whole)
    while parts:
        part = parts.pop()
        whole[stop - len(part) : stop] = part
        stop -= len(part)
    return whole


def keep_freed_memory() -> None:
    """Let the C library keep the host memory of activations for the next layer's.

    glibc hands a large block straight back to the system when it is freed, and taking it again
    costs a page fault every 4 KiB: a tenth of a scoring pass on a CPU. What counts as large is what
    it has seen freed, so it is shown one block, of which no page is ever touched. Elsewhere this
    does nothing.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


def release_cache() -> None:
    """Give memory that torch keeps for later back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
