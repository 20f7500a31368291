"""The families' eval.sh and train_selector.sh: the reference's names become the right command."""

import shlex
import subprocess

import pytest

from flexselect.inference.presets import FOLDER, load_presets
from flexselect.tests.paths import ROOT

FAMILIES = {
    "internvl": "internvl2_5-8b",
    "llava_video": "llava_video-7b",
    "qwen2_5_vl": "qwen2_5_vl-7b",
}


def run(family: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / family / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def printed(family: str, script: str, *arguments: str) -> list[str]:
    done = run(family, script, "--print", *arguments)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_defaults_are_the_preset(family):
    words = printed(family, "eval.sh")
    options = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
    preset = next(p for p in load_presets(FOLDER) if p.name == FAMILIES[family])
    assert words[words.index("--model") + 1] == f"flexselect_{family}"
    assert int(options["token_selector_layer"]) == preset.method["layer"]
    assert int(options["tkn_budget"]) == preset.method["budget"]
    assert options["token_selector_path"] == "self"


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_takes_the_reference_names(family):
    given = [
        "use_token_selector=True",
        "token_selector_path=a b/c",
        "tkn_budget=12",
        "token_selector_layer=-1",
        "drop_func_name=token_selection_mean",
        "token_selector_type=qwen2",
    ]
    words = printed(family, "eval.sh", *given)
    assert set(given) <= set(words[words.index("--model_args") + 1].split(","))
    plain = printed(family, "eval.sh", "use_token_selector=False")
    assert "tkn_budget" not in plain[plain.index("--model_args") + 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_reads_the_layer_that_evaluation_reads(family):
    preset = next(p for p in load_presets(FOLDER) if p.name == FAMILIES[family])
    words = printed(family, "train_selector.sh", "data_path=x.json")
    assert f"LAYER={preset.method['layer']}" in words
    assert f"MODEL={family}" in words
    assert "DATA=x.json" in words


@pytest.mark.parametrize("script", ["eval.sh", "train_selector.sh"])
def test_unknown_names_are_errors(script):
    done = run("internvl", script, "--print", "tkn_buget=3")
    assert done.returncode == 2
    assert "tkn_buget" in done.stderr
    assert done.stdout == ""
    assert "name=value" in run("internvl", script, "--help").stdout
