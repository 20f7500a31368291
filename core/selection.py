"""The outcome of a selection: which visual tokens stay, their relevance, and what decided it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

_TENSORS, _RECORD = ".safetensors", ".json"


def top_tokens(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the ``k`` highest scores, ascending.

    Equal scores are decided by position, lower first, so the result is the same on every device
    and every run; in half precision ties are common (fixtures, C4). Nothing waits for the device.

    Parameters
    ----------
    scores : float32 ``(tokens,)``, finite.
    k : how many, at most ``tokens``.

    Returns
    -------
    int64 ``(k,)``
    """
    # The bits of a float32 order like the number once negatives are flipped. With the position in
    # the low half no two keys are equal, and top-k of integers leaves nothing to chance.
    bits = scores.float().add(0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits.bitwise_xor(0x7FFFFFFF), bits)
    position = torch.arange(len(scores), device=scores.device)
    return position[(ordered << 32).sub(position).topk(k).indices].sort().values


def select_from_sets(scores: Tensor, members: Sequence[Tensor], quotas: Sequence[int]) -> Tensor:
    """Keep the best tokens of every set and map them back to the whole.

    Parameters
    ----------
    scores : float32 ``(visual,)``, over all visual tokens.
    members : for each set, int64 ``(tokens of the set,)``: its positions in ``scores``, ascending.
    quotas : for each set, how many to keep.

    Returns
    -------
    int64 ``(sum(quotas),)``, positions in ``scores``, ascending.
    """
    pairs = [(rows, quota) for rows, quota in zip(members, quotas, strict=True) if quota]
    if not pairs:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    best = [top_tokens(scores[rows], quota) for rows, quota in pairs]
    return map_back(best, [rows for rows, _ in pairs])


def map_back(best: Sequence[Tensor], members: Sequence[Tensor]) -> Tensor:
    """Return places in the whole of tokens chosen set by set: int64, ascending.

    Parameters
    ----------
    best : for each set, int64 ``(chosen,)``, which of its tokens.
    members : for each set, int64 ``(tokens of the set,)``, their places in the whole.
    """
    return torch.cat([rows[chosen] for rows, chosen in zip(members, best, strict=True)]).sort()[0]


