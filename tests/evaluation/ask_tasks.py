"""The benchmarks in a process of their own: what is asked of each family, then the runs.

``python ask_tasks.py WORK.json``, with HF_HOME set: lmms-eval's tasks read it while they are
imported. All in one process, since starting it costs more than the answers.

``WORK.json`` names the ``tasks``, the ``include`` folders with them, the file ``asked`` that is
written, the videos to ``damage`` and to ``remove`` once that is done, and the ``commands`` of
``flexselect`` that are run then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager

from flexselect.cli import app
from flexselect.evaluation.prompts import give_prompt
from flexselect.evaluation.scores import sample_score

FAMILIES = ("internvl", "llava_video", "qwen2_5_vl", "qwen3_vl", "internvl")


def right_letter(doc: dict[str, Any]) -> str:
    """Return the letter that answers a row, in whichever way the benchmark says it."""
    if "correct_choice" in doc:
        return "ABCDE"[doc["correct_choice"]]
    if doc["answer"] in doc.get("candidates", ()):
        return "ABCDE"[doc["candidates"].index(doc["answer"])]
    return "ABCDE"[int(doc["answer"])] if doc["answer"].isdigit() else doc["answer"]


def scored(task: Any, doc: dict[str, Any], answer: str) -> float | None:
    """Return our score of an answer, from what the task's scoring gives."""
    metric = task.config.metric_list[0]["metric"]
    return sample_score(task.process_results(doc, [answer])[metric])


def ask(tasks: list[str], include: list[str]) -> dict[str, Any]:
    """Return by task what every family is asked, and which videos are opened for that."""
    manager = TaskManager(include_path=include, include_defaults=False)
    found: dict[str, Any] = {}
    for name in tasks:
        task = manager.load_task_or_group(name, "chat")[name]
        docs = list(task.eval_docs)
        found[name] = {
            "default": [task.doc_to_text(doc) for doc in docs],
            "videos": [
                [(path, Path(path).is_file()) for path in task.doc_to_visual(doc)] for doc in docs
            ],
            "scores": [
                [scored(task, doc, letter) for letter in (right, "ABCDE"[right == "A"])]
                for doc in docs
                for right in [right_letter(doc)]
            ],
            "prompts": {},
        }
        for family in FAMILIES:
            settings = [give_prompt(task, family) for _ in range(2)]
            assert settings[0] == settings[1], "twice is once"
            messages = [task.doc_to_messages(doc) for doc in docs]
            assert all(len(turns) == 1 and turns[0]["role"] == "user" for turns in messages)
            shown = [[part["type"] for part in turns[0]["content"]] for turns in messages]
            assert all(kinds == ["video", "text"] for kinds in shown), shown
            found[name]["prompts"][family] = [turns[0]["content"][1]["text"] for turns in messages]
    return found


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    asked = ask(work["tasks"], work["include"])
    Path(work["asked"]).write_text(json.dumps(asked))
    Path(work["damage"]).write_bytes(b"no video")
    Path(work["remove"]).unlink()
    for command in work["commands"]:
        app(command, standalone_mode=False)


if __name__ == "__main__":
    main()
