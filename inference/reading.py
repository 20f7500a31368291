"""Reading: how the model looked at the kept tokens when it read all of them, to answer.

The pass that answers computes the states this needs anyway, so it is listened to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.decoder import LayerStates, full_layers
from ..core.layout import Prompt
from ..core.relevance import relevance
from ..core.selection import Selection
from .engine import Engine, kept_rows


@dataclass(eq=False)
class Reading:
    """What was heard of one answer.

    Attributes
    ----------
    layers : how many layers are listened to.
    heard : how many were heard so far.
    total : float32 ``(kept,)``, sum over those layers, on the device of the latest; None where
        nothing was heard.
    """

    layers: int
    heard: int = 0
    total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add what one more layer gives: float32 ``(kept,)``."""
        self.heard += 1
        self.total = values if self.total is None else self.total.to(values.device) + values

    def added_to(self, selection: Selection) -> Selection:
        """Return ``selection`` with the reading, if the whole of it was heard.

        What is not finite says nothing and is left out: a model that overflows in half precision
        answers nonsense, which is no reason to keep the answer back.
        """
        if self.total is None or self.heard < self.layers:
            return selection
        mean = self.total.cpu() / self.layers
        return replace(selection, reading=mean) if bool(mean.isfinite().all()) else selection


@contextmanager
def hearing(engine: Engine, prompt: Prompt, selection: Selection) -> Iterator[Reading]:
    """Listen to the model while it reads what ``selection`` keeps of ``prompt``.

    A kept token's reading is the attention that the prompt's last token, from whose state the
    answer's first word is chosen, pays it: the mean over heads and over all layers of full
    attention. There is no layer to choose, so it says the same of every method.

    Parameters
    ----------
    engine : what answers.
    prompt, selection : the whole prompt, and what stays of it.

    Yields
    ------
    A `Reading` that is filled when the model has read the prompt. It stays empty where no layer has
    full attention, where layers are compiled, and where the prompt is not read in one pass.
    """
    layers = full_layers(engine.architecture.decoder)
    reading = Reading(len(layers))
    if not len(selection.kept):
        yield reading
        return
    layout = prompt.layout.take(kept_rows(prompt, selection.kept))
    columns, last = layout.visual.nonzero()[:, 0], layout.query.nonzero()[-1:, 0]

    def heard(states: LayerStates) -> None:
        reading.add(relevance(states.query, states.key, last, columns, aggregation="mean")[0])

    with engine.architecture.listening(layers, len(layout), last, heard):
        yield reading
