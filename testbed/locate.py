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
    if family not in FAMILIES:
        raise OptionError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    folder = FOLDER / family
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"{folder} holds no checkpoint. Train it (10-20 minutes on two cores): "
            f"python -m flexselect.testbed.train --family {family}"
        )
    return folder
