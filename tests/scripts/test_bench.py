"""The benchmark counts, builds and reports what it says; how fast anything is, is never tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from flexselect.core.decoder import reference_states
from flexselect.core.errors import OptionError
from flexselect.core.relevance import relevance
from flexselect.core.selection import select_from_sets
from flexselect.inference.presets import preset_of
from flexselect.inference.registry import architecture_of
from flexselect.scripts import bench, bench_flops, bench_micro
from flexselect.scripts.bench_meter import Meter, Peak
from flexselect.scripts.bench_report import bars, markdown
from flexselect.scripts.bench_shapes import build_subject
from flexselect.scripts.bench_stages import exponent
from flexselect.tests.paths import FIXTURES, ROOT, needs_fixtures

FAMILIES = ("qwen2_5_vl", "llava_video", "internvl")
#: Key lists of the published weights: model, and the part of its names that is the text model;
#: selector.
KEYS = {
    "qwen2_5_vl": ("qwen2_5_vl_7b", ("model.", "lm_head"), "selector_qwen2_5_vl_0.5b"),
    "llava_video": ("llava_video_7b_qwen2", ("model.", "lm_head"), "selector_llava_qwen2_0.5b"),
    "internvl": (
        "internvl2_5_8b",
        ("language_model.",),
        "selector_internvl_qwen2_0.5b_vocab151674",
    ),
}


def numbers(name: str, prefixes: tuple[str, ...] = ("",), without: str = " ") -> int:
    """Count the numbers in the tensors of a key list."""
    keys = json.loads((FIXTURES / "keymaps" / f"{name}.json").read_text())
    shapes = [
        torch.Size(shape)
        for key, shape in keys.items()
        if key.startswith(prefixes) and without not in key
    ]
    return sum(shape.numel() for shape in shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_shapes_are_built_where_they_run(family: str) -> None:
    """On the meta device: nothing of 8 billion parameters is ever on the host."""
    subject = build_subject(family, "7b", device="meta")
    architecture = architecture_of(subject.model)
    assert {p.device.type for p in subject.model.parameters()} == {"meta"}
    assert {p.device.type for p in subject.selector.parameters()} == {"meta"}
    assert subject.model.dtype == subject.selector.dtype == torch.bfloat16
    architecture.check_selector(subject.selector)
    preset = preset_of(architecture)
    assert preset.name != family, "the preset of this very size is meant"
    for knob, value in subject.knobs.items():
        assert preset.method[knob] == value
    for name in ("full", "uniform", "flexselect", "flexselect-lite"):
        assert subject.method(name).resolve(architecture, preset.method).record()["method"] == name


@needs_fixtures
@pytest.mark.parametrize("family", FAMILIES)
def test_real_shapes_are_those_of_the_published_weights(family: str) -> None:
    subject = build_subject(family, "7b", device="meta")
    model, prefixes, selector = KEYS[family]
    text = architecture_of(subject.model).decoder
    count = sum(p.numel() for p in [*text.parameters(), *subject.model.lm_head.parameters()])
    without = "model.vision_tower" if family == "llava_video" else " "
    expected = numbers(model, prefixes, without)
    if family == "llava_video":
        expected -= numbers(model, ("model.mm_projector", "model.image_newline"))
    assert count == expected
    assert sum(p.numel() for p in subject.selector.parameters()) == numbers(selector)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_every_family(family: str) -> None:
    subject = build_subject(family, "small", device="meta")
    architecture = architecture_of(subject.model)
    architecture.check_selector(subject.selector)
    assert len(architecture.decoder.layers) == 8
    assert architecture.decoder.config.hidden_size == 512
    for name in ("flexselect", "flexselect-lite"):
        subject.method(name).resolve(architecture, preset_of(architecture).method)


def test_the_real_shapes_need_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = bench.main(["--shape", "7b", "--device", "cpu", "--out", str(tmp_path)])
    assert code == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    if not torch.cuda.is_available():
        code = bench.main(["--shape", "7b", "--device", "cuda", "--out", str(tmp_path)])
        assert code == 2
        assert "no CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="tiny, small, 7b"):
        build_subject("qwen2_5_vl", "huge", device="cpu")


def causal_model() -> Any:
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def counted(run: Any) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_operations_are_those_that_torch_counts() -> None:
    """Torch counts attention over all pairs of tokens; a causal one needs half of them."""
    model, n, text, layer = causal_model(), 30, 4, 2
    config, width = model.config, 48
    masked = 2 * width * n * (n - 1)
    embeds = torch.randn(1, n, width)
    found = counted(lambda: model(inputs_embeds=embeds, logits_to_keep=1))
    assert bench_flops.prefill_flops(config, n) == found - 3 * masked

    def score() -> Tensor:
        rows = torch.arange(n - text, n)
        query, key = reference_states(model.model, embeds, torch.arange(n)[None], layer, rows)
        return relevance(query, key, rows, torch.arange(n))

    assert bench_flops.score_flops(config, layer, [(n, text)]) == counted(score) - layer * masked
    twice = bench_flops.score_flops(config, layer, [(n, text)] * 2)
    assert twice == 2 * bench_flops.score_flops(config, layer, [(n, text)])

    with torch.no_grad():
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    token = torch.randn(1, 1, width)
    found = counted(lambda: model(inputs_embeds=token, past_key_values=cache))
    # The new token sees itself, too.
    assert bench_flops.token_flops(config, n + 1) == found


def test_growth_is_fitted() -> None:
    assert exponent([64, 128, 512], [3 * n**1.7 for n in (64, 128, 512)]) == pytest.approx(1.7)
    assert exponent([64], [1.0]) is None
    assert exponent([64, 64], [1.0, 2.0]) is None


def test_peak_memory_of_a_block() -> None:
    with Peak(torch.device("cpu")) as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    if peak.host is not None:
        assert 60 < peak.host < 120
    assert peak.device is None


def test_stages_add_up_within_a_repeat() -> None:
    meter = Meter(torch.device("cpu"))
    for _ in range(3):
        meter.next_run()
        for _ in range(2):
            meter.add("score", (meter.now()[0] - 10, meter.now()[1] - 5))
    found = meter.medians()["score"]
    assert found["wall"] == pytest.approx(20, abs=1)
    assert found["cpu"] == pytest.approx(10, abs=1)


@pytest.mark.parametrize("part", [name for name in bench_micro.PARTS if "Spearman" not in name])
def test_parts_equal_their_plain_formulation(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VISUAL": 90, "TEXT": 7, "HIDDEN": 56, "HEADS": 14, "HEAD_DIM": 4}.items():
        monkeypatch.setattr(bench_micro, name, value)
    for name, value in {"KV_HEADS": 2, "LEAST_REPEATS": 1, "FRAMES": 130, "BUDGET": 300}.items():
        monkeypatch.setattr(bench_micro, name, value)
    found = bench_micro.PARTS[part](torch.device("cpu"), 1)
    assert found["difference"] <= 1e-6
    assert found.get("syncs", 0) == 0


def test_waits_for_the_device_are_counted() -> None:
    values = torch.arange(3)
    assert bench_micro.count_syncs(lambda: int(values[0])) == 1
    assert bench_micro.count_syncs(lambda: values.nonzero()) == 1
    assert bench_micro.count_syncs(lambda: values + 1) == 0


def test_selecting_never_looks_at_a_value() -> None:
    """On the meta device there are none: whatever waits for one raises."""
    members = [torch.arange(0, 40, 2, device="meta"), torch.arange(1, 40, 2, device="meta")]
    kept = select_from_sets(torch.empty(40, device="meta"), members, [3, 4])
    assert kept.shape == (7,)


def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "qwen", "--frames", "20", "40", "--repeats", "1", "--new-tokens", "3"]
    threads = torch.get_num_threads()
    try:
        assert bench.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "qwen2_5_vl-tiny-cpu.json").read_text())
    assert (tmp_path / "qwen2_5_vl-tiny-cpu.md").read_text() == said.rstrip("\n") + "\n"
    assert {"full", "flexselect", "uniform"} <= set(record["lengths"][0]["methods"])
    for length in record["lengths"]:
        opening = length["opening"]["stages"]
        assert {"decode", "prepare", "encode", "open"} <= set(opening)
        for name, found in length["methods"].items():
            stages = found["stages"]
            assert set(stages) == {"prompt", "score", "gather", "prefill", "further"}
            assert all(pair["wall"] > 0 for pair in stages.values())
            assert found["visual_tokens"] == 4 * length["frames"]
            assert (found["kept_tokens"] <= 64) == (name != "full")
            assert (found["flops"]["score"] > 0) == name.startswith("flexselect")
    for word in ("torch", "GFLOP/s", "exponent", record["machine"]["processor"]):
        assert word in said
    assert str(ROOT) not in said


def test_compiled_layers_rank_alike() -> None:
    """Scoring calls the layers as modules, so what compiles them for the model serves it, too."""
    subject = build_subject("qwen2_5_vl", "tiny", device="cpu")
    architecture = architecture_of(subject.model)
    arguments = (
        torch.randn(2, 30, 128),
        torch.arange(30).expand(3, 2, -1),
        2,
        torch.arange(25, 30),
    )
    # The script's own setting must not outlive the test; monkeypatch would delete it for good.
    with torch.no_grad(), torch._dynamo.config.patch(suppress_errors=False):
        expected = architecture.states(*arguments)
        bench.compile_layers(subject, backend="eager")
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["frames"]["ok"]
        found = architecture.states(*arguments)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    torch.testing.assert_close(found, expected)


def test_bars_say_what_was_found() -> None:
    def method(score: float, prefill: float) -> dict[str, Any]:
        stages = {"prompt": 0.0, "score": score, "gather": 0.0, "prefill": prefill}
        return {"stages": {name: {"wall": 9.0, "cpu": value} for name, value in stages.items()}}

    methods = {
        "full": method(0, 10),
        "flexselect": method(3, 1),
        "flexselect-lite": method(1, 1),
    }
    record = {
        "shape": "small",
        "machine": {"kind": "cpu"},
        "lengths": [{"frames": 512, "methods": methods}],
    }
    found = bars(record)
    assert [(bar["wanted"], bar["found"], bar["holds"]) for bar in found] == [
        ("≥ 2.5", 2.5, True),
        ("≥ 6", 5.0, False),
    ]
    record["shape"] = "tiny"
    assert bars(record) == []


def test_a_missed_bar_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missed = {"what": "w", "wanted": "≥ 1", "found": 0.5, "holds": False}
    monkeypatch.setattr(bench, "run_micro", lambda _: _record())
    monkeypatch.setattr(bench, "bars", lambda _: [missed])
    arguments = ["--micro", "--out", str(tmp_path)]
    assert bench.main([*arguments, "--check"]) == 1
    assert bench.main(arguments) == 0
    assert "**no**" in (tmp_path / "micro-cpu.md").read_text()


def _record() -> dict[str, Any]:
    machine = {
        "kind": "cpu",
        "processor": "p",
        "threads": 1,
        "python": "3",
        "torch": "2",
        "transformers": "5",
    }
    record = {"family": "", "shape": "parts", "machine": machine, "repeats": 1, "parts": {}}
    assert "p; 1 CPU thread(s)" in markdown({**record, "bars": []})
    return record
