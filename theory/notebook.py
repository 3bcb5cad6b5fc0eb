"""What the notebooks share: recorded results or fresh ones, pictures, cells, figures drawn again.

The tables of all runs (results.parquet) are not kept; the numbers in the JSON beside every figure
are, and they are enough to draw it again. The functions `..._inputs` take a command's output
directory and return the arguments of the function that drew the figure.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from theory.cli import UserError
from theory.gap_experiment import EVEN_SPLIT
from theory.metrics import Interval, middle
from theory.optima import ProblemOptima
from theory.pareto_summary import PLANE
from theory.problems import make_problem, short_name
from theory.records import read_json
from theory.schedulers import ORDERS
from theory.theorems.pareto import Front, pareto_front

DPI, SCREEN_DPI = 120, 96
PLANE_FRONT = 41
"""Points of the curve of minimisers in the plane; it is smooth."""
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Deleted when the notebook's process ends."""


def kept(name: str) -> Path:
    """figures/NAME of the repository, from its root or a folder below.

    Raises:
        UserError: if there is none.
    """
    for folder in (Path(), *(Path("../" * n) for n in range(1, len(Path.cwd().parts)))):
        if (folder / "figures" / name).is_dir():
            return folder / "figures" / name
    raise UserError(f"no figures/{name} here or above: set RECOMPUTE = True, or open a notebook "
                    "inside of the repository")  # fmt: skip


def fresh(command: Callable[[list[str]], None], flags: Sequence[str]) -> Path:
    """Run a command's `main` with `flags`, quietly, into a temporary directory.

    Raises:
        UserError: with what the command wrote, if it refuses the flags.
    """
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="joint-sft-dpo-"))
    folder, said = _FOLDERS[-1].name, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            command([*flags, "--out", folder])
    except SystemExit as error:
        raise UserError(said.getvalue().strip() or str(error)) from error
    return Path(folder)


