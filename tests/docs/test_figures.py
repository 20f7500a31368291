"""What README and docs say was measured is what stored results hold; what was counted, counts."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen2Config

from flexselect.scripts.bench_flops import prefill_flops, score_flops
from flexselect.scripts.bench_report import first_token, from_frames
from flexselect.scripts.testbed_cells import UNSEEN
from flexselect.scripts.testbed_study import read_results
from flexselect.scripts.testbed_tables import difference, write_report
from flexselect.testbed.locate import FAMILIES, checkpoint_folder, selector_folder
from flexselect.tests.paths import ROOT

RESULTS = ROOT / "docs" / "testbed.json"
BENCH = ROOT / "docs" / "bench"
#: Methods as docs/performance.md calls them, and as its stored outputs do.
METHODS = {"full": "full", "training-free": "flexselect", "Lite": "flexselect-lite"}


@pytest.mark.skipif(not RESULTS.is_file(), reason="the study's results are not in this tree")
def test_the_readmes_figures_are_the_studys() -> None:
    found = json.loads(RESULTS.read_text())["qwen2_5_vl"]
    section = (
        (ROOT / "README.md").read_text().split("## What the testbed shows")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| (.+?) \| [\d,]+ \| \**(\.\d\d)\** \|$", section, re.M)
    assert len(rows) == 6
    for method, share in rows:
        cell = found[f"test/512/retrieval/{method}"]
        measured = cell["right"] / cell["asked"]
        assert share == f"{measured:.2f}".lstrip("0"), f"{method}: {measured} in docs/testbed.json"


def test_the_testbeds_tables_are_those_of_its_results(tmp_path: Path) -> None:
    page = tmp_path / "testbed.md"
    shutil.copyfile(ROOT / "docs" / "testbed.md", page)
    write_report(read_results(RESULTS), page)
    assert page.read_text() == (ROOT / "docs" / "testbed.md").read_text()


def test_the_testbeds_results_are_of_the_committed_models_and_of_enough_questions() -> None:
    results = read_results(RESULTS)
    assert set(results) == {name for f in FAMILIES for name in (f, f"{f}, seed 1")}
    for name, cells in results.items():
        family = name.partition(",")[0]
        checkpoint, selector = (
            f"{zlib.crc32((find(family) / 'model.safetensors').read_bytes()):08x}"
            for find in (checkpoint_folder, selector_folder)
        )
        assert cells
        for key, cell in cells.items():
            assert (cell["knobs"]["checkpoint"] == checkpoint) == (name == family), key
            assert cell["knobs"]["selector"] in (None, selector), key
            weak = "/weak/" in key
            asked = [n for _, n in cell["by_task"].values()] if weak else [cell["asked"]]
            # Attention over every token of 2,048 frames takes too long.
            few = "/2048/" in key and key.endswith("/all tokens")
            assert min(asked) >= (72 if few else 200), key
            first = UNSEEN if key.startswith("test") and not weak else 0
            assert cell["knobs"]["first"] == first, key


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_knob_is_better_than_the_presets_on_validation_videos(family: str) -> None:
    text = (ROOT / "shared_configs" / "models" / f"{family}-tiny.yaml").read_text()
    preset = yaml.safe_load(text)["method"]
    cells = {
        key.removeprefix("validation/512/retrieval/"): cell
        for key, cell in read_results(RESULTS)[family].items()
        if key.startswith("validation/512/retrieval/")
    }
    for name, cell in cells.items():
        knob, _, value = name.partition(" ")
        if knob != "layer" and value != str(preset[knob]):
            _, low, _ = difference(cell["hits"], cells[f"{knob} {preset[knob]}"]["hits"])
            assert low < 0, name
    asks = f"{preset['aggregation']} of {preset['query']}"
    recall = {name: cell["recall"] for name, cell in cells.items() if name.endswith(f", {asks}")}
    assert max(recall, key=recall.__getitem__) == f"layer {preset['layer']}, {asks}"


def test_training_says_what_the_selectors_records_say() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for family in FAMILIES:
        record = json.loads((selector_folder(family) / "summary.json").read_text())
        found = record["comparison"]
        shares = [record["spearman"], record["recall_at_k"]]
        answers = [found[k] for k in ("lite", "training_free", "lite_recall")]
        answers.append(found["training_free_recall"])
        cells = [
            f"{found['kept_tokens']} of {found['visual_tokens']:,}",
            f"{record['steps']:,}",
            f"{shares[0]:.3f}".lstrip("0"),
            f"{shares[1]:.2f}".lstrip("0"),
            *(f"{share:.3f}".lstrip("0") for share in answers),
        ]
        assert f"| {family} | {' | '.join(cells)} |" in page


def performance(heading: str) -> tuple[str, dict[str, list[str]]]:
    """Return a section of docs/performance.md, and the cells of its tables by the first one."""
    page = (ROOT / "docs" / "performance.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines()]
    return section, {row[0]: row[1:] for row in rows if len(row) > 1}


def small() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the stored run of the small model, and its part of 512 frames."""
    record = json.loads((BENCH / "qwen2_5_vl-small-cpu.json").read_text())
    return record, next(part for part in record["lengths"] if part["frames"] == 512)


