"""What the notebooks share: where the recorded results are, fresh ones, pictures, cells."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from theory.cli import UserError

DPI, SCREEN_DPI = 120, 96
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
    middle, low, high = (interval.get(key) for key in ("mean", "low", "high"))
    middle = interval["median"] if middle is None else middle
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{middle:{form}}"
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"