class Picture:
    """A figure as a PNG in a notebook, without pyplot and its global state."""

    def __init__(self, drawn: Figure | tuple[Figure, Any]) -> None:
        """`drawn` is what a function of `theory.plotting` returns."""
        self.figure = drawn[0] if isinstance(drawn, tuple) else drawn

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The name is IPython's; drawn denser than shown, for sharp lines."""
        drawn, buffer = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=DPI)
        # A palette: a third of the size, to keep the notebooks small.
        image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        image.save(buffer, format="png", optimize=True)
        width, height = (round(inches * SCREEN_DPI) for inches in self.figure.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        return f"Picture({width:.1f} x {height:.1f} in, {len(self.figure.axes)} panels)"


def cell(interval: Mapping[str, float], form: str = ".3g") -> str:
    """'mean [low, high]' for a table, or the median, if it has one; NaN ends are left out."""
    centre, low, high = (interval.get(key) for key in ("mean", "low", "high"))
    centre = interval["median"] if centre is None else centre
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{centre:{form}}"
    return f"{centre:{form}} [{low:{form}}, {high:{form}}]"


def read(path: Path) -> Any:
    """The JSON in `path`, the infinite ends of an interval (null in JSON) as NaN."""
    return _with_nan(read_json(path))


def _with_nan(data: Any) -> Any:
    if isinstance(data, list):
        return [_with_nan(value) for value in data]
    if not isinstance(data, dict):
        return data
    ends = {"low", "high"} if data.keys() >= {"low", "high"} else set()
    return {k: np.nan if k in ends and v is None else _with_nan(v) for k, v in data.items()}


def gap_inputs(folder: Path) -> tuple[pd.DataFrame, dict[str, Any], float, float]:
    """(groups, references, lam, even split) of `theory.plotting.gap.gap_figure`."""
    record, references = read(folder / "gap.json"), read(folder / "summary.json")["references"]
    return _groups(record), references, middle(record["config"]["lams"]), EVEN_SPLIT


def convergence_inputs(
    folder: Path,
) -> tuple[pd.DataFrame, dict[tuple[str, float, str, str], pd.Series], dict[str, Any], float]:
    """(groups, bounds, limits, lam) of `theory.plotting.convergence.convergence_figure`."""
    record = read(folder / "convergence.json")
    lam, bounds = middle(record["config"]["lams"]), {}
    numbers = pd.DataFrame([n for n in record["panels"] if "bound" in n])
    for (problem, line), rows in numbers.groupby(["problem", "line"], sort=False):
        key = (problem, lam, line.removeprefix("bound of "), "weighted")
        bounds[key] = rows.set_index("step")["bound"]
    return _groups(record), bounds, read(folder / "summary.json")["sequential_limits"], lam


def _groups(record: dict[str, Any]) -> pd.DataFrame:
    """The rows of `theory.sweep.summarise` that the figure shows."""
    fixed = {
        "iterate": "weighted",
        "lam": middle(record["config"]["lams"]),
        "seeds": record["config"]["num_seeds"],
    }
    return pd.DataFrame([row | fixed for row in _rows(record["panels"])])


def _rows(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rows: dict[tuple[str, str, int, float], dict[str, Any]] = {}
    for number in panels:
        if "mean" not in number:
            continue
        line, order = number["line"], number["line"] in ORDERS
        found = {EVEN_SPLIT if order else np.nan: (number["mean"], number["low"], number["high"])}
        if "best_split" in number:  # of another split at every step: no number of its own
            found[-1.0] = (number["best_split"], np.nan, np.nan)
        for split, interval in found.items():
            key = {"problem": number["problem"], "variant": line, "step": number["step"]}
            key |= {"algorithm": "sequential" if order else line, "split": split}
            row = rows.setdefault((number["problem"], line, number["step"], split), key)
            row[number["metric"]] = Interval(*interval)
    yield from rows.values()


def fronts(folder: Path) -> dict[str, Front]:
    """The certified fronts by problem; where in parameter space is not recorded: theta is empty."""
    certificates = read(folder / "summary.json")["fronts"]
    return {
        panel["problem"]: _front(panel, certificates[panel["problem"]]["largest_certificate"])
        for panel in read(folder / "front.json")["panels"]
        if panel["line"] == "front"
    }


def _front(panel: dict[str, Any], certificate: float) -> Front:
    lams = np.array(panel["lam"])
    return Front(
        lams=lams,
        theta=np.empty((len(lams), 0)),
        losses=np.array(panel["losses"]),
        certificates=np.full(len(lams), certificate),
    )


def overview_inputs(
    folder: Path, problem: str
) -> tuple[list[dict[str, Any]], dict[str, pd.DataFrame], Front, float, float, float]:
    """The arguments of `theory.plotting.pareto.overview_figure` for one problem."""
    record, summary = read(folder / f"overview_{short_name(problem)}.json"), _summary(folder)
    lines = [line for line in summary["lines"] if line["problem"] == problem]
    paths = {
        panel["line"]: pd.DataFrame({key: panel[key] for key in ("step", "f_dpo", "f_sft")})
        for panel in record["panels"]
        if panel.get("panel") == "paths"
    }
    least = summary["fronts"][problem]["least_ideal_distance"]
    steps = {line: path.set_index("step") for line, path in paths.items()}
    return lines, steps, fronts(folder)[problem], least, _middle(summary), EVEN_SPLIT


def plane_inputs(
    folder: Path,
) -> tuple[ProblemOptima, Front, dict[str, dict[str, NDArray[np.float64]]], float]:
    """The arguments of `theory.plotting.pareto.plane_views_figure`; the optima are computed."""
    views: dict[str, dict[str, NDArray[np.float64]]] = {}
    for panel in read(folder / "paths.json")["panels"]:
        views.setdefault(panel["panel"], {})[panel["line"]] = np.array(panel["theta"])
    optima = ProblemOptima(make_problem(PLANE))
    return optima, pareto_front(optima, PLANE_FRONT), views, _middle(_summary(folder))


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = read(folder / "summary.json")
    return summary


def _middle(summary: dict[str, Any]) -> float:
    return middle(summary["config"]["lams"])
