"""Reading: how relevant the kept tokens were when the model read all of them, to answer.

The pass that answers computes the states this needs anyway, so it is listened to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.decoder import LayerStates, listening, slides_below
from ..core.layout import Prompt
from ..core.relevance import relevance
from ..core.selection import Selection
from .engine import Engine, kept_rows


@dataclass(eq=False)
class Reading:
    """What was heard of one answer.

    Attributes
    ----------
    knobs : ``layer``, ``query`` and ``aggregation`` it was read by; None where nothing can be.
    relevance : float32 ``(kept,)``, on the model's device; None where nothing was heard.
    """

    knobs: dict[str, Any] | None
    relevance: Tensor | None = None

    def added_to(self, selection: Selection) -> Selection:
        """Return ``selection`` with the reading, and its knobs in the settings, if any was heard.

        Relevance that is not finite says nothing and is left out: a model that overflows in half
        precision answers nonsense, which is no reason to keep the answer back.
        """
        heard = None if self.relevance is None else self.relevance.cpu()
        if heard is None or not bool(heard.isfinite().all()):
            return selection
        return replace(
            selection, reading=heard, settings={**selection.settings, "reading": self.knobs}
        )


@contextmanager
def hearing(engine: Engine, prompt: Prompt, selection: Selection) -> Iterator[Reading]:
    """Listen to the model while it reads what ``selection`` keeps of ``prompt``.

    Relevance is what it is in a set of frames: the same text asks, at the same layer. Only here all
    that was kept stands in one softmax.

    Parameters
    ----------
    engine : what answers.
    prompt, selection : the whole prompt, and what stays of it.

    Yields
    ------
    A `Reading` that is filled when the model has read the prompt. It stays empty where no layer can
    be listened to, and where the prompt is not read in one pass.
    """
    knobs = reading_knobs(engine)
    reading = Reading(knobs)
    if knobs is None or not len(selection.kept):
        yield reading
        return
    layout = prompt.layout.take(kept_rows(prompt, selection.kept))
    columns, asking = layout.visual.nonzero()[:, 0], layout.query.nonzero()[:, 0]
    if knobs["query"] == "last":
        asking = asking[-1:]

    def heard(states: LayerStates) -> None:
        reading.relevance = relevance(
            states.query, states.key, asking, columns, aggregation=knobs["aggregation"]
        )[0]

    with listening(engine.architecture.decoder, knobs["layer"], len(layout), asking, heard):
        yield reading


def reading_knobs(engine: Engine) -> dict[str, Any] | None:
    """Return how ``engine``'s model is read: ``layer``, ``query``, ``aggregation``.

    The method's own, else the model's preset's. None where that layer is not there, or lies above
    one with a sliding window: relevance is defined over full attention.
    """
    preset = {name: engine.preset.method[name] for name in ("layer", "query", "aggregation")}
    knobs = {**preset, **engine.method.reading_knobs}
    architecture = engine.architecture
    if knobs["layer"] >= architecture.num_layers:
        return None
    return None if slides_below(architecture.decoder, knobs["layer"]) else knobs
