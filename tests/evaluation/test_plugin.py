"""lmms-eval finds the plug-in, and the plug-in is what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, get_model_manifest

from flexselect.core.errors import OptionError, UnsupportedModelError
from flexselect.evaluation.model import CLASSES
from flexselect.evaluation.plugin import MODELS
from flexselect.inference.registry import FAMILIES
from flexselect.testbed.locate import checkpoint_folder

TINY = str(checkpoint_folder("qwen2_5_vl"))


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_every_family_is_found_by_the_harness(family):
    found = get_model(f"flexselect_{family}")
    assert found is CLASSES[family]
    assert found.family == family
    assert not found.is_simple


def test_short_names_are_taken():
    assert get_model_manifest("flexselect_qwen").model_id == "flexselect_qwen2_5_vl"
    assert get_model("flexselect_llava") is CLASSES["llava_video"]


def test_no_family_is_forgotten():
    assert {family for family, _ in FAMILIES.values()} <= set(CLASSES)
    assert {each.__name__ for each in CLASSES.values()} == set(MODELS.values())


def test_the_entry_point_loads_no_model_code():
    code = (
        "import sys; from flexselect.evaluation import plugin; plugin.manifests()\n"
        "heavy = ('flexselect.evaluation.model', 'lmms_eval.api.model', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_of_another_family_is_refused():
    with pytest.raises(UnsupportedModelError, match="flexselect_qwen2_5_vl"):
        CLASSES["internvl"](pretrained=TINY, batch_size="1", device="cpu")


def test_the_harness_says_what_is_wrong_and_the_rest_is_refused():
    make = CLASSES["qwen2_5_vl"].create_from_arg_string
    with pytest.raises(OptionError, match="tkn_buget"):
        make(f"pretrained={TINY},tkn_buget=3", {"batch_size": "1", "device": "cpu"})
    model = make(f"pretrained={TINY},budget=8", {"batch_size": "2", "device": "cpu"})
    assert (model.batch_size, model.settings["budget"], model.settings["layer"]) == (2, 8, 4)
    with pytest.raises(OptionError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(OptionError, match="rounds"):
        model.generate_until_multi_round([])


class _Task:
    """A task as the harness has built it: with its own prompt in the requests already."""

    class config:
        task = "videomme"
        doc_to_text = None

    def __init__(self) -> None:
        self.lmms_eval_specific_kwargs = {"pre_prompt": "", "post_prompt": "The harness's own."}

    def doc_to_text(self, doc):
        return f"{doc['question']} {self.lmms_eval_specific_kwargs['post_prompt']}"

    def doc_to_messages(self, doc):
        content = [{"type": "text", "text": self.doc_to_text(doc)}]
        return [{"role": "user", "content": content}]


@pytest.mark.parametrize("prompts", ["published", "task"])
def test_the_published_prompt_is_asked_and_logged_unless_told_otherwise(prompts, tmp_path):
    model = CLASSES["qwen2_5_vl"](pretrained=TINY, prompts=prompts, run_folder=str(tmp_path))
    task = _Task()
    row = {"question": "What number is on the red star?"}
    model.task_dict["videomme"] = {"test": [row]}
    arguments = (task.doc_to_text(row), task.doc_to_messages, {}, 0, "videomme", "test")
    metadata = {"task": "videomme", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", arguments, 0, metadata=metadata)
    model.generate_until([request])
    (answered,) = model.answered.values()
    asked = answered["prompt"][0]["content"][0]["text"]
    assert asked == request.args[0]
    assert ("The harness's own." in asked) == (prompts == "task")
    assert ("Answer with the option's letter" in asked) == (prompts == "published")


def about(videos, doc_id: int) -> Instance:
    """Ask about one of two videos in turn."""
    content = [
        {"type": "video", "url": str(videos[doc_id % 2])},
        {"type": "text", "text": f"What number is on the {['red', 'blue'][doc_id // 2]} star?"},
    ]
    messages = [{"role": "user", "content": content}]
    arguments = ("", lambda doc: messages, {"max_new_tokens": 2}, doc_id, "talks", "test")
    metadata = {"task": "talks", "doc_id": doc_id, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata=metadata)


def test_answers_come_in_the_order_of_requests_and_a_broken_batch_is_asked_again(videos, tmp_path):
    def run(**given):
        model = CLASSES["qwen2_5_vl"](pretrained=TINY, budget=8, device="cpu", **given)
        model.task_dict["talks"] = {"test": [{}] * 4}
        replies = model.generate_until([about(videos, doc_id) for doc_id in range(4)])
        return [reply.text for reply in replies]

    alone = run()
    assert run(batch_size="2", run_folder=str(tmp_path)) == alone
    journal = tmp_path / "answers-0.jsonl"
    lines = journal.read_text().splitlines()
    # Questions about a video are asked one after another.
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 2, 1, 3]
    assert [json.loads(line)["opened"] for line in lines] == [1, 0, 1, 0]
    journal.write_text("\n".join([*lines[:2], lines[3]]) + "\n")
    assert run(batch_size="2", run_folder=str(tmp_path)) == alone
    again = [json.loads(line)["doc_id"] for line in journal.read_text().splitlines()]
    # The batch that was broken is asked whole, the other one not at all.
    assert again == [0, 2, 3, 1, 3]
    # What was answered without a record of its selection is asked again for one.
    assert run(record_selection="True", run_folder=str(tmp_path)) == alone
    recorded = [json.loads(line) for line in journal.read_text().splitlines()[5:]]
    assert [len(line["selection"]["kept_per_frame"]) for line in recorded] == [1] * 4
    assert run(record_selection="True", run_folder=str(tmp_path)) == alone
    assert len(journal.read_text().splitlines()) == 9
    # Another budget is another question.
    given = {"pretrained": TINY, "budget": 12, "device": "cpu", "run_folder": str(tmp_path)}
    other = CLASSES["qwen2_5_vl"](**given)
    other.task_dict["talks"] = {"test": [{}] * 4}
    other.generate_until([about(videos, 0)])
    assert len(journal.read_text().splitlines()) == 10
