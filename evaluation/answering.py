"""Answering: conversations about videos, pictures or text alone, one or several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..core.errors import PromptError
from ..core.selection import Selection
from ..inference.apply import count_new_tokens
from ..inference.engine import Engine
from ..inference.features import Encoded, Features
from ..inference.session import MAX_NEW_TOKENS, Video
from ..inference.timing import Clock

#: Options of generation that a task may set; others are of models that are not ours.
_OPTIONS = ("do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p")


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer to one prompt of a batch.

    Attributes
    ----------
    text : the answer.
    tokens : its length.
    cut : whether it stopped at the longest length instead of by itself.
    selection : what it was read from; None for a prompt without video.
    seconds : rank and gather of this prompt; prefill and answer of the whole batch, since every
        prompt of it waits for all.
    """

    text: str
    tokens: int
    cut: bool
    selection: Selection | None
    seconds: dict[str, float]


def generation_options(task: Mapping[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """Turn a task's options of generation into those of ``generate``: greedy unless they sample.

    A temperature of zero means greedy. The checkpoint's own settings of sampling count for nothing.
    """
    given = {name: task[name] for name in _OPTIONS if task.get(name) is not None}
    sampled = given.get("do_sample", True) and given.get("temperature", 0) > 0
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or given.get("max_new_tokens") or MAX_NEW_TOKENS,
        "do_sample": bool(sampled),
        "num_beams": given.get("num_beams", 1),
    }
    names = ("temperature", "top_p", "top_k")
    return {**options, **{name: given.get(name) if sampled else None for name in names}}


def stop_texts(task: Mapping[str, Any]) -> list[str]:
    """Texts at which a task ends an answer.

    The harness adds an empty line to every task that names none; no model whose figures are
    published stops there, so that one is not a stop.
    """
    until = task.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text.strip()]


def encode_prompt(
    engine: Engine,
    processor: Any,
    turns: Sequence[Mapping[str, Any]],
    videos: Sequence[Video],
    pictures: Sequence[Any],
) -> Encoded:
    """Lay out a conversation with its videos, or its pictures, or neither.

    Raises
    ------
    PromptError
        It has both videos and pictures, or asks nothing.
    """
    if videos and pictures:
        raise PromptError(
            f"A question shows {len(videos)} video(s) and {len(pictures)} picture(s) at once. "
            "Benchmarks with both are not supported: leave the task out."
        )
    messages = [
        {
            "role": turn["role"],
            "content": [
                {"type": part["type"], **({"text": part["text"]} if "text" in part else {})}
                for part in turn["content"]
            ],
        }
        for turn in turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    architecture = engine.architecture
    if not videos:
        shown = {"images": list(pictures)} if pictures else {}
        inputs = processor(text=[text], return_tensors="pt", **shown)
        return engine.encode(architecture.read(inputs)[0])
    clips = [video.clip for video in videos]
    prompt = architecture.layout(architecture.expand(processor, text, clips), clips, [])
    if not bool(prompt.layout.query.any()):
        raise PromptError("Nothing is asked: there is no text after the video.")
    return Encoded(
        prompt,
        _together([video.features for video in videos]),
        tuple(video.times for video in videos),
        tuple(video.record["duration"] for video in videos),
    )


@torch.no_grad()
def answer(
    engine: Engine,
    processor: Any,
    prompts: Sequence[Encoded],
    options: Mapping[str, Any],
    stops: Sequence[str] = (),
) -> list[Reply]:
    """Answer prompts in one batch; each as it would be answered alone, up to rounding.

    Parameters
    ----------
    engine, processor : the model with its method, and its processor.
    prompts : what is asked.
    options : of ``generate``, from `generation_options`.
    stops : texts at which an answer ends.
    """
    model, tokenizer = engine.model, processor.tokenizer
    clocks, selections, parts = [], [], []
    for prompt in prompts:
        clock = Clock(model.device)
        with clock("rank"):
            selection = engine.select(prompt)
        with clock("gather"):
            parts.append(engine.gather(prompt, selection))
        clocks.append(clock)
        selections.append(selection)
    padding = tokenizer.pad_token_id
    ids = _left_padded([prompt.prompt.layout.ids for prompt in prompts], padding or 0)
    config = model.generation_config
    options = count_new_tokens(dict(options), config, ids.shape[1])
    clock = Clock(model.device)
    clock.start("prefill")
    # With ids beside the embeddings, whatever looks at the prompt (a penalty on repetition) sees
    # what it would see of the whole one.
    with engine.architecture.reading(engine.prefill(parts)) as prefill:
        out = model.generate(
            input_ids=ids.to(model.device),
            **prefill,
            **options,
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([_FirstToken(clock)]),
        )
    clock.stop()
    ends = torch.tensor(config.eos_token_id if config.eos_token_id is not None else []).flatten()
    replies = []
    for row, own, selection in zip(out[:, ids.shape[1] :].cpu(), clocks, selections, strict=True):
        stopped = torch.isin(row, ends).nonzero()[:, 0]
        length = int(stopped[0]) + 1 if len(stopped) else len(row)
        text = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
        for stop in stops:
            text = text.split(stop)[0]
        seconds = {**own.seconds, **clock.seconds}
        replies.append(Reply(text, length, not len(stopped), selection, seconds))
    return replies


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token is there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._came = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self._came:
            self._clock.start("answer")
            self._came = True
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _together(features: Sequence[Features]) -> Features:
    """Join the features of several videos, in order."""
    if len(features) == 1:
        return features[0]
    selectors = [each.selector for each in features if each.selector is not None]
    return Features(
        torch.cat([each.model for each in features]), torch.cat(selectors) if selectors else None
    )


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (length - len(row), 0), value=value) for row in rows]
    )