def test_the_parts_are_as_fast_as_their_stored_output_says() -> None:
    _, rows = performance("Bars")
    parts = json.loads((BENCH / "micro-cpu.json").read_text())["parts"]
    relevance, mapping = parts["relevance with projections"], parts["mapping back"]
    (found,) = (row[-1] for name, row in rows.items() if name.startswith("relevance"))
    assert found == f"{relevance['faster_cpu']:.1f}×"
    ours, plain = relevance["ours_extra_mib"], relevance["plain_extra_mib"]
    memory = rows["the same, memory beyond its inputs"][-1]
    assert memory == f"{ours:.0f} MiB (plain {plain:,.0f})"
    assert mapping["syncs"] == 0
    mapped = rows["mapping 6,720 of 107,520 back"][-1]
    assert mapped == f"{1e3 * mapping['ours_wall']:.1f} ms, none"
    short, long = (parts[f"Spearman loss, {tokens} tokens"] for tokens in ("4,096", "13,440"))
    assert rows["Spearman loss against plain, 4,096 and 13,440 tokens"][-1] == (
        f"{short['faster_cpu']:.0f}× and {long['faster_cpu']:.0f}×; "
        f"{short['ours_extra_mib']:.0f} and {long['ours_extra_mib']:.0f} MiB "
        f"(plain {short['plain_extra_mib']:.0f} and {long['plain_extra_mib']:,.0f})"
    )


def test_the_small_model_is_as_fast_as_its_stored_output_says() -> None:
    section, rows = performance("Bars")
    _, length = small()
    seconds = {said: first_token(length["methods"][m], "cpu") for said, m in METHODS.items()}
    (training_free,) = (row[-1] for name, row in rows.items() if name.endswith("against full"))
    for said, found in {"training-free": training_free, "Lite": rows["the same, Lite"][-1]}.items():
        ratio = seconds["full"] / seconds[said]
        assert found == f"{ratio:.1f}× ({seconds[said]:.1f} s of {seconds['full']:.1f} s)"
    pictures = {said: from_frames(length, m, "cpu") for said, m in METHODS.items()}
    faster = {said: pictures["full"] / pictures[said] for said in pictures}
    words = " ".join(section.split())
    assert f"training-free is {faster['training-free']:.2f} times and Lite" in words
    assert f"{faster['Lite']:.1f} times faster than full" in words


@pytest.mark.parametrize("said", METHODS)
def test_stages_of_the_small_model_are_those_of_its_stored_output(said: str) -> None:
    record, length = small()
    kept, *seconds, memory = performance("Bars")[1][said]
    method = length["methods"][METHODS[said]]
    assert kept == f"{method['kept_tokens']:,}"
    assert memory == f"{method['host_peak_mib']:.0f} MiB"
    stages = {name: pair["cpu"] for name, pair in method["stages"].items()}
    stages["further"] /= record["new_tokens"] - 1
    for name, cell in zip(("score", "gather", "prefill", "further"), seconds, strict=True):
        if cell != "–":
            assert float(cell) == round(stages[name], len(cell.split(".")[1])), name


def test_operations_of_a_question_are_those_of_the_formulas() -> None:
    """LLaVA-Video-7B and its published selector; a question of 60 tokens in its template."""
    section, rows = performance("The budget of a question")
    model = Qwen2Config(
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        num_hidden_layers=28,
        vocab_size=152064,
    )
    lite = Qwen2Config(
        hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864
    )
    text = 75
    sets = [(64 * 210 + text, text)] * 8
    counted = {
        "score, training-free (layers 0–18, 8 sets)": score_flops(model, 19, sets),
        "score, Lite (23 layers of 0.5B)": score_flops(lite, 23, sets),
        "prefill of 6,720 tokens and text": prefill_flops(model, 6720 + text),
        "prefill of all 107,520 (full)": prefill_flops(model, 107520 + text),
    }
    for stage, operations in counted.items():
        assert float(rows[stage][0].replace(",", "")) == pytest.approx(operations / 1e12, rel=5e-3)
    free, fast, prefill, full = counted.values()
    words = " ".join(section.split())
    assert f"{full / (free + prefill):.1f} times faster than full from encoded features" in words
    assert f"and Lite {full / (fast + prefill):.0f} times" in words
