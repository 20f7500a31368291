"""A question about an opened video, ready to be ranked at any layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.errors import OptionError
from ..core.layout import Prompt
from ..inference.features import Encoded
from ..inference.methods import FlexSelect
from ..inference.scoring import FrameSet, split_prompt
from ..inference.session import Video, check_question


@dataclass(frozen=True, eq=False)
class Asked:
    """What the layers of a model, or of a Lite selector, are to rank.

    Attributes
    ----------
    encoded : the conversation with the features of the video.
    prompt, sets, features, scorer : as `inference.scoring.score` takes them: in the tokens of what
        ranks, which is the selector where the method has one.
    """

    encoded: Encoded
    prompt: Prompt
    sets: list[FrameSet]
    features: Tensor
    scorer: Any

    @property
    def num_layers(self) -> int:
        """Layers of what ranks."""
        layers: int = self.scorer.num_layers
        return layers


def ask_layers(video: Video, question: str) -> Asked:
    """Lay out a first question about ``video`` as `Video.ask` would.

    Raises `OptionError` for a video that was opened with a method that does not rank, and
    `PromptError` for an empty question.
    """
    method, architecture = video.engine.method, video.engine.architecture
    if not isinstance(method, FlexSelect):
        raise OptionError(
            f"The method {method.name!r} ranks nothing at any layer. Open the video with "
            "FlexSelect()."
        )
    assert method.frames_per_set is not None
    content = [{"type": "video"}, {"type": "text", "text": check_question(question)}]
    encoded = video.encoded([{"role": "user", "content": content}], 0)
    prompt, features, scorer = encoded.prompt, encoded.features.model, architecture
    if method.selector is not None:
        assert encoded.features.selector is not None
        scorer, features = method.selector, encoded.features.selector
        prompt = method.selector.localise(prompt)
    sets = split_prompt(prompt, scorer, method.frames_per_set, method.query == "last")
    return Asked(encoded, prompt, sets, features, scorer)
