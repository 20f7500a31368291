"""What the benchmarks look like on the hub, and where lmms-eval 0.7 looks for their videos.

The folder names and paths restate what its task files say (``dataset_path``, ``cache_dir``) and
what its ``doc_to_visual`` functions open; ``HF_HOME`` is the root that data is prepared in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Builds the places of a row's video below the benchmark's folder, best first.
Places = Callable[[Mapping[str, Any]], tuple[str, ...]]


@dataclass(frozen=True)
class RowFiles:
    """Where the rows of one task are.

    Attributes
    ----------
    patterns : globs below the downloaded repository, tried in this order.
    split : the split that lmms-eval's task reads.
    yaml : the task's file below ``lmms_eval/tasks``.
    places : where a row's video may be.
    beside : other files that a row's prompt needs.
    """

    patterns: tuple[str, ...]
    split: str
    yaml: str
    places: Places
    beside: Places = lambda row: ()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes
    ----------
    name : as the command calls it.
    repository, revision : data set of the hub.
    folder : lmms-eval's folder of it below ``HF_HOME``.
    tasks : lmms-eval's task to its rows; the first is the one to run.
    group : task that stands for all of them, if there is one.
    gated : the hub asks for conditions to be accepted first.
    """

    name: str
    repository: str
    folder: str
    tasks: Mapping[str, RowFiles]
    revision: str = "main"
    group: str | None = None
    gated: bool = False
    #: Globs of files that are of no use here.
    ignored: tuple[str, ...] = field(default=(".gitattributes", "*.md", "assert/*"))


def _videomme(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"data/{row['videoID']}.{ending}" for ending in ("mp4", "MP4", "mkv"))


def _egoschema(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"videos/{row['video_idx']}.{ending}" for ending in ("mp4", "MP4"))


def _mvbench(folder: str) -> Places:
    return lambda row: (f"{folder}/{row['video']}",)


_VIDEOMME = ("videomme/test-*.parquet", "**/test-*.parquet")
_EGO = "{0}/test-*.parquet", "{0}/**/*.parquet"

#: MVBench's tasks and the folders of their videos.
_MVBENCH = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="videomme",
            repository="lmms-eval/Video-MME",
            folder="videomme",
            tasks={
                "videomme": RowFiles(_VIDEOMME, "test", "videomme/videomme.yaml", _videomme),
                "videomme_long": RowFiles(
                    _VIDEOMME, "test", "videomme/videomme_long.yaml", _videomme
                ),
            },
        ),
        Benchmark(
            name="mlvu",
            repository="sy1998/MLVU_dev",
            folder="mlvu",
            tasks={
                "mlvu_dev": RowFiles(
                    ("mlvu/test-*.parquet", "**/test-*.parquet"),
                    "test",
                    "mlvu/mlvu_dev.yaml",
                    lambda row: (row["video_name"],),
                )
            },
        ),
        Benchmark(
            name="longvideobench",
            repository="longvideobench/LongVideoBench",
            folder="datasets/longvideobench",
            gated=True,
            tasks={
                "longvideobench_val_v": RowFiles(
                    ("validation-*.parquet", "**/validation-*.parquet"),
                    "validation",
                    "longvideobench/longvideobench_val_v.yaml",
                    lambda row: (f"videos/{row['video_path']}",),
                    lambda row: (f"subtitles/{row['subtitle_path']}",),
                )
            },
        ),
        Benchmark(
            name="lvbench",
            repository="lmms-eval/LVBench",
            folder="lvbench",
            tasks={
                "lvbench": RowFiles(
                    ("data/train-*.parquet", "**/train-*.parquet"),
                    "train",
                    "lvbench/lvbench.yaml",
                    lambda row: (row["video_path"],),
                )
            },
        ),
        Benchmark(
            name="egoschema",
            repository="lmms-eval/egoschema",
            folder="egoschema",
            tasks={
                "egoschema_subset": RowFiles(
                    tuple(pattern.format("Subset") for pattern in _EGO),
                    "test",
                    "egoschema/egoschema_subset.yaml",
                    _egoschema,
                ),
                "egoschema": RowFiles(
                    tuple(pattern.format("GENERATION") for pattern in _EGO),
                    "test",
                    "egoschema/egoschema.yaml",
                    _egoschema,
                ),
            },
        ),
        Benchmark(
            name="mvbench",
            repository="OpenGVLab/MVBench",
            revision="video",
            folder="mvbench_video",
            group="mvbench",
            tasks={
                f"mvbench_{name}": RowFiles(
                    (f"json/{name}.json",),
                    "train",
                    f"mvbench/mvbench_{name}.yaml",
                    _mvbench(folder),
                )
                for name, folder in _MVBENCH.items()
            },
        ),
    )
}
