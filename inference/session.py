"""A video, opened once and asked many questions: decoding and encoding are paid for once."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Pixels
from ..core.errors import OptionError, PromptError, VideoError
from ..core.layout import Clip
from ..core.selection import Moment, Selection
from .ahead import ahead
from .apply import check_decoding, count_new_tokens, is_applied
from .engine import Engine
from .features import FRAMES_PER_CHUNK, Encoded, Features, Progress, encode
from .methods import FlexSelect, Method
from .pictures import choose_pictures, whole_groups, with_stamps
from .policy import resolve_sampling
from .reading import hearing
from .timing import Clock, Tee
from .video import DecodeReport, probe, read_frames

#: Answers are short unless asked otherwise.
MAX_NEW_TOKENS = 256

#: Arguments of generate that the video and the question decide.
_OURS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"}


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer and what it was read from.

    Attributes
    ----------
    text : the answer.
    ids : int64 ``(tokens,)``, the generated token ids.
    selection : which visual tokens it was read from, and their relevance: in sets, if the method
        scores, and as the model read them together.
    seconds : time by stage of this question: rank, gather, prefill (to the first token), answer.
        With beam search, prefill is part of answer.
    cut : whether it stopped at ``max_new_tokens`` instead of by itself.
    """

    text: str
    ids: Tensor = field(repr=False)
    selection: Selection = field(repr=False)
    seconds: dict[str, float]
    cut: bool

    @property
    def moments(self) -> list[Moment]:
        """The stretches of video it was read from, best first."""
        return self.selection.moments()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Video:
    """An encoded video; `open_video` makes it. Its features lie in host memory.

    Attributes
    ----------
    engine : the model and the method.
    processor : the model's processor.
    clip : its visual tokens.
    features, times : as in `Encoded`.
    pictures : int64 ``(pictures,)``, which pictures of the file were looked at, in order;
        neighbours that the model reads as one frame follow each other.
    report : what was decoded, and what was lost to damage.
    record : path, sampling and sizes: what decided the features.
    seconds : time by stage of opening it: decode (waiting for pictures that were not ready when
        the tower was), encode.
    """

    engine: Engine = field(repr=False)
    processor: Any = field(repr=False)
    clip: Clip
    features: Features = field(repr=False)
    times: Tensor = field(repr=False)
    pictures: Tensor = field(repr=False)
    report: DecodeReport
    record: dict[str, Any]
    seconds: dict[str, float]

    def ask(self, question: str, progress: Progress | None = None, **generation: Any) -> Answer:
        """Answer a question about the video; the visual tokens are ranked anew for each.

        Parameters
        ----------
        question : in words.
        progress : called with a stage, what is done, and the total.
        generation : options of ``generate``; greedy and at most `MAX_NEW_TOKENS` long unless they
            say otherwise.

        Raises
        ------
        PromptError
            The question is empty.
        OptionError
            An option of ``generation`` is out of range.
        """
        return Chat(self).ask(question, progress, **generation)

    def chat(self) -> Chat:
        """Begin a conversation about the video in which earlier turns are remembered."""
        return Chat(self)

    def encoded(self, messages: list[dict[str, Any]], question_start: int) -> Encoded:
        """Lay out a conversation about the video; tokens from ``question_start`` on ask."""
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.engine.architecture.expand(self.processor, text, [self.clip])
        prompt = self.engine.architecture.layout(ids, [self.clip], [])
        earlier = torch.arange(len(ids)) < question_start
        layout = replace(prompt.layout, query=prompt.layout.query & ~earlier)
        if not bool(layout.query.any()):
            raise PromptError("Nothing is asked: the question is empty.")
        durations = (self.record["duration"],)
        return Encoded(replace(prompt, layout=layout), self.features, (self.times,), durations)


