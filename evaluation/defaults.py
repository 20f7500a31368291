"""What a run does unless told otherwise: the tiny model on needles, a real one on benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, OptionError
from ..inference.methods import FlexSelect, Full, Random, Uniform
from ..inference.registry import family_named
from ..testbed.locate import checkpoint_folder, selector_folder
from .arguments import LITE, parse_arguments
from .plan import Plan

#: Short and long: what the tiny models were trained on, and far beyond it.
NEEDLES = ("needle_16", "needle_512")

#: The long-video benchmarks of the paper.
BENCHMARKS = ("videomme", "mlvu_dev", "longvideobench_val_v", "lvbench")

#: Every method, the controls first.
ALL = (Full.name, Uniform.name, Random.name, FlexSelect.name, LITE)


def make_plan(
    family: str,
    *,
    checkpoint: str | None = None,
    tasks: str | None = None,
    methods: str | None = None,
    selector: str | None = None,
    budget: int | None = None,
    layer: int | None = None,
    limit: int | None = None,
    processes: int = 1,
    include: Sequence[Path] = (),
    shared: Mapping[str, Any] | None = None,
) -> Plan:
    """Fill in what was not said, and check the rest before anything is loaded.

    Raises
    ------
    OptionError
        A method or an option is unknown or out of range, or a selector is missing.
    CheckpointError
        The family's tiny checkpoint is not there, or its tiny selector, if flexselect-lite is
        named.
    """
    family = family_named(family)
    tiny = checkpoint is None
    model = str(checkpoint_folder(family)) if checkpoint is None else checkpoint
    named = _listed(methods, ALL if tiny else (Full.name, FlexSelect.name), "methods")
    unknown = sorted(set(named) - set(ALL))
    if unknown:
        raise OptionError(f"methods: {', '.join(unknown)} unknown; choose from {', '.join(ALL)}.")
    if selector is not None and LITE not in named:
        # A selector that was named is never ignored.
        named.append(LITE)
    chosen: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in named:
        given: dict[str, Any] = {"method": name}
        if name != Full.name and budget is not None:
            given["budget"] = budget
        if name == FlexSelect.name and layer is not None:
            given["layer"] = layer
        if name == LITE:
            try:
                given["selector"] = _selector(family, selector, tiny)
            except CheckpointError as error:
                if methods is not None:
                    raise
                missing[name] = str(error)
                continue
        chosen[name] = given
    if budget is not None and set(named) <= {Full.name}:
        raise OptionError(f"budget={budget}: of {', '.join(named)} none drops tokens.")
    if layer is not None and FlexSelect.name not in named:
        raise OptionError(
            f"layer={layer}: only {FlexSelect.name} reads a layer of the model, and it is not "
            f"among the methods ({', '.join(named)})."
        )
    every = {name: value for name, value in (shared or {}).items() if value is not None}
    for given in chosen.values():
        parse_arguments({"pretrained": model, **every, **given})
    folders = [str(Path(path).resolve()) for path in include]
    absent = [path for path in folders if not Path(path).is_dir()]
    if absent:
        raise OptionError(f"include: {', '.join(absent)} is no folder of task files.")
    return Plan(
        family=family,
        checkpoint=model,
        methods=chosen,
        missing=missing,
        tasks=_listed(tasks, NEEDLES if tiny else BENCHMARKS, "tasks"),
        include=folders,
        limit=limit,
        shared=every,
        processes=processes,
    )


def _selector(family: str, selector: str | None, tiny: bool) -> str:
    if selector is not None:
        return selector
    if tiny:
        return str(selector_folder(family))
    raise OptionError(f"{LITE} needs a selector: name its folder or hub id.")


def _listed(text: str | None, default: Sequence[str], what: str) -> list[str]:
    if text is None:
        return list(default)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise OptionError(f"{what}: {text!r} names none; give names with commas between them.")
    return list(dict.fromkeys(names))
