"""The methods: each turns an encoded prompt into the visual tokens that stay.

A method is a dataclass whose fields are its knobs. A knob left at None takes the preset of the
model. Calling a method on a model is a context: ``with FlexSelect(budget=4096)(model): ...``.
"""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.budget import check_budget, set_quotas, video_budgets
from ..core.decoder import check_layer
from ..core.errors import FlexSelectError, OptionError
from ..core.relevance import check_aggregation
from ..core.selection import Selection, select_from_sets
from .features import Encoded, Progress
from .scoring import score, split_prompt
from .sharing import Share

Positions = Literal["original", "compact"]
Query = Literal["all", "last"]

M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Method(ABC):
    """What all methods share.

    Attributes
    ----------
    positions : position ids of what stays: ``"original"`` ids with gaps, or ``"compact"`` ones as
        if nothing had been dropped between.
    """

    #: Name in tables and records.
    name: ClassVar[str]

    positions: Positions | None = None

    @abstractmethod
    def keep(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decide: int64 ``(kept,)`` ascending, and float32 ``(visual,)`` scores or None."""

    def select(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> Selection:
        """Run the method on one encoded prompt."""
        kept, scores = self.keep(encoded, architecture, progress)
        layout = encoded.prompt.layout
        return Selection(
            # A method of one's own may say them in another order, or score in half precision.
            kept=kept.sort().values.cpu(),
            video=layout.video[layout.visual],
            frame=layout.frame[layout.visual],
            times=encoded.times,
            durations=encoded.durations,
            scores=None if scores is None else scores.float().cpu(),
            settings=self.record(),
        )

    def resolve(self: M, architecture: Architecture, preset: Mapping[str, Any]) -> M:
        """Fill knobs left at None from ``preset`` and check all of them against the model."""
        knobs = {field.name for field in dataclasses.fields(self)}
        missing = {
            name: value
            for name, value in preset.items()
            if name in knobs and getattr(self, name) is None
        }
        method = dataclasses.replace(self, **missing)
        method.check(architecture)
        return method

    def check(self, architecture: Architecture) -> None:
        """Raise `OptionError` for a knob that ``architecture`` cannot serve."""
        _one_of("positions", self.positions, ("original", "compact"))

    @property
    def encodes_for(self) -> Any | None:
        """The Lite selector that features must be encoded for, if the method has one."""
        return None

    def record(self) -> dict[str, Any]:
        """Return the knobs, as they go into run records."""
        return {"method": self.name, **dataclasses.asdict(self)}

    def __call__(self, model: Any) -> AbstractContextManager[Any]:
        """Apply the method to ``model`` for one block."""
        from .apply import apply, remove

        @contextmanager
        def applied() -> Iterator[Any]:
            apply(model, self)
            try:
                yield model
            finally:
                remove(model)

        return applied()


@dataclass(frozen=True)
class Full(Method):
    """Keep every visual token: the model as it is, encoded in chunks."""

    name = "full"

    def keep(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Keep all."""
        return torch.arange(encoded.prompt.num_visual), None


@dataclass(frozen=True)
class Budgeted(Method):
    """A method that keeps at most a number of visual tokens.

    Attributes
    ----------
    budget : visual tokens that may stay, over all videos of a prompt.
    """

    budget: int | None = None

    def check(self, architecture: Architecture) -> None:
        """Check the budget too."""
        super().check(architecture)
        check_budget(self.budget)

    def quota(self, encoded: Encoded, architecture: Architecture) -> int:
        """Return the budget as the family's reference rounds it for this prompt."""
        return architecture.effective_budget(check_budget(self.budget), encoded.prompt)

    def shares(self, encoded: Encoded, architecture: Architecture) -> list[tuple[Tensor, int]]:
        """For each video: int64 positions of its visual tokens, and how many may stay."""
        layout = encoded.prompt.layout
        owner = layout.video[layout.visual]
        members = [(owner == i).nonzero()[:, 0] for i in range(len(encoded.prompt.videos))]
        budgets = video_budgets(self.quota(encoded, architecture), [len(own) for own in members])
        return list(zip(members, budgets, strict=True))


@dataclass(frozen=True)
class Uniform(Budgeted):
    """Keep whole frames, evenly spaced, as many as the budget holds. The usual control."""

    name = "uniform"

    def keep(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Keep the frames in the middle of equal stretches of each video."""
        layout = encoded.prompt.layout
        frame = layout.frame[layout.visual]
        kept = []
        for (members, budget), clip in zip(
            self.shares(encoded, architecture), encoded.prompt.videos, strict=True
        ):
            count = min(clip.frames, budget * clip.frames // len(members))
            if count == 0:
                continue
            middle = (torch.arange(count, dtype=torch.float64) + 0.5) * clip.frames / count
            kept.append(members[torch.isin(frame[members], middle.long())])
        if not kept:
            raise OptionError(
                f"budget={self.budget} holds no whole frame of this video; uniform keeps whole "
                "frames. Raise the budget."
            )
        return torch.cat(kept).sort().values, None


@dataclass(frozen=True)
class Random(Budgeted):
    """Keep visual tokens drawn at random.

    Attributes
    ----------
    seed : together with the prompt itself decides the draw, so a prompt's draw does not depend on
        what else is in its batch.
    """

    name = "random"

    seed: int = 0

    def check(self, architecture: Architecture) -> None:
        """Check the seed too."""
        super().check(architecture)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"seed must be a whole number of at least 0, got {self.seed!r}.")

    def keep(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw without replacement, in each video its share."""
        key = zlib.crc32(encoded.prompt.layout.ids.numpy().tobytes(), self.seed)
        draw = torch.Generator().manual_seed(key)
        kept = [
            members[torch.randperm(len(members), generator=draw)[:budget]]
            for members, budget in self.shares(encoded, architecture)
        ]
        return torch.cat(kept).sort().values, None


@dataclass(frozen=True)
class FlexSelect(Budgeted):
    """Keep the visual tokens that the question attends to (arXiv 2506.00993).

    Without a selector the model ranks for itself at its reference layer (training-free); with one,
    the small selector ranks (FlexSelect-Lite).

    Attributes
    ----------
    layer : reference layer, counted from 0. With a selector: the selector's last layer.
    selector : a Lite selector, or the path or hub id of one.
    aggregation : ``"max"`` or ``"mean"`` over heads and asking tokens. With a selector: what its
        config says, unless given.
    query : which text asks: ``"all"`` after the video, or only the ``"last"`` token.
    frames_per_set : most frames of a set.
    sets_per_batch : most sets scored in one pass; default: by their length, so that a pass keeps
        the device busy. Fewer where its memory does not allow it.
    share_sets : the processes of ``torch.distributed``, all asked the same, score a part of the
        sets each and exchange what they keep. All keep what one process would; scores of tokens
        that are not kept are 0.
    """

    name = "flexselect"

    layer: int | None = None
    selector: Any | None = None
    aggregation: str | None = None
    query: Query | None = None
    frames_per_set: int | None = None
    sets_per_batch: int | None = None
    share_sets: bool = False

    def resolve(self, architecture: Architecture, preset: Mapping[str, Any]) -> FlexSelect:
        """Fill knobs and load the selector."""
        method = self
        if self.selector is not None:
            selector = self.selector
            if isinstance(selector, str) or hasattr(selector, "__fspath__"):
                selector = architecture.load_selector(str(selector))
            architecture.check_selector(selector)
            method = dataclasses.replace(
                self,
                selector=selector,
                layer=selector.num_layers - 1 if self.layer is None else self.layer,
                aggregation=self.aggregation or selector.aggregation,
            )
        method = super(FlexSelect, method).resolve(architecture, preset)
        return dataclasses.replace(method, aggregation=check_aggregation(str(method.aggregation)))

    def check(self, architecture: Architecture) -> None:
        """Check every knob."""
        super().check(architecture)
        scorer = architecture if self.selector is None else self.selector
        check_layer(self.layer, scorer.num_layers)
        check_aggregation(str(self.aggregation))
        _one_of("query", self.query, ("all", "last"))
        _count("frames_per_set", self.frames_per_set)
        if self.sets_per_batch is not None:
            _count("sets_per_batch", self.sets_per_batch)
        _one_of("share_sets", self.share_sets, (True, False))

    @property
    def encodes_for(self) -> Any | None:
        """The Lite selector."""
        return self.selector

    def record(self) -> dict[str, Any]:
        """Name the selector by where it came from."""
        knobs = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Who does the work decides nothing.
        del knobs["share_sets"]
        if self.selector is not None:
            knobs["selector"] = getattr(self.selector, "name_or_path", "") or "in memory"
        return {"method": self.name if self.selector is None else "flexselect-lite", **knobs}

    def keep(
        self, encoded: Encoded, architecture: Architecture, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Score every set and keep its best tokens, unless the budget covers everything."""
        prompt = encoded.prompt
        if self.quota(encoded, architecture) >= prompt.num_visual:
            return torch.arange(prompt.num_visual), None
        assert self.layer is not None
        assert self.frames_per_set is not None
        if self.selector is None:
            scorer, features = architecture, encoded.features.model
        else:
            if encoded.features.selector is None:
                raise FlexSelectError(
                    "This video was encoded without the selector. Open it again with the selector "
                    "applied."
                )
            scorer, features = self.selector, encoded.features.selector
            prompt = self.selector.localise(prompt)
        sets = split_prompt(prompt, scorer, self.frames_per_set, self.query == "last")
        share = Share.of_this_process() if self.share_sets else None
        scores = score(
            prompt,
            sets if share is None else share.sets(sets),
            features,
            scorer,
            layer=self.layer,
            aggregation=check_aggregation(str(self.aggregation)),
            sets_per_batch=self.sets_per_batch,
            progress=progress,
        )
        quotas: list[int] = []
        for video, (_, budget) in enumerate(self.shares(encoded, architecture)):
            sizes = [len(part.members) for part in sets if part.video == video]
            quotas += set_quotas(budget, sizes)
        if share is not None:
            return share.winners(encoded.prompt, sets, scores, quotas)
        kept = select_from_sets(scores, [p.members.to(scores.device) for p in sets], quotas)
        # Checked where it has to go anyway: on the device, the check would wait for it once more.
        scores = scores.cpu()
        if not bool(scores.isfinite().all()):
            raise FlexSelectError(
                "Relevance is not finite: the model overflowed below its reference layer. Load it "
                "in bfloat16 or float32 instead of float16."
            )
        return kept, scores


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}.")


#: Every method by name, for commands and tables.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Full, Uniform, Random, FlexSelect)
}