class Chat:
    """A conversation about one video.

    Every turn ranks anew with only the newest question asking; the model reads the whole
    conversation.

    Attributes
    ----------
    messages : the conversation so far, in the chat template's form. A system message may be put
        here before the first question.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self.messages: list[dict[str, Any]] = []

    @torch.no_grad()
    def ask(self, question: str, progress: Progress | None = None, **generation: Any) -> Answer:
        """Ask the next question; parameters as in `Video.ask`."""
        check_question(question)
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if not self._shows_video():
            content.insert(0, {"type": "video"})
        messages = [*self.messages, {"role": "user", "content": content}]
        video, clock = self.video, Clock(self.video.engine.model.device)
        encoded = video.encoded(messages, self._length_so_far())
        with clock("rank"):
            selection = video.engine.select(encoded, progress)
        assert selection is not None
        selection.settings.update(video.record, question=question)
        with clock("gather"):
            prefill = video.engine.prefill([video.engine.gather(encoded, selection)])
        prompt = encoded.prompt
        with hearing(video.engine, prompt, selection) as reading:
            ids, cut = self._generate(prompt.layout.ids, prefill, clock, progress, generation)
        selection = reading.added_to(selection)
        tokenizer = video.processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        self.messages = [*messages, reply]
        return Answer(text, ids, selection, clock.seconds, cut)

    def _shows_video(self) -> bool:
        contents = [message["content"] for message in self.messages]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        return any(part["type"] == "video" for part in parts)

    def _length_so_far(self) -> int:
        """Tokens of the conversation before the newest turn, which do not ask."""
        if not self._shows_video():
            return 0
        video = self.video
        text = video.processor.apply_chat_template(self.messages, tokenize=False)
        return len(video.engine.architecture.expand(video.processor, text, [video.clip]))

    def _generate(
        self,
        prompt_ids: Tensor,
        prefill: dict[str, Tensor],
        clock: Clock,
        progress: Progress | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, bool]:
        model = self.video.engine.model
        ours = sorted(_OURS & set(options))
        if ours:
            raise OptionError(f"{', '.join(ours)} cannot be given to ask: the video decides them.")
        check_decoding(options, model.generation_config)
        if options.get("generation_config") is None and "max_length" not in options:
            options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}
            if not options["do_sample"]:
                # The checkpoint's sampling settings mean nothing to a greedy answer.
                options = {"temperature": None, "top_p": None, "top_k": None, **options}
        options = count_new_tokens(options, model.generation_config, len(prompt_ids))
        setting = partial(_setting, options, model.generation_config)
        limit = setting("max_new_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise OptionError(
                f"max_new_tokens must be a whole number of at least 1, got {limit!r}."
            )
        several = setting("num_return_sequences") or 1
        if several > 1:
            raise OptionError(
                f"ask gives one answer, but num_return_sequences is {several}. Ask several times "
                "instead."
            )
        streamed = (setting("num_beams") or 1) == 1
        if streamed:
            options["streamer"] = Tee(clock, progress, options.get("streamer"))
        clock.start("prefill" if streamed else "answer")
        # With embeddings given, generate selects nothing, whether a method is applied or not.
        ids = prompt_ids[None].to(model.device)
        with self.video.engine.architecture.reading(prefill) as inputs:
            out = model.generate(input_ids=ids, **inputs, **options)
        clock.stop()
        sequences = out if isinstance(out, Tensor) else out.sequences
        ids = sequences[0, len(prompt_ids) :].cpu()
        stops = setting("eos_token_id")
        stops = torch.tensor([] if stops is None else stops).flatten()
        full = limit is None or len(ids) >= limit
        return ids, full and not bool(torch.isin(ids[-1:], stops).any())


def open_video(
    model: Any,
    processor: Any,
    path: str | Path,
    *,
    method: Method | None = None,
    backend: str = "pyav",
    frames_per_chunk: int = FRAMES_PER_CHUNK,
    progress: Progress | None = None,
    **sampling: Any,
) -> Video:
    """Decode and encode a video file once.

    Frames are decoded, encoded and let go of a chunk at a time; only their features stay, in host
    memory.

    Parameters
    ----------
    model, processor : of a supported family.
    path : a video file.
    method : how to select; default: the method applied to ``model``, else `FlexSelect` with the
        model's preset.
    backend : decoder: ``"pyav"``, ``"decord"`` or ``"torchcodec"``.
    frames_per_chunk : most frames decoded and encoded at a time.
    progress : called with a stage ("decode", "encode"), what is done, and the total.
    sampling : ``fps``, ``frames``, ``min_frames``, ``max_frames``, ``min_pixels``, ``max_pixels``;
        what is not given comes from the model's preset.

    Raises
    ------
    VideoError
        The file is missing, is no video, or is too short.
    OptionError
        An option is unknown or out of range, or ``processor`` is none.
    """
    _check_processor(processor)
    if (
        isinstance(frames_per_chunk, bool)
        or not isinstance(frames_per_chunk, int)
        or frames_per_chunk < 1
    ):
        raise OptionError(
            f"frames_per_chunk must be a whole number of at least 1, got {frames_per_chunk!r}."
        )
    if method is None:
        engine = model.flexselect.engine if is_applied(model) else Engine(model, FlexSelect())
    else:
        engine = Engine(model, method)
    architecture = engine.architecture
    policy = resolve_sampling(architecture, engine.preset, sampling)
    clock = Clock(model.device)
    clock.start("decode")
    info = probe(path)
    try:
        chosen = choose_pictures(architecture, info, policy)
        size = architecture.picture_size(info.height, info.width, len(chosen), policy)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    group = architecture.pictures_per_frame
    stream = read_frames(info, chosen, backend=backend, chunk=frames_per_chunk * group, size=size)
    spacing = info.duration / len(chosen)
    clips: list[Clip] = []
    shown: list[Tensor] = []

    def prepared() -> Generator[tuple[Pixels, Tensor], None, None]:
        with closing(stream), closing(ahead(whole_groups(stream, group))) as groups:
            for pictures, times in groups:
                yield architecture.pixels(processor, pictures, spacing), times

    def chunks() -> Generator[Pixels, None, None]:
        # Two threads work ahead of the tower: one decodes, one prepares what was decoded. They are
        # ended, not dropped: the traceback of an error would hold on to them and to the file.
        with closing(ahead(prepared())) as pieces:
            for pixels, times in pieces:
                clips.append(pixels.clip)
                shown.append(times)
                if progress is not None:
                    done = min(sum(-(-len(part) // group) for part in shown) * group, len(chosen))
                    progress("decode", done, len(chosen))
                # Between one chunk asked for and the next, the time is the tower's.
                clock.start("encode")
                yield pixels
                clock.start("decode")

    frames = -(-len(chosen) // group)
    selector = engine.method.encodes_for
    with closing(chunks()) as stretches:
        features = encode(architecture, stretches, selector, frames_per_chunk, progress, frames)
    clock.stop()
    clip = replace(clips[0], frames=sum(part.frames for part in clips))
    clip = with_stamps(architecture, clip, torch.cat(shown))
    record = {
        "video": str(path),
        "duration": info.duration,
        "pictures": stream.report.decoded,
        "pictures_lost": len(stream.report.lost),
        "frames": clip.frames,
        "picture_size": list(size),
        "sampling": {name: value for name, value in policy.items() if value is not None},
        "backend": backend,
    }
    lost = set(stream.report.lost.tolist())
    pictures = torch.tensor([index for index in chosen.tolist() if index not in lost])
    return Video(
        engine=engine,
        processor=processor,
        clip=clip,
        features=features,
        times=torch.cat(shown)[::group],
        pictures=pictures,
        report=stream.report,
        record=record,
        seconds=clock.seconds,
    )


def check_question(question: object) -> str:
    """Return ``question``, or raise `PromptError` where it asks nothing."""
    if not isinstance(question, str):
        raise PromptError(f"The question must be text, got {question!r}.")
    if not question.strip():
        raise PromptError("Nothing is asked: the question is empty.")
    return question


def _check_processor(processor: Any) -> None:
    """Raise `OptionError` unless ``processor`` can write a prompt with a video."""
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "apply_chat_template")):
        raise OptionError(
            f"processor must be the model's processor, got {type(processor).__name__}. Take the "
            "one of flexselect.load_processor."
        )
    if not getattr(processor, "chat_template", None):
        raise OptionError(
            "The processor has no chat template, so no question can be written for the model. Set "
            "processor.chat_template, or add the checkpoint's chat_template.jinja to its folder."
        )


def _setting(options: Mapping[str, Any], default: Any, name: str) -> Any:
    """Return what ``generate`` takes for ``name``, from an option or a generation config."""
    given = options.get("generation_config")
    values = (options.get(name), getattr(given, name, None), getattr(default, name, None))
    return next((value for value in values if value is not None), None)
