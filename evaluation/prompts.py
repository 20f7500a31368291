"""The prompt of each benchmark with which the published numbers were made, per family.

lmms-eval keeps a benchmark's prompt in the task's ``lmms_eval_specific_kwargs`` and looks it up by
the model's id on the command line; an id it does not know, such as ours, gets ``default``. So the
prompt is chosen here, deliberately, and written into the run record.

What is known. The reference's evaluation tree (github.com/yunzhuzhang0918/flexselect, ``eval/``) is
a fork of lmms-eval in which the families run under the ids ``llava_vid``, ``qwen2_5_vl`` and
``internvl2``. Its scripts and task files, in the version with all four benchmarks and the published
frames and budgets (commit a1d1f5a), say:

- VideoMME: lmms-eval's text. ``llava_vid`` has its own ending, the other two have the default.
- MLVU: one text for every model, with a line before the question and the first half of the answer
  after it.
- LongVideoBench: lmms-eval's text, the same for every model; but InternVL runs a task of its own
  with subtitles before the question (`subtitles_of`), as its authors do.
- LVBench: an instruction before the question, VideoMME's endings after it, and the options' letters
  without parentheses.

What settings cannot say, `adapt_text` does.

What is inferred or not known.

- Of MLVU two versions of the text are stored. The one here is of the file that holds the functions
  which the task file of that commit names; the other asks for the letter "without parentheses".
- The reference published nothing for EgoSchema and MVBench: lmms-eval's own prompt is kept.
- It lets a model say one token on VideoMME, LongVideoBench and LVBench (Qwen2.5-VL everywhere);
  lmms-eval's limits of 16 and 32 are kept. An answer that starts with its letter counts the same.

A family that the reference did not evaluate (Qwen3-VL) is asked what lmms-eval asks a model of that
name, where it has such a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..inference.registry import family_named
from .subtitles import subtitles_of

#: Tasks whose prompt is chosen here; a name that starts with ``mvbench_`` is one of MVBench's.
TASKS = (
    "videomme",
    "videomme_long",
    "mlvu_dev",
    "longvideobench_val_v",
    "lvbench",
    "egoschema",
    "egoschema_subset",
    "mvbench",
)

#: Families whose figures the reference published.
PUBLISHED = ("internvl", "llava_video", "qwen2_5_vl")

#: What a task that `evaluation.data` makes of local rows is called after its benchmark's name.
LOCAL = "_local"

_LETTER = "Answer with the option's letter from the given choices directly."
_BEST = "The best answer is:"
_LVBENCH = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


def prompt_settings(family: str, task: str) -> dict[str, Any]:
    """Return what a task's ``lmms_eval_specific_kwargs`` are to hold, over what they hold.

    Parameters
    ----------
    family : a family, or its shorter name.
    task : a task of lmms-eval, or a local one of the same benchmark (``videomme_local``).

    Returns
    -------
    Settings by name; empty for a task, or a family, whose prompt lmms-eval decides.

    Raises
    ------
    OptionError
        There is no such family.
    """
    if (family := family_named(family)) not in PUBLISHED:
        return {}
    ending = _BEST if family == "llava_video" else f"\n{_LETTER}"
    name = task.removesuffix(LOCAL)
    if name in ("videomme", "videomme_long"):
        return {"pre_prompt": "", "post_prompt": ending}
    if name == "mlvu_dev":
        instruction = "Answer with the best option's letter from the given choices directly."
        return {"pre_prompt": "\n", "post_prompt": f"\n{instruction}\nBest option: ("}
    if name == "longvideobench_val_v":
        return {"pre_prompt": "", "post_prompt": f"{_LETTER}\n"}
    if name == "lvbench":
        return {"pre_prompt": _LVBENCH, "post_prompt": f"\n{ending}"}
    if name in ("egoschema", "egoschema_subset"):
        return {"pre_prompt": "", "post_prompt": f"\n{_LETTER}"}
    if name == "mvbench" or name.startswith("mvbench_"):
        return {"post_prompt": "Only give the best option.\n"}
    return {}


def adapt_text(family: str, task: str, text: str, doc: Mapping[str, Any]) -> str:
    """Return the prompt with what settings cannot say.

    LVBench's letters lose their parentheses, and InternVL sees the subtitles of LongVideoBench.

    Parameters
    ----------
    family, task : as in `prompt_settings`.
    text : what the task makes of the row with these settings.
    doc : the row.

    Raises
    ------
    DataError
        Subtitles are needed and not there.
    """
    name = task.removesuffix(LOCAL)
    if name == "lvbench" and family_named(family) in PUBLISHED:
        for letter in "ABCD":
            text = text.replace(f"({letter})", letter)
    if name == "longvideobench_val_v" and family_named(family) == "internvl":
        text = f"{subtitles_of(doc)}\n{text}"
    return text


def give_prompt(task: Any, family: str) -> dict[str, Any]:
    """Give a task that lmms-eval has loaded its prompt for a family; return its settings.

    Only prompts that are built from now on change. To do it twice is to do it once.

    Parameters
    ----------
    task : a ``ConfigurableTask`` of lmms-eval.
    family : a family, or its shorter name.

    Raises
    ------
    OptionError
        There is no such family.
    """
    name = str(task.config.task)
    build = task.config.doc_to_text
    before = build if isinstance(build, _Adapted) else None
    original = task.lmms_eval_specific_kwargs or {} if before is None else before.settings
    ours = prompt_settings(family, name) or original.get(family_named(family))
    if ours is None:
        if before is not None:
            task.lmms_eval_specific_kwargs, task.config.doc_to_text = original, before.build
        return _merged(original)
    settings = {**_merged(original), **ours}
    task.lmms_eval_specific_kwargs = settings
    plain = build if before is None else before.build
    task.config.doc_to_text = _Adapted(plain, original, name, family)
    return dict(settings)


def _merged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings by model id, which lmms-eval keeps beside those it has chosen."""
    return {name: value for name, value in settings.items() if not isinstance(value, dict)}


class _Adapted:
    """A task's ``doc_to_text`` with `adapt_text` after it; an object, so that it is known again."""

    def __init__(self, build: Any, settings: Mapping[str, Any], task: str, family: str) -> None:
        self.build = build
        self.settings = settings
        self.task = task
        self.family = family

    def __call__(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
        text = self.build(doc, lmms_eval_specific_kwargs)
        return adapt_text(self.family, self.task, text, doc)

    def __repr__(self) -> str:
        name = getattr(self.build, "__name__", "a template")
        return f"{name}, as {self.family} is asked {self.task}"
