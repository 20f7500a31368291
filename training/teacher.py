"""The teacher: whose ranking of the visual tokens a selector learns.

Online, it is the main model itself at its reference layer. Offline, its scores were written by
``flexselect rank``, and training needs no more of the main model than its vision tower.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture
from ..core.errors import CheckpointError
from ..core.relevance import Aggregation, check_aggregation
from ..inference.methods import FlexSelect
from ..inference.presets import preset_of
from ..inference.scoring import score, split_prompt
from .examples import Example
from .samples import Sample
from .store import ScoreStore, different, prompt_digest

logger = logging.getLogger(__name__)

#: Fields of a model's config that change without changing the model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class OnlineTeacher:
    """The main model, frozen: its relevance at the reference layer. Only layers below it run.

    Parameters
    ----------
    architecture : of the main model.
    layer, aggregation, query, frames_per_set : as in `FlexSelect`; None takes the model's preset.
    sampling : how the samples' videos are sampled (`SampleSet.policy`), for the settings.

    Raises
    ------
    OptionError
        One of them is unknown or out of range.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        layer: int | None = None,
        aggregation: str | None = None,
        query: str | None = None,
        frames_per_set: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        knobs = FlexSelect(
            layer=layer,
            aggregation=aggregation,
            query=query,  # type: ignore[arg-type]  # resolve checks it
            frames_per_set=frames_per_set,
        ).resolve(architecture, preset_of(architecture).method)
        assert knobs.layer is not None
        assert knobs.frames_per_set is not None
        self.architecture = architecture
        self.layer: int = knobs.layer
        self.aggregation: Aggregation = check_aggregation(str(knobs.aggregation))
        self.query: str = str(knobs.query)
        self.frames_per_set: int = knobs.frames_per_set
        self.sampling = dict(sampling or {})

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides a score."""
        return {
            **identity(self.architecture),
            "dtype": str(self.architecture.model.dtype).removeprefix("torch."),
            "layer": self.layer,
            "aggregation": self.aggregation,
            "query": self.query,
            "frames_per_set": self.frames_per_set,
            "sampling": self.sampling,
        }

    def scores(self, sample: Sample, features: Tensor) -> Tensor:
        """Score a sample: float32 ``(visual,)``, on the model's device."""
        sets = split_prompt(
            sample.prompt, self.architecture, self.frames_per_set, self.query == "last"
        )
        return score(
            sample.prompt,
            sets,
            features,
            self.architecture,
            layer=self.layer,
            aggregation=self.aggregation,
        )


class StoredTeacher:
    """Scores that ``flexselect rank`` wrote.

    Parameters
    ----------
    folder : of the store.

    Raises
    ------
    CheckpointError
        There is no store, or it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.store = ScoreStore(folder)
        self.settings: dict[str, Any] = self.store.settings
        self.layer: int = self.settings["layer"]
        self.aggregation: Aggregation = check_aggregation(self.settings["aggregation"])
        self.query: str = self.settings["query"]
        self.frames_per_set: int = self.settings["frames_per_set"]

    def check(self, architecture: Architecture, **expected: Any) -> None:
        """Compare the store with what a selector shall be trained for.

        Parameters
        ----------
        architecture : of the main model, whose layers need not be loaded.
        expected : any of the settings, such as ``layer``, ``aggregation`` or ``sampling``.

        Raises
        ------
        CheckpointError
            They differ; the message says in what.
        """
        here = json.loads(json.dumps({**identity(architecture), **expected}))
        there = {name: self.settings.get(name) for name in here}
        # Weights that are not loaded cannot be compared.
        if here.get("weights") is None:
            del here["weights"], there["weights"]
        differ = different(there, here)
        if differ:
            raise CheckpointError(
                f"{self.store.folder} holds scores of {self.store.made_by.get('model', 'a model')} "
                f"for something else: {', '.join(differ)}. Train with these settings, or run "
                "flexselect rank with others into another folder."
            )

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples that have scores; how many were damaged is logged.

        Raises
        ------
        CheckpointError
            Some were never ranked: better known before a long training than in its middle.
        """
        entries = self.store.entries
        missing = [example.id for example in examples if example.id not in entries]
        if missing:
            raise CheckpointError(
                f"{self.store.folder} holds no scores of {len(missing)} of {len(examples)} "
                f"samples, such as {missing[0]}. Run flexselect rank with this data and the same "
                "--out again: it adds what is missing."
            )
        kept = [example for example in examples if entries[example.id].damaged is None]
        if len(kept) < len(examples):
            logger.warning(
                "%d samples were damaged when they were ranked and are left out.",
                len(examples) - len(kept),
            )
        return kept

    def scores(self, sample: Sample, features: Tensor | None = None) -> Tensor:
        """Look the scores of a sample up: float32 ``(visual,)``, on the host.

        Raises
        ------
        CheckpointError
            They are not there, are damaged, or belong to another prompt or number of frames.
        """
        entry = self.store.entry(sample.example.id)
        scores = self.store.scores(sample.example.id)
        prompt = sample.prompt
        where = f"{self.store.folder}, sample {sample.example.id}"
        if entry.frames != prompt.num_frames:
            raise CheckpointError(
                f"{where}: the scores are of {entry.frames} frames, but the sample has "
                f"{prompt.num_frames}. Sample the videos as they were ranked: "
                f"{self.settings['sampling']}."
            )
        if entry.tokens != prompt.num_visual or entry.prompt != prompt_digest(prompt):
            raise CheckpointError(
                f"{where}: the scores are of another prompt ({entry.tokens} visual tokens, the "
                f"sample has {prompt.num_visual}). Question, chat template, tokenizer or picture "
                "size differ from those that were ranked."
            )
        return scores


def identity(architecture: Architecture) -> dict[str, Any]:
    """Name a model by what it is, not by where it lies.

    Returns
    -------
    ``family``; ``config``, a digest of its configuration; and ``weights``, a digest of the norms
    of its decoder, None where they are not loaded.
    """
    config = _settled(architecture.model.config.to_dict())
    content = json.dumps(config, sort_keys=True, default=str).encode()
    norms = [block.input_layernorm.weight.detach() for block in architecture.decoder.layers]
    weights = None
    if norms and not any(norm.is_meta for norm in norms):
        # In bfloat16, which every dtype that models come in rounds to alike.
        values = torch.cat([norm.cpu().to(torch.bfloat16).view(torch.int16) for norm in norms])
        weights = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
    return {
        "family": architecture.family,
        "config": hashlib.sha256(content).hexdigest()[:16],
        "weights": weights,
    }


def _settled(config: Any) -> Any:
    """Drop from a config, and from those inside it, what changes without changing the model."""
    if isinstance(config, Mapping):
        return {str(k): _settled(v) for k, v in config.items() if k not in _VOLATILE}
    return [_settled(value) for value in config] if isinstance(config, (list, tuple)) else config
