"""Find a checkpoint: a folder of this machine, or a repository of the hub by its id."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def local_folder(path_or_id: str | Path) -> Path:
    """Return the folder of a checkpoint, downloading it first if a hub id is named.

    Only safetensors, JSON and tokenizer files are ever fetched.

    Raises
    ------
    CheckpointError
        Neither a folder here nor a repository that can be reached.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(str(path_or_id)) or path.exists():
        raise CheckpointError(
            f"{path_or_id} is no folder with a checkpoint. Name a folder, or a hub id such as "
            "'owner/name'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{path_or_id} is no folder here, and the hub shows you no repository of that name. "
            "Check the id; if the repository is private or gated, log in with: hf auth login"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path_or_id} is no folder here, not downloaded yet, and the hub cannot be reached "
            f"({type(error).__name__}). Check the id and the network, or download it on a machine "
            "with network and name the folder."
        ) from error
