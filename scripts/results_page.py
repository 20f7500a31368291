"""Write docs/results.md: the published figures with ours beside them.

python scripts/results_page.py                                  # from the runs that are kept
python scripts/results_page.py --add results/eval/qwen2_5_vl/latest
python scripts/results_page.py --check                          # only tell whether it is current
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from flexselect.evaluation.published import keep, kept_runs, page
from flexselect.inference.terminal import err, out, user_errors

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], metavar="RUN", help="keep finished runs first"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    target = options.docs / "results.md"
    try:
        with user_errors():
            for run in options.add:
                out.print(str(keep(run, options.docs / "results")), markup=False, highlight=False)
            text = page(kept_runs(options.docs / "results"))
    except typer.Exit as ended:
        return ended.exit_code
    if options.check:
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            return 0
        err.print(f"{target} is not current; write it with: python scripts/results_page.py")
        return 1
    target.write_text(text, encoding="utf-8")
    out.print(str(target), markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
