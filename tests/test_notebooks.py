"""The notebooks run, show the recorded numbers, and recompute them with one switch."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from theory.cli import UserError
from theory.notebook import Picture, cell, convergence_inputs, fresh, gap_inputs, kept, read
from theory.plotting.convergence import convergence_figure
from theory.plotting.gap import gap_figure

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_NUMBER = {path.name[:2]: path for path in NOTEBOOKS}
MACHINE_PATH = re.compile(r"(^|[\s'\"(=])/(home|root|tmp|work|mnt|usr|opt|var|Users)/|[A-Z]:\\\\")
OTHER_PICTURE = 0.01
"""Mean difference of two pictures' pixels, of 1. Other versions of fonts and libraries shift a few
edges; curves of other data, or a panel more, change a few percent of a picture's pixels."""
SMALL = ["--seeds", "2", "--jobs", "1", "--steps"]
TINY = {
    "01": [*SMALL, "100", "--problem", "bernoulli"],
    "02": [*SMALL, "100", "--problem", "toy2d", "--fit_from", "10"],
    "03": [*SMALL, "100", "--problem", "toy2d"],
    "06": [*SMALL, "256", "--problem", "toy2d", "--part", "switches"],
}
"""Sizes at which a command takes seconds; those of the language models take minutes."""
CELLS = {"06": 3}
"""How many of a notebook's code cells TINY has results for, if not for all."""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [part for part in notebook.cells if part.cell_type == "code"]


def texts(part: NotebookNode) -> list[str]:
    """What a cell shows, without its pictures."""
    return [
        output["text"] if output.output_type == "stream" else output["data"].get("text/plain", "")
        for output in part.outputs
    ]


def pictures(part: NotebookNode) -> Iterator[np.ndarray[Any, Any]]:
    for output in part.outputs:
        if "image/png" in output.get("data", {}):
            png = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
            yield np.asarray(png.convert("RGB"), dtype=float) / 255.0


def difference(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Mean over the pixels that both have; the height of a line of text is no other picture."""
    height, width = np.minimum(first.shape[:2], second.shape[:2])
    return float(np.abs(first[:height, :width] - second[:height, :width]).mean())


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> tuple[NotebookNode, NotebookNode]:
    """As it is kept, and executed again where it lies; nothing is written."""
    path: Path = request.param
    stored = nbformat.read(path, as_version=4)
    again = nbformat.read(path, as_version=4)
    for part in code_cells(again):
        part.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(again, timeout=120, resources=where).execute()
    return stored, again


def test_a_notebook_runs_without_warnings(notebook: tuple[NotebookNode, NotebookNode]) -> None:
    for part in code_cells(notebook[1]):
        for output in part.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output["text"]


def test_the_kept_outputs_are_the_recorded_numbers(
    notebook: tuple[NotebookNode, NotebookNode],
) -> None:
    stored, again = notebook
    assert any(texts(part) for part in code_cells(stored))
    for before, after in zip(code_cells(stored), code_cells(again), strict=True):
        assert texts(before) == texts(after)


def test_the_kept_pictures_are_those_of_the_recorded_numbers(
    notebook: tuple[NotebookNode, NotebookNode],
) -> None:
    stored, again = (
        [picture for part in code_cells(half) for picture in pictures(part)] for half in notebook
    )
    assert stored
    for before, after in zip(stored, again, strict=True):
        assert difference(before, after) < OTHER_PICTURE


def test_different_pictures_are_told_apart() -> None:
    """The tolerance of the test above can fail: any two pictures of one notebook exceed it."""
    for path in NOTEBOOKS:
        shown = [p for part in code_cells(nbformat.read(path, 4)) for p in pictures(part)]
        for first, second in itertools.pairwise(shown):
            assert difference(first, second) > OTHER_PICTURE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_machine_paths_and_is_small(path: Path) -> None:
    kept_as = nbformat.read(path, as_version=4)
    shown = [part.source for part in kept_as.cells]
    shown += [text for part in code_cells(kept_as) for text in texts(part)]
    assert not [text for text in [*shown, str(kept_as.metadata)] if MACHINE_PATH.search(text)]
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("number", TINY)
def test_one_switch_recomputes_the_results(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, at the smallest size; what the cells then read is not the kept record."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"display": lambda shown: None}
    parts = code_cells(nbformat.read(BY_NUMBER[number], as_version=4))
    for part in parts[: CELLS.get(number)]:
        source = part.source.replace("RECOMPUTE = False", "RECOMPUTE = True")
        source = re.sub(r"(?ms)^FLAGS = \[.*?\]", f"FLAGS = {TINY[number]!r}", source)
        exec(compile(source, BY_NUMBER[number].name, "exec"), names)
    assert names["RECOMPUTE"]
    assert ROOT not in names["folder"].resolve().parents
    configurations = [read(path) for path in names["folder"].rglob("config.json")]
    assert {c["num_seeds"] for c in configurations} == {2}


def test_a_figure_drawn_from_its_record_shows_the_recorded_numbers() -> None:
    gap, convergence = (
        ROOT / "figures" / name for name in ("gap_experiment", "convergence_experiment")
    )
    for path, (_, drawn) in {
        gap / "gap.json": gap_figure(*gap_inputs(gap)),
        convergence / "convergence.json": convergence_figure(*convergence_inputs(convergence)),
    }.items():
        assert drawn == read(path)["panels"]


def test_every_picture_has_a_vector_form_and_its_numbers() -> None:
    found = sorted((ROOT / "figures").rglob("*.png"))
    assert found
    for path in found:
        for suffix in (".svg", ".json"):
            assert path.with_suffix(suffix).is_file(), path.relative_to(ROOT)


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_records_are_found_from_the_root_and_from_below(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / folder)
    found = kept("gap_experiment")
    assert found.samefile(ROOT / "figures" / "gap_experiment")
    assert not found.is_absolute()


def test_a_record_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no figures/gap_experiment .* RECOMPUTE = True"):
        kept("gap_experiment")


def test_flags_that_a_command_refuses_are_named() -> None:
    from theory import gap_experiment

    with pytest.raises(UserError, match="unrecognized arguments: --sedes"):
        fresh(gap_experiment.main, ["--sedes", "3"])


def test_cells_show_an_interval_only_where_there_is_one() -> None:
    assert cell({"mean": 0.51234, "low": 0.5, "high": 0.525}) == "0.512 [0.5, 0.525]"
    assert cell({"median": 2.0, "low": 1.5, "high": 2.5}, ".1f") == "2.0 [1.5, 2.5]"
    assert cell({"mean": 0.25, "low": float("nan"), "high": float("nan")}) == "0.25"
    assert cell({"median": 3.0, "low": 0.0, "high": float("inf")}) == "3"


def test_a_picture_keeps_the_colours_of_the_lines() -> None:
    """The palette that makes a picture small is large enough for the house's colours."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    from theory.plotting.style import COLOURS

    figure = Figure(figsize=(3.0, 2.0))
    axis = figure.subplots()
    for level, colour in enumerate(COLOURS.values()):
        axis.axhline(level, color=colour, lw=2.0)
    png, size = Picture(figure)._repr_png_()
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)
    assert size == {"width": 288, "height": 192}
    for colour in COLOURS.values():
        distance = np.abs(pixels - 255.0 * np.array(to_rgb(colour))).max(axis=-1)
        assert distance.min() < 8.0  # of 255: a palette's cell, far below any two colours' distance
