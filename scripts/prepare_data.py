"""Prepare the data of a benchmark, so that lmms-eval and `make eval` find it.

Downloads from the hub, or takes what has been downloaded elsewhere (``--from``); unpacks, places
the videos where lmms-eval looks, and verifies that every row has its video. Whatever interrupts it:
run it again. The exit code is 0 only if nothing is missing.

    python scripts/prepare_data.py videomme --root data
    python scripts/prepare_data.py longvideobench --root data --from /mnt/LongVideoBench
    python scripts/prepare_data.py mvbench --root data --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from flexselect.core.errors import OptionError
from flexselect.evaluation.data import BENCHMARKS, Report, check, prepare
from flexselect.evaluation.data.fetch import download, downloads
from flexselect.evaluation.data.tasks import tasks_folder
from flexselect.evaluation.prompts import LOCAL
from flexselect.inference.terminal import err, out, progress_bars, user_errors

#: Missing videos that are named; the rest is counted.
NAMED = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare or check one benchmark, say what is there, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--root", type=Path, required=True, help="folder to prepare in (HF_HOME)")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="folder with the data set's files as the hub has them; nothing is downloaded then",
    )
    parser.add_argument("--check", action="store_true", help="only verify, change nothing")
    parser.add_argument("--open", action="store_true", help="also open every video: reads them all")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    options = parser.parse_args(arguments)
    try:
        with user_errors():
            report = run(options)
    except typer.Exit as ended:
        return ended.exit_code
    tell(report)
    return 0 if report.ok else 1


def run(options: argparse.Namespace) -> Report:
    """Do what the options say."""
    benchmark = BENCHMARKS[options.benchmark]
    if options.check:
        if options.source is not None:
            raise OptionError("--check changes nothing, so --from has no use with it.")
        with progress_bars(options.quiet) as progress:
            return check(benchmark, options.root, options.open, progress)
    if options.source is not None and not options.source.is_dir():
        raise OptionError(
            f"--from {options.source} is no folder. Name the folder that the files of "
            f"{benchmark.repository} were downloaded to."
        )
    source = options.source or download(benchmark, options.root)
    with progress_bars(options.quiet) as progress:
        report = prepare(benchmark, options.root, source, progress)
        if options.open:
            checked = check(benchmark, options.root, options.open, progress)
            report.unreadable = checked.unreadable
    return report


def tell(report: Report) -> None:
    """Print what is there, what is missing, and how to run the benchmark."""

    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False)

    for task, found in report.tasks.items():
        if found.rows is None:
            say(f"{task}: its rows are missing")
            continue
        there = found.videos - len(found.missing)
        say(f"{task}: {found.rows:,} rows, {there:,} of {found.videos:,} videos there")
        missing = [*found.missing, *found.beside]
        for place in missing[:NAMED]:
            say(f"  missing: {report.root / report.benchmark.folder / place}")
        if len(missing) > NAMED:
            say(f"  and {len(missing) - NAMED:,} more")
    for line in [*report.damaged, *report.unreadable]:
        err.print(line, style="red", markup=False, highlight=False)
    if report.ok:
        benchmark = report.benchmark
        task = benchmark.group or next(iter(benchmark.tasks))
        root = report.root.resolve()
        say(f"Ready: HF_HOME={root} and --tasks {task}; without a network,")
        say(f"  --tasks {task}{LOCAL} --include_path {tasks_folder(root, benchmark)}")
        if (fetched := downloads(root, benchmark)).is_dir():
            say(f"{fetched} is no longer needed.")


if __name__ == "__main__":
    sys.exit(main())
