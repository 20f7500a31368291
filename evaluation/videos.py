"""Opened videos, kept for the next question about them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..core.errors import VideoError
from ..inference.engine import Engine
from ..inference.features import FRAMES_PER_CHUNK
from ..inference.session import Video, open_video
from .identity import file_identity


class OpenVideos:
    """Videos by path, the least recently used let go first.

    Methods that encode alike share them: a video opened for one is not decoded again for another.

    Parameters
    ----------
    limit_gb : most GiB of features kept. The latest video always stays.

    Attributes
    ----------
    opened, shared : how often a video was decoded and encoded, and how often that was spared.
    spared : seconds of decoding and encoding that were not spent again.
    """

    def __init__(self, limit_gb: float) -> None:
        self.opened = 0
        self.shared = 0
        self.spared = 0.0
        self._limit = int(limit_gb * 2**30)
        self._kept: OrderedDict[tuple[Any, ...], Video | str] = OrderedDict()

    def get(
        self,
        path: str,
        engine: Engine,
        processor: Any,
        *,
        backend: str,
        frames_per_chunk: int | None,
        sampling: Mapping[str, Any],
    ) -> tuple[Video, bool]:
        """Return a video bound to ``engine``, and whether it had to be opened for it.

        Raises
        ------
        VideoError
            The file is missing or damaged; said again for every question, without another try until
            the file changes.
        """
        selector = engine.method.encodes_for
        loaded = (id(engine.model), id(selector))
        key = (file_identity(path), loaded, backend, tuple(sorted(sampling.items())))
        kept = self._kept.get(key)
        fresh = kept is None
        if kept is None:
            try:
                kept = open_video(
                    engine.model,
                    processor,
                    path,
                    method=engine.method,
                    backend=backend,
                    frames_per_chunk=frames_per_chunk or FRAMES_PER_CHUNK,
                    **sampling,
                )
                self.opened += 1
            except VideoError as error:
                kept = str(error)
            self._kept[key] = kept
            self._shrink()
        else:
            self._kept.move_to_end(key)
            if isinstance(kept, Video):
                self.shared += 1
                self.spared += sum(kept.seconds.values())
        if isinstance(kept, str):
            raise VideoError(kept)
        return dataclasses.replace(kept, engine=engine), fresh

    def _shrink(self) -> None:
        sizes = {key: _size(kept) for key, kept in self._kept.items()}
        total = sum(sizes.values())
        for key in list(self._kept)[:-1]:
            if total <= self._limit:
                break
            total -= sizes[key]
            del self._kept[key]


def _size(kept: Video | str) -> int:
    if isinstance(kept, str):
        return 0
    features = (kept.features.model, kept.features.selector)
    return sum(tensor.nbytes for tensor in features if tensor is not None)