@dataclass(frozen=True)
class Moment:
    """A stretch of a video that the answer was read from.

    Attributes
    ----------
    start, end : seconds from the beginning of the video.
    score : what its best frame counts by `Selection.moment_scores`: comparable within a selection,
        not between those that were made or read differently.
    kept : visual tokens kept in it.
    video : which video of the prompt.
    first_frame, last_frame : its frames, both included.
    """

    start: float
    end: float
    score: float
    kept: int
    video: int = 0
    first_frame: int = 0
    last_frame: int = 0


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method decided for one prompt. Tensors are on the host.

    Attributes
    ----------
    kept : int64 ``(kept,)``, positions among the prompt's visual tokens, ascending.
    video, frame : int64 ``(visual,)``, the video and the frame within it of every visual token.
    times : for each video, float64 ``(frames,)``: when each frame is shown, in seconds. A
        processor that does not say how far frames are apart makes them one second apart.
    scores : float32 ``(visual,)`` relevance, or None for a method that does not score.
    settings : what decided the result: method, its knobs, model, layer, versions.
    durations : seconds of each video; empty where only its frames' times are known.
    reading : float32 ``(kept,)``, attention that every kept token got where the model read all of
        them together, in the pass that it answered by: from the prompt's last token, the mean over
        heads and layers; None where nobody listened to that. ``scores`` are of sets of frames: a
        softmax over each, so they order the tokens of a set, but some token of a set in which
        nothing fits the question gets a high share too. Here all kept tokens share one softmax, and
        compare. `Chat.ask` and `Video.ask` listen, whatever the method, but cannot hear compiled
        layers; an applied model's ``generate`` does not listen.
    """

    kept: Tensor
    video: Tensor
    frame: Tensor
    times: tuple[Tensor, ...]
    scores: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    durations: tuple[float, ...] = ()
    reading: Tensor | None = None

    @property
    def num_visual(self) -> int:
        """Visual tokens before the selection."""
        return len(self.frame)

    def kept_per_frame(self, video: int = 0) -> Tensor:
        """Count the kept tokens of every frame of ``video``: int64 ``(frames,)``."""
        mine = self.kept[self.video[self.kept] == video]
        return torch.bincount(self.frame[mine], minlength=len(self.times[video]))

    def frame_scores(self, video: int = 0) -> Tensor:
        """Score of the best token of every frame of ``video``: float32 ``(frames,)``."""
        if self.scores is None:
            raise ValueError("This selection was made without scores.")
        mine = self.video == video
        best = torch.zeros(len(self.times[video]))
        return best.scatter_reduce(0, self.frame[mine], self.scores[mine], "amax")

    def moment_scores(self, video: int = 0) -> Tensor | None:
        """Return what `moments` ranks the frames of ``video`` by: float32 ``(frames,)``.

        Each frame counts as its best kept token, 0 where it keeps none. A token counts as the
        geometric mean of its ``reading`` and its score, or as the one of them that is there; of a
        selection that was not read this is `frame_scores`, and None without scores too.
        """
        if self.reading is None:
            return None if self.scores is None else self.frame_scores(video)
        mine = self.video[self.kept] == video
        kept, worth = self.kept[mine], self.reading[mine]
        if self.scores is not None:
            # A method of one's own may score below 0, which is no relevance, as in `frame_scores`.
            worth = (worth * self.scores[kept].clamp(min=0)).sqrt()
        best = torch.zeros(len(self.times[video]))
        return best.scatter_reduce(0, self.frame[kept], worth, "amax")

    def moments(self, limit: int = 5) -> list[Moment]:
        """Name the stretches of video with the most relevant frames, best first.

        Frames are ranked by what stands out twice: by ``reading``, when the model read all that
        was kept together, to answer, and by ``scores``, among everything in its set of frames.
        Where nobody listened to the answer (``generate`` of an applied model, lmms-eval) they are
        ranked by ``scores`` alone, which compare less well from set to set.

        A stretch grows from its best frame to both sides while frames keep a token and score at
        least half of it. Empty for a selection with neither reading nor scores.
        """
        found: list[Moment] = []
        for video in range(len(self.times)):
            ranked = self.moment_scores(video)
            if ranked is not None:
                found += self._moments_of(video, ranked.tolist(), limit)
        return sorted(found, key=lambda moment: -moment.score)[:limit]

    def _moments_of(self, video: int, scores: list[float], limit: int) -> list[Moment]:
        kept = self.kept_per_frame(video).tolist()
        times = self.times[video].tolist()
        if self.durations:
            stop = self.durations[video]
        else:
            stop = times[-1] + (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        free = [count > 0 for count in kept]
        moments: list[Moment] = []
        for peak in sorted(range(len(scores)), key=lambda i: -scores[i]):
            if len(moments) == limit:
                break
            if not free[peak]:
                continue
            belongs = [free[i] and scores[i] >= scores[peak] / 2 for i in range(len(scores))]
            first = last = peak
            while first > 0 and belongs[first - 1]:
                first -= 1
            while last + 1 < len(scores) and belongs[last + 1]:
                last += 1
            free[first : last + 1] = [False] * (last + 1 - first)
            # A frame is on screen until the next one comes.
            end = times[last + 1] if last + 1 < len(times) else max(stop, times[last])
            count = sum(kept[first : last + 1])
            moments.append(Moment(times[first], end, scores[peak], count, video, first, last))
        return moments

    def save(self, path: str | Path) -> None:
        """Write ``path`` with the endings ``.safetensors`` (tensors) and ``.json`` (the rest)."""
        path = Path(path)
        tensors = {"kept": self.kept, "video": self.video, "frame": self.frame}
        tensors |= {f"times.{i}": times for i, times in enumerate(self.times)}
        optional = {"scores": self.scores, "reading": self.reading}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        # safetensors refuses tensors that share memory, as these may.
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        pair = uuid.uuid4().hex
        record = {
            "pair": pair,
            "kept": len(self.kept),
            "visual": self.num_visual,
            "moments": [vars(moment) for moment in self.moments()],
            "durations": list(self.durations),
            "settings": self.settings,
        }
        text = json.dumps(record, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Both are written aside and moved, so that an interruption leaves no half of either; the
        # pair's name in both tells when only one was moved.
        parts = {
            ending: path.with_name(f".{path.name}.part{ending}") for ending in (_TENSORS, _RECORD)
        }
        try:
            save_file(tensors, parts[_TENSORS], metadata={"pair": pair})
            parts[_RECORD].write_text(text)
            for ending, part in parts.items():
                os.replace(part, path.with_name(path.name + ending))
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote to ``path``; raises `CheckpointError` where that is not there."""
        path = Path(path)
        try:
            with safe_open(path.with_name(path.name + _TENSORS), "pt") as file:
                pair = (file.metadata() or {}).get("pair")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(path.with_name(path.name + _RECORD).read_text())
            if record["pair"] != pair:
                raise CheckpointError(
                    f"{path}: tensors and record are of two selections, as after an interrupted "
                    "save. Make the selection again."
                )
            if len(tensors.get("reading", tensors["kept"])) != len(tensors["kept"]):
                raise CheckpointError(
                    f"{path}: its reading is not of the tokens that it keeps. Make the "
                    "selection again."
                )
            count = sum(name.startswith("times.") for name in tensors)
            return cls(
                kept=tensors["kept"],
                video=tensors["video"],
                frame=tensors["frame"],
                times=tuple(tensors[f"times.{i}"] for i in range(count)),
                scores=tensors.get("scores"),
                settings=record["settings"],
                durations=tuple(record["durations"]),
                reading=tensors.get("reading"),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: no readable selection there ({error}). Give the path that was saved to, "
                "without an ending."
            ) from error
