"""How the golden data of each family becomes inputs of its model, and where the reference errs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flexselect
from flexselect.core.architecture import Request
from flexselect.core.layout import Prompt
from flexselect.inference.features import Encoded
from flexselect.scripts.fixture_case import Case, FixtureError, Run


@dataclass(frozen=True)
class Departure:
    """Where a run of the reference is wrong and we are not, and what is compared all the same.

    Attributes
    ----------
    reasons : what is wrong, with its place in the golden data's README.
    rows : int64, the tokens of the prompt the reference went on with, where they are not those we
        select: the model is given these.
    sets : sets whose scores, and so whose selected tokens, cannot be compared.
    answer : whether what the model writes can be compared.
    """

    reasons: tuple[str, ...] = ()
    rows: Tensor | None = None
    sets: frozenset[int] = frozenset()
    answer: bool = True


#: The reference is right.
RIGHT = Departure()


class Family:
    """How a family's cases become inputs of its model, and where the reference errs."""

    #: Why the model cannot be asked without a method for the reference's baseline, if so.
    no_stock_baseline: str | None = None

    def load_model(self, case: Case) -> Any:
        """Load the model as a user would."""
        return flexselect.load_model(case.folder / "model", dtype="float32", device="cpu")

    def selector(self, case: Case, run: Run, model: Any) -> Any:
        """Return who ranks: a folder or a loaded Lite selector, or None for the model itself."""
        return case.selector_folder(run.mode)

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Return what the family's processor would have made."""
        raise NotImplementedError

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return our counterparts of the vision tensors in inputs.safetensors."""
        raise NotImplementedError

    def departure(self, case: Case, run: Run, ranker: Any) -> Departure:
        """Say where the reference is wrong in a run; ``ranker`` is the text model that scores."""
        return RIGHT


class InternVLFixtures(Family):
    """Ids come expanded, ``<img>``, placeholders, ``</img>`` a frame, with ids of their own."""

    def load_model(self, case: Case) -> Any:
        """Load the model with the placeholder of meta.json; its tiny vocabulary lacks the real."""
        from flexselect.internvl.convert import load_original

        return load_original(
            case.folder / "model",
            dtype=torch.float32,
            image_token_id=case.number("img_context_id"),
        )

    def selector(self, case: Case, run: Run, model: Any) -> Any:
        """Load the selector, with the stored prompt where it has tokens of its own."""
        folder = case.selector_folder(run.mode)
        if folder is None:
            return None
        architecture = flexselect.architecture_of(model)
        selector = architecture.load_selector(str(folder))
        if selector.config.own_tokens:
            ids = case.given("selector_input_ids_qwen2")
            context = ids == case.meta["qwen2_selector_ids"]["<IMG_CONTEXT>"]
            placed = torch.where(context, case.number("img_context_id"), 0)

            def translate(prompt: Prompt) -> Prompt:
                translated = architecture.layout(placed, prompt.videos, prompt.images)
                return replace(translated, layout=replace(translated.layout, ids=ids))

            selector.translate = translate
        if self._sees_ahead(run):
            for layer in selector.language_model.layers:
                layer.self_attn.is_causal = False
        return selector

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Return the tensors as stored."""
        inputs = {name: case.given(name) for name in ("input_ids", "pixel_values")}
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    @torch.no_grad()
    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return what the projector reads: the shuffled features."""
        seen: list[Tensor] = []
        projector = model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda _, states: seen.append(states[0]))
        try:
            flexselect.architecture_of(model).encode(request.pixels[0], None)
        finally:
            handle.remove()
        return {"vision_features": seen[0]}

    def departure(self, case: Case, run: Run, ranker: Any) -> Departure:
        """Name the shifted gather, the attention that sees ahead, and the rope that remembers."""
        selected = case.expect(f"{run.name}.selected")
        prefix, total = case.number("prefix_len"), case.number("total_vision_tokens")
        tokens = case.given("input_ids").shape[1]
        shift = case.facts(run).get("offset_selector_minus_teacher", 0)
        start = prefix + shift
        rows = torch.cat(
            (torch.arange(start), start + selected, torch.arange(start + total, tokens))
        )
        reasons = []
        if shift:
            reasons.append(
                f"the reference cut the frames {shift:+d} tokens off, at their place in the "
                "selector's prompt (I3); scores and selected tokens are compared as they are, and "
                "what the model reads and writes when given the same wrong rows"
            )
        if self._sees_ahead(run):
            reasons.append(
                "the reference's selector attends to later tokens too (I7), ours never does; "
                "compared with its causal mask taken away"
            )
        text = len(case.given("selector_input_ids_qwen2")) if run.mode == "lite_qwen2" else tokens
        lengths = [text - total + len(mask) for mask in case.masks(run)]
        remembered = _remembered(ranker.config, lengths)
        if remembered:
            reasons.append(
                "the reference's rope keeps the stretch of the longest sequence it has read (I5), "
                f"ours starts anew; sets {sorted(remembered)}, shorter than one before, are not "
                "compared, and the model is given the rows the reference selected"
            )
        # Ranking for itself, the model then reads its prompt with what its lower layers remember.
        unlike = run.mode == "self" and bool(
            _remembered(ranker.config, [*lengths, len(rows)]) - remembered
        )
        if unlike:
            reasons.append(
                "the rope remembers a set longer than the prompt that is answered (I5); what the "
                "model writes is not compared"
            )
        mistaken = rows if shift or remembered else None
        return Departure(tuple(reasons), mistaken, frozenset(remembered), not unlike)

    def _sees_ahead(self, run: Run) -> bool:
        return run.mode.endswith("_eager")


class LlavaVideoFixtures(Family):
    """Ids come with one placeholder for the whole video; pixels are those of one video."""

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Expand the placeholder, and put the pixels in a batch."""
        from flexselect.llava_video.modeling import video_tokens

        config, (ids,) = model.config, case.given("input_ids")
        (at,) = (ids == case.number("image_token_index")).nonzero()
        vocabulary = config.text_config.vocab_size
        if config.video_token_id >= vocabulary:
            # The tiny vocabulary ends before the placeholder; an id that no text uses stands in.
            unused = set(range(vocabulary)) - set(ids.tolist())
            config.video_token_id = max(unused)
        pixels = case.given("pixel_values")
        count = video_tokens(len(pixels), config.frame_grid, config.newline_position)
        video = torch.full((count,), config.video_token_id)
        expanded = torch.cat((ids[: int(at)], video, ids[int(at) + 1 :]))[None]
        return {
            "input_ids": expanded,
            "attention_mask": torch.ones_like(expanded),
            "pixel_values_videos": pixels[None],
        }

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return the patches as the tower puts them out, before any projector."""
        return {"vision_features": model.model.encode_pictures(request.pixels[0].values)}


class QwenFixtures(Family):
    """Ids come expanded; patches and grid are what the stock processor makes."""

    no_stock_baseline = (
        "transformers numbers the text after a video in another way since 5.3; the method Full "
        "passes the positions the model was trained with"
    )

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Return the tensors as stored."""
        names = ("input_ids", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        inputs = {name: case.given(name) for name in names}
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return what the merger, and the selector's merger, put out."""
        found = {"vision_features": encoded.features.model}
        if encoded.features.selector is not None:
            found["vision_features_selector"] = encoded.features.selector
        return found

    def departure(self, case: Case, run: Run, ranker: Any) -> Departure:
        """Name the grid that the reference overwrote in the caller's tensor."""
        given = case.given("video_grid_thw").tolist()
        left = case.facts(run).get("video_grid_thw_generate_kwarg_after", given)
        if left == given:
            return RIGHT
        return Departure(
            (
                f"the reference overwrote the caller's video_grid_thw {given} with {left}; here it "
                "stays (compared as caller_inputs)",
            )
        )


#: ``arch`` of a meta.json: how its cases are read.
FAMILIES: dict[str, Family] = {
    "internvl2_5": InternVLFixtures(),
    "llava_video": LlavaVideoFixtures(),
    "qwen2_5_vl": QwenFixtures(),
}


def family_of(case: Case) -> Family:
    """Return how a case is read, or raise `FixtureError` for an unknown family."""
    arch = case.meta["arch"]
    if arch not in FAMILIES:
        raise FixtureError(
            f"meta.json: arch is {arch!r}; known are {', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[arch]


def _remembered(config: Any, lengths: Sequence[int]) -> set[int]:
    """Return which sequences a dynamic rope stretches more than their length asks for."""
    if config.rope_parameters.get("rope_type") != "dynamic":
        return set()
    found, longest = set(), config.max_position_embeddings
    for number, length in enumerate(lengths):
        if length < longest and longest > config.max_position_embeddings:
            found.add(number)
        longest = max(longest, length)
    return found
