"""Compare flexselect with golden data of the reference, number by number.

    python scripts/check_fixture.py FOLDER…

Each FOLDER is a case (a folder with meta.json) or has cases below it, in the format that the golden
data's README describes. Every case is run in float32 on the CPU through the public classes, as a
user would: load the model, apply a method, generate. The worst difference of each quantity is
printed, and what the reference gets wrong and we do not.

Exit code: 0 everything agrees; 1 a quantity differs; 2 a folder could not be checked, whatever the
others say.

Scores may differ by 2e-5 and logits by 1e-4. Embeddings and features may differ by 1e-4: they have
been through the vision tower, whose sums are taken in another order. The rest is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import flexselect
from flexselect.core.layout import Prompt
from flexselect.core.relevance import check_aggregation
from flexselect.inference.engine import Engine, kept_rows
from flexselect.inference.features import assemble
from flexselect.inference.scoring import FrameSet, score, split_prompt
from flexselect.scripts.fixture_case import Case, FixtureError, OtherData, Run, read_case
from flexselect.scripts.fixture_families import RIGHT, Departure, Family, family_of
from flexselect.scripts.fixture_report import (
    SKIPPED,
    STATUSES,
    UNCHECKED,
    Report,
    as_json,
    describe,
    exit_code,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check folders, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON instead")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    reports = []
    for folder in options.folders:
        for report in check_below(folder):
            reports.append(report)
            if not options.json:
                print(describe(report), flush=True)
    code = exit_code(reports)
    if options.json:
        print(json.dumps(as_json(reports, code), indent=1))
    else:
        count = {status: sum(r.status == status for r in reports) for status in STATUSES}
        total = ", ".join(f"{number} {status}" for status, number in count.items() if number)
        print(f"{total}: exit code {code}")
    return code


def check_below(folder: Path) -> Iterator[Report]:
    """Check a case, or every case below a folder."""
    found = list(find_cases(folder))
    if not found:
        what = "has no folder with a meta.json" if folder.is_dir() else "is no folder"
        yield Report(str(folder), status=UNCHECKED, error=f"{folder} {what}")
    for path in found:
        yield check(path)


def find_cases(folder: Path) -> Iterator[Path]:
    """Yield ``folder`` itself if it has a meta.json, else every folder below it that has one."""
    seen: set[Path] = set()
    for root, below, files in os.walk(folder, followlinks=True):
        place = Path(root)
        if "meta.json" in files:
            yield place
        if "meta.json" in files or place.resolve() in seen:
            below.clear()
        seen.add(place.resolve())
        below.sort()


def check(folder: Path) -> Report:
    """Check one case; whatever goes wrong is in the report, so that others are still checked."""
    report = Report(str(folder))
    try:
        check_case(read_case(folder), report)
    except OtherData as reason:
        report.status, report.error = SKIPPED, str(reason)
    except (FixtureError, flexselect.FlexSelectError) as error:
        report.status, report.error = UNCHECKED, str(error)
    except Exception as error:  # A crash of the library is a finding about this case alone.
        traceback.print_exc()
        report.status = UNCHECKED
        report.error = f"the run broke off with {type(error).__name__}: {error}"
    return report


def check_case(case: Case, report: Report) -> None:
    """Run everything the reference ran on a case and compare."""
    family = family_of(case)
    budget, layer = case.number("tkn_budget"), case.number("token_selector_layer")
    frames_per_set = case.number("max_frames_per_group")
    report.title = (
        f"{case.meta['arch']}, budget {budget}, {frames_per_set} frames per set, layer {layer}"
    )
    model = family.load_model(case)
    inputs = family.model_inputs(case, model)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    if family.no_stock_baseline is None:
        check_answer("baseline", generate(model, inputs, case), case, report)
    else:
        report.skip("baseline without a method", family.no_stock_baseline)
    with flexselect.Full()(model):
        check_answer("baseline", generate(model, inputs, case), case, report)
    for run in case.runs:
        selector = family.selector(case, run, model)
        method = flexselect.FlexSelect(
            budget=budget,
            layer=layer if selector is None else None,
            selector=selector,
            aggregation=run.aggregation,
            frames_per_set=frames_per_set,
        )
        with method(model):
            answer = generate(model, inputs, case)
            departure = check_ranking(run, family, model.flexselect, inputs, case, report)
        if departure.rows is not None:
            answer = generate(model, gather(model, inputs, departure.rows), case)
        check_answer(run.name, answer, case, report, departure)
    for name, tensor in inputs.items():
        report.compare("caller_inputs", name, tensor, before[name])
    for file, key in case.untaken():
        reason = "no run reads it" if file == "inputs" else "no quantity of this name is known"
        report.skip(f"{file}.safetensors {key}", reason)


@torch.no_grad()
def check_ranking(
    run: Run, family: Family, applied: Any, inputs: dict[str, Tensor], case: Case, report: Report
) -> Departure:
    """Compare what decided the latest selection, from the vision tower to the kept tokens.

    Returns where the reference departs from what is right, and so from us.
    """
    engine, method, name = applied.engine, applied.method, run.name
    (selection,) = applied.selections
    if selection is None:
        raise FixtureError("no video is found in input_ids")
    (request,) = engine.architecture.read(inputs)
    encoded = engine.encode(request)
    for key, seen in family.vision_features(engine.model, request, encoded).items():
        report.compare(key, f"{name}: {key}", seen, case.given(key))

    lite = method.selector is not None
    scorer = method.selector if lite else engine.architecture
    features = encoded.features.selector if lite else encoded.features.model
    prompt = scorer.localise(request.prompt) if lite else request.prompt
    sets = split_prompt(prompt, scorer, method.frames_per_set)
    check_layout(request.prompt, sets, case, report)
    key = f"{run.mode}.selector_inputs_embeds"
    if key in case.expected:
        rows = torch.arange(len(prompt.layout))
        everything = assemble(prompt.layout, rows, features, scorer.embed)
        report.compare("selector_inputs_embeds", key, everything, case.expect(key))
    else:
        report.skip(key, "not stored")

    ranker = scorer.language_model if lite else scorer.decoder
    departure = family.departure(case, run, ranker)
    for reason in departure.reasons:
        report.known.setdefault(reason, []).append(name)
    if departure.rows is not None:
        rows = kept_rows(request.prompt, selection.kept)
        if torch.equal(departure.rows, rows):
            departure = replace(departure, rows=None)
    unlike = [part.members for number, part in enumerate(sets) if number in departure.sets]
    hidden = torch.cat([torch.empty(0, dtype=torch.long), *unlike])
    theirs = case.expect(f"{name}.selected")
    ours, theirs = (kept[~torch.isin(kept, hidden)] for kept in (selection.kept, theirs))
    report.compare("selected", f"{name}.selected", ours, theirs)
    if not case.masks(run):
        report.skip(f"sets and scores of {name}", "the reference kept everything unseen")
        return departure
    # A budget that holds everything is not scored here; the reference may still have done so.
    scores = selection.scores
    if scores is None:
        aggregation = check_aggregation(method.aggregation)
        scores = score(prompt, sets, features, scorer, layer=method.layer, aggregation=aggregation)
    check_sets(run, sets, scores, selection.kept, departure, case, report)
    return departure


def check_sets(
    run: Run,
    sets: list[FrameSet],
    scores: Tensor,
    kept: Tensor,
    departure: Departure,
    case: Case,
    report: Report,
) -> None:
    """Compare every set: its frames, scores and picked tokens, and positions where stored."""
    count = len(case.masks(run))
    report.compare("sets", f"{run.name}: sets", len(sets), count)
    for number, part in enumerate(sets[:count]):
        ours = {
            "frame_indices": part.frames,
            "scores": scores[part.members],
            "mask": torch.isin(part.members, kept),
        }
        for quantity, value in ours.items():
            key = f"{run.name}.set{number}.{quantity}"
            theirs = case.expect(key)
            if quantity != "frame_indices" and number in departure.sets:
                report.skip(key, "see what is known of this run")
            else:
                report.compare(quantity, key, value, theirs)
        key = f"set{number}.position_ids"
        if key in case.expected:
            theirs = case.expect(key)
            report.compare("set_position_ids", f"{run.name}: {key}", part.positions, theirs)


def check_layout(prompt: Prompt, sets: list[FrameSet], case: Case, report: Report) -> None:
    """Compare how the prompt is cut with what meta.json says."""
    first = int(prompt.visual_rows()[0])
    ours = {
        "num_frames": prompt.num_frames,
        "total_vision_tokens": prompt.num_visual,
        "tokens_per_frame": prompt.num_visual // prompt.num_frames,
        "prefix_len": first,
        "suffix_len": int(prompt.layout.query.sum()),
        "num_sets": len(sets),
    }
    for name, value in ours.items():
        if name in case.meta:
            report.compare("layout", f"meta.json: {name}", value, case.number(name))


@dataclass
class Answer:
    """What generation fed to the text model and what came out, step by step.

    Attributes
    ----------
    embeds, positions : for each forward, ``(tokens, hidden)`` and ``(tokens,)`` or
        ``(axes, tokens)``.
    logits : ``(steps, vocabulary)``.
    tokens : int64 ``(steps,)``.
    """

    embeds: list[Tensor]
    positions: list[Tensor]
    logits: Tensor
    tokens: Tensor


@torch.no_grad()
def gather(model: Any, inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Embed only some tokens of a prompt, numbered without gaps, for a model without a method."""
    engine = Engine(model, flexselect.Full())
    (request,) = engine.architecture.read(inputs)
    features = engine.encode(request).features.model
    embeds = assemble(request.prompt.layout, rows, features, engine.architecture.embed)
    return engine.prefill([(embeds, torch.arange(len(rows)))])


