"""Download a benchmark from the hub, in files that a later run continues."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import DataError, FlexSelectError
from .benchmarks import Benchmark
from .prepare import check_space

#: Libraries that the hub's client has spoken HTTP with.
_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def download(benchmark: Benchmark, root: Path) -> Path:
    """Fetch all files of a benchmark that are not here yet; return their folder.

    The disk must hold what is missing and, as videos do not compress, about the same again
    unpacked.

    Raises
    ------
    DataError
        The hub cannot be reached, the data set is gated or gone, or the disk is too small.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    folder = downloads(root, benchmark)
    page = f"https://huggingface.co/datasets/{benchmark.repository}"
    try:
        info = HfApi().dataset_info(
            benchmark.repository, revision=benchmark.revision, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        there = sum(size for name, size in sizes.items() if _has(folder / name, size))
        total = sum(sizes.values())
        check_space(root, total - there + _unpacked(root, benchmark, total))
        snapshot_download(
            benchmark.repository,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            ignore_patterns=list(benchmark.ignored),
        )
    except GatedRepoError as error:
        raise DataError(
            f"{benchmark.repository} is gated: accept its conditions at {page}, log in with "
            "`hf auth login`, then run again."
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"The hub shows you no data set {benchmark.repository}. If {page} opens in a browser, "
            "log in with `hf auth login`; else name files downloaded elsewhere with --from."
        ) from error
    except Exception as error:
        known = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
        # The hub's client lets errors of its HTTP library through, which changes between versions.
        of_http = type(error).__module__.split(".")[0] in _HTTP
        if isinstance(error, FlexSelectError) or not (isinstance(error, known) or of_http):
            raise
        raise DataError(
            f"The hub could not be reached or stopped answering ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Run again to "
            "continue; without a network, name files downloaded elsewhere with --from."
        ) from error
    return folder


def downloads(root: Path, benchmark: Benchmark) -> Path:
    """Return the folder that a benchmark's files are fetched to, as the hub has them."""
    return root / "downloads" / benchmark.name


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _unpacked(root: Path, benchmark: Benchmark, total: int) -> int:
    """Estimate the bytes still to be unpacked."""
    folder = root / benchmark.folder
    there = (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    )
    return max(0, total - there)
