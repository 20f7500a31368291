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
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import flexselect
from flexselect.core.layout import Prompt
from flexselect.core.relevance import check_aggregation
from flexselect.inference.features import assemble
from flexselect.inference.scoring import FrameSet, score, split_prompt
from flexselect.scripts.fixture_families import (
    Case,
    FixtureError,
    OtherData,
    Run,
    read_case,
)
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
    budget, layer = case.number("tkn_budget"), case.number("token_selector_layer")
    frames_per_set = case.number("max_frames_per_group")
    report.title = (
        f"{case.meta['arch']}, budget {budget}, {frames_per_set} frames per set, layer {layer}"
    )
    model = flexselect.load_model(case.folder / "model", dtype="float32", device="cpu")
    inputs = case.family.model_inputs(case, model)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    if case.family.no_stock_baseline is None:
        check_answer("baseline", generate(model, inputs, case), case, report)
    else:
        report.skip("baseline without a method", case.family.no_stock_baseline)
    with flexselect.Full()(model):
        check_answer("baseline", generate(model, inputs, case), case, report)
    for run in case.runs:
        selector = case.selector_folder(run.mode)
        method = flexselect.FlexSelect(
            budget=budget,
            layer=layer if selector is None else None,
            selector=selector,
            aggregation=run.aggregation,
            frames_per_set=frames_per_set,
        )
        with method(model):
            check_answer(run.name, generate(model, inputs, case), case, report)
            check_ranking(run, model, inputs, case, report)
    for name, tensor in inputs.items():
        report.compare("caller_inputs", name, tensor, before[name])
    report.known += case.family.known_errors(case)
    for name in case.untaken():
        report.skip(name, "no quantity of this name is known")


@torch.no_grad()
def check_ranking(
    run: Run, model: Any, inputs: dict[str, Tensor], case: Case, report: Report
) -> None:
    """Compare what decided the latest selection, from the vision tower to the kept tokens."""
    engine, method, name = model.flexselect.engine, model.flexselect.method, run.name
    (request,) = engine.architecture.read(inputs)
    encoded = engine.encode(request)
    for key, seen in case.family.vision_features(model, request, encoded).items():
        report.compare(key, f"{name}: {key}", seen, case.given(key))

    scorer = engine.architecture if method.selector is None else method.selector
    features = encoded.features.model if method.selector is None else encoded.features.selector
    prompt = request.prompt if method.selector is None else scorer.localise(request.prompt)
    sets = split_prompt(prompt, scorer, method.frames_per_set)
    check_layout(request.prompt, sets, case, report)
    key = f"{run.mode}.selector_inputs_embeds"
    if key in case.expected:
        everything = assemble(
            prompt.layout, torch.arange(len(prompt.layout)), features, scorer.embed
        )
        report.compare("selector_inputs_embeds", key, everything, case.expect(key))
    else:
        report.skip(key, "not stored")

    (selection,) = model.flexselect.selections
    report.compare("selected", f"{name}.selected", selection.kept, case.expect(f"{name}.selected"))
    ranked = scored_sets(name, case)
    if not ranked:
        report.skip(f"sets and scores of {name}", "the reference kept everything unseen")
        return
    report.compare("sets", f"{name}: sets", range(len(sets)), ranked)
    # A budget that holds everything is not scored here; the reference may still have done so.
    scores = selection.scores
    if scores is None:
        scores = score(
            prompt,
            sets,
            features,
            scorer,
            layer=method.layer,
            aggregation=check_aggregation(method.aggregation),
        )
    for index in set(ranked) & set(range(len(sets))):
        part, prefix = sets[index], f"{name}.set{index}"
        ours = {
            "frame_indices": part.frames,
            "scores": scores[part.members],
            "mask": torch.isin(part.members, selection.kept),
        }
        for quantity, value in ours.items():
            key = f"{prefix}.{quantity}"
            report.compare(quantity, key, value, case.expect(key))
        key = f"set{index}.position_ids"
        if key in case.expected:
            report.compare("set_position_ids", f"{name}: {key}", part.positions, case.expect(key))


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


def scored_sets(run: str, case: Case) -> list[int]:
    """Return the numbers of the sets scored in a run; none where everything was kept unseen."""
    found = [re.match(rf"{run}\.set(\d+)\.", key) for key in case.expected]
    ranked = sorted({int(match[1]) for match in found if match})
    if not ranked and case.facts(Run(*run.split("."))).get("returned_all_mask") is False:
        raise FixtureError(f"expected.safetensors has no scores of {run}, which did not keep all")
    return ranked


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
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(embeds, positions, torch.cat(out.logits), tokens)


def check_answer(name: str, answer: Answer, case: Case, report: Report) -> None:
    """Compare what the text model read and wrote."""
    prefill = answer.positions[0]
    ours = {
        "inputs_embeds": answer.embeds[0],
        "position_ids": prefill,
        "decode_position_ids": torch.stack([step[..., 0] for step in answer.positions[1:]]),
        "logits": answer.logits[0],
        "step_logits": answer.logits,
        "tokens": answer.tokens,
    }
    if f"{name}.rope_deltas" in case.expected:
        ours["rope_deltas"] = (prefill.max() + 1 - prefill.shape[-1]).reshape(1, 1)
    for quantity, value in ours.items():
        key = f"{name}.{quantity}"
        report.compare(quantity, key, value, case.expect(key))


if __name__ == "__main__":
    torch.set_num_threads(1)  # Tiny models: more threads only wait for each other.
    sys.exit(main())