def generate(model: Any, inputs: dict[str, Tensor], case: Case) -> Answer:
    """Answer greedily, with as many tokens as the reference and like it past any end of answer."""
    embeds, positions = [], []

    def listen(_: Any, args: tuple[Any, ...], fed: dict[str, Any]) -> None:
        embeds.append(fed["inputs_embeds"][0])
        ids = fed["position_ids"]
        # (batch, tokens), or axes first; stock Qwen2.5-VL may put a fourth, of the text, before.
        positions.append(ids[0] if ids.ndim == 2 else ids[-3:, 0])

    decoder = flexselect.architecture_of(model).decoder
    handle = decoder.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=len(case.expect("baseline.tokens")),
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        handle.remove()
    # Ids of the prompt, if given, lead the new tokens.
    return Answer(embeds, positions, torch.cat(out.logits), out.sequences[0, -len(out.logits) :])


def check_answer(
    name: str, answer: Answer, case: Case, report: Report, departure: Departure = RIGHT
) -> None:
    """Compare what the text model read and wrote."""
    prefill = answer.positions[0]
    read = {
        "inputs_embeds": answer.embeds[0],
        "position_ids": prefill,
        "decode_position_ids": torch.stack([step[..., 0] for step in answer.positions[1:]]),
    }
    if f"{name}.rope_deltas" in case.expected:
        read["rope_deltas"] = (prefill.max() + 1 - prefill.shape[-1]).reshape(1, 1)
    written = {
        "logits": answer.logits[0],
        "step_logits": answer.logits,
        "tokens": answer.tokens,
    }
    for quantity, value in {**read, **written}.items():
        key = f"{name}.{quantity}"
        theirs = case.expect(key)
        if quantity in written and not departure.answer:
            report.skip(key, "see what is known of this run")
        else:
            report.compare(quantity, key, value, theirs)


if __name__ == "__main__":
    torch.set_num_threads(1)  # Tiny models: more threads only wait for each other.
    sys.exit(main())
