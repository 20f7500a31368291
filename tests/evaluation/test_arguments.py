"""Model arguments: text made into values, the reference's names, and nothing ignored."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from lmms_eval.utils import simple_parse_args_string

from flexselect.core.errors import OptionError
from flexselect.evaluation.arguments import coerce, parse_arguments
from flexselect.inference.methods import FlexSelect, Full, Random
from flexselect.tests.paths import ROOT


def parse(text: str):
    """Parse as the harness does, from the command line."""
    return parse_arguments(simple_parse_args_string(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("", None),
        ("512", 512),
        ("2.0", 2),
        ("0.5", 0.5),
        ("True", True),
        ('["a", 1]', ["a", 1]),
        ('{"a": null}', {"a": None}),
        ("token_selection", "token_selection"),
        (7, 7),
        (False, False),
    ],
)
def test_text_becomes_a_value(text, value):
    read = coerce(text)
    assert read == value
    assert type(read) is type(value)


def test_broken_json_is_named():
    with pytest.raises(OptionError, match=r"\[1, is none"):
        coerce("[1, is none")


def test_arguments_reach_the_method_and_the_sampling():
    arguments = parse("pretrained=x,method=random,budget=64,seed=3,fps=0.5,max_frames=8,device=cpu")
    assert arguments.build_method() == Random(budget=64, seed=3)
    assert arguments.sampling == {"fps": 0.5, "max_frames": 8}
    assert arguments.device == "cpu"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pretrained=x,budgt=64", "budgt"),
        ("budget=64", "pretrained"),
        ("pretrained=x,budget=many", "budget"),
        ("pretrained=x,budget=0", "budget"),
        ("pretrained=x,budget=True", "budget"),
        ("pretrained=x,method=best", "best"),
        ("pretrained=x,method=full,budget=64", "budget"),
        ("pretrained=x,method=uniform,selector=y", "selector"),
        ("pretrained=x,method=flexselect-lite", "selector"),
        ("pretrained=x,frames=16,fps=2", "fps"),
        ("pretrained=x,batch_size=auto", "batch_size"),
        ("pretrained=x,modality=image", "modality"),
        ("pretrained=x,tkn_budget=64,budget=32", "tkn_budget"),
        ("pretrained=x,use_token_selector=maybe", "use_token_selector"),
        ("pretrained=x,max_batch_size=8", "max_batch_size"),
        ("pretrained=x,cache_gb=inf", "cache_gb"),
        ("pretrained=x,use_flash_attention_2=maybe", "use_flash_attention_2"),
        ("pretrained=x,token_selector_path=self,selector=y", "selector"),
        ("pretrained=x,use_token_selector=False,method=random", "use_token_selector"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(text, named):
    with pytest.raises(OptionError, match=named):
        parse(text)


def test_the_reference_names_mean_ours():
    ours = parse("pretrained=x,budget=6720,layer=19,aggregation=mean,frames=512,backend=decord")
    theirs = parse(
        "pretrained=x,use_token_selector=true,token_selector_path=self,token_selector_layer=19,"
        "drop_func_name=token_selection_mean,tkn_budget=6720,max_frames_num=512,"
        "video_decode_backend=decord,conv_template=qwen_1_5,mm_spatial_pool_mode=bilinear"
    )
    assert theirs.sampling == ours.sampling
    assert theirs.backend == ours.backend
    first, second = theirs.build_method(), ours.build_method()
    assert isinstance(first, FlexSelect)
    assert isinstance(second, FlexSelect)
    assert (first.budget, first.layer) == (second.budget, second.layer) == (6720, 19)
    # The method itself knows the reference's names of the aggregation.
    assert (first.aggregation, second.aggregation) == ("token_selection_mean", "mean")


def test_a_selector_ranks_at_its_own_last_layer():
    # The reference's scripts always name the main model's layer; its selectors never read it.
    arguments = parse(
        "pretrained=x,use_token_selector=True,token_selector_path=a/b,token_selector_layer=20,"
        "token_selector_type=qwen2"
    )
    assert arguments.build_method() == FlexSelect(selector="a/b")


def test_without_a_token_selector_everything_stays():
    arguments = parse("pretrained=x,use_token_selector=False,tkn_budget=64,token_selector_layer=3")
    assert arguments.build_method() == Full()


@pytest.mark.parametrize("family", ["internvl", "llava_video", "qwen2_5_vl"])
def test_every_eval_script_says_what_the_plugin_takes(family):
    script = [str(ROOT / family / "scripts" / "eval.sh"), "--print", "token_selector_path=a/b"]
    done = subprocess.run(["bash", *script], capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    arguments = parse(words[words.index("--model_args") + 1])
    method = arguments.build_method()
    assert isinstance(method, FlexSelect)
    assert method.selector == "a/b"
    assert arguments.sampling
