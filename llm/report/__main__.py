"""One self-contained HTML page for a run of `llm.run` or a comparison of `llm.compare`.

    python -m llm.report runs/maxright                   # writes runs/maxright/report.html
    python -m llm.report runs/compare --out report.html

Objectives over the steps, gaps, decisions, dropped rows, gradients, time and cost, settings; of a
comparison its table and figures, the tuning and the failures; the verdicts of `llm.validate`, if
its validation.json is there. No scripts, nothing from the network. A run or a comparison that was
killed gets a page too, which says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm.report import comparison, single, verdicts
from llm.report.page import page
from llm.report.record import is_run, read_run
from theory.cli import OneLineParser, UserError, run_command
from theory.records import write_text

PROG = "python -m llm.report"
FILE = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    folder = Path(arguments.folder)
    out = folder / FILE if arguments.out is None else Path(arguments.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file")
    write_text(out, report(folder, arguments.validation))
    print(f"wrote {out}")


def report(folder: Path, validation: Path | None = None) -> str:
    """The page for a directory, as one string of HTML.

    Args:
        folder: what `llm.run` or `llm.compare` wrote into.
        validation: the findings of `llm.validate`; default `folder`/validation.json, if it exists.

    Raises:
        UserError: the directory is neither, or what it holds cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory")
    found = folder / verdicts.FILE if validation is None else validation
    if validation is not None and not found.is_file():
        raise UserError(f"--validation {found} does not exist")
    findings = list(verdicts.findings(found)) if found.is_file() else []
    if is_run(folder):
        return page(single.TEMPLATE, findings=findings, **single.content(read_run(folder)))
    if comparison.is_comparison(folder):
        return page(comparison.TEMPLATE, findings=findings, **comparison.content(folder))
    raise UserError(f"{folder} holds neither a run of llm.run nor a comparison of llm.compare")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROG, description="Write an HTML page for a run or a comparison.")
    parser.add_argument("folder", metavar="RUN_DIR", help="output directory of the run")
    parser.add_argument("--out", help="file to write; default RUN_DIR/report.html")
    parser.add_argument("--validation", type=Path, help="findings of llm.validate to include")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, PROG)
