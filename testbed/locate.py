"""Where the checkpoints that come with the project lie."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import CheckpointError, OptionError

FOLDER = Path(__file__).resolve().parent / "checkpoints"
FAMILIES = ("qwen2_5_vl", "internvl", "llava_video")


def checkpoint_folder(family: str) -> Path:
    """Return the folder of a family's tiny checkpoint, for ``from_pretrained``.

    Raises
    ------
    OptionError
        If the family is unknown.
    CheckpointError
        If the checkpoint is not there.
    """
    return _found(
        FOLDER / _known(family),
        "checkpoint",
        f"Train it (about an hour on one core): "
        f"python -m flexselect.testbed.train --family {family}",
    )


def student_folder(family: str) -> Path:
    """Return the folder of a family's student: the small model that a Lite selector starts from.

    It is an ordinary checkpoint of the family with the tower of the tiny checkpoint, a projector
    of its own, and a language model of three layers that has learned to look at questions. Raises
    as `checkpoint_folder` does.
    """
    return _found(
        FOLDER.parent / "students" / _known(family),
        "student",
        f"Train it (a few minutes on one core): "
        f"python -m flexselect.testbed.train --family {family} --student",
    )


def selector_folder(family: str) -> Path:
    """Return the folder of a family's Lite selector, trained to rank as the tiny checkpoint does.

    Raises as `checkpoint_folder` does.
    """
    return _found(
        FOLDER.parent / "selectors" / _known(family),
        "Lite selector",
        f"Train it (minutes on two cores) with make train-selector MODEL={family}, and copy "
        f"config.json, model.safetensors and summary.json there from outputs/selector/{family}.",
    )


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise OptionError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    return family


def _found(folder: Path, what: str, remedy: str) -> Path:
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder} holds no {what}. {remedy}")
    return folder
